"""Leaves everything in its output that a careless reader falls for, and one good file."""

import os
import socket

os.chdir("/out")
open("good", "w").write("weights")
os.symlink("/etc/passwd", "link")
os.symlink("/proc/self/mem", "memory")
os.mkfifo("pipe")
socket.socket(socket.AF_UNIX).bind("socket")
os.link("good", "other")
open("lone", "w").write("x")
with open("sparse", "wb") as file:
    file.truncate(6 * 2**20)
open("bad name", "w").close()
open(".hidden", "w").close()
open("control\x1b[2J", "w").close()
os.makedirs("a/b/c/d/e")
open("a/b/c/deep", "w").write("y")
open("a/b/c/d/deeper", "w").write("z")
