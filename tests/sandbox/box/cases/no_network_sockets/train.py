"""Asks for network sockets, without loopback in its limits; what else connects processes works."""

import errno
import multiprocessing
import socket


def double(number: int) -> int:
    return 2 * number


for family in (socket.AF_INET, socket.AF_INET6):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        try:
            socket.socket(family, kind)
            print("made", family)
        except OSError as error:
            print(errno.errorcode[error.errno], end=" ")
try:
    socket.create_server(("127.0.0.1", 0))
except OSError as error:
    print(error.strerror)
ours, theirs = socket.socketpair()
ours.sendall(b"ping")
with multiprocessing.get_context("fork").Pool(2) as pool:
    print(theirs.recv(4).decode(), pool.map(double, [1, 2]))
with multiprocessing.get_context("fork").Manager() as manager:
    shared = manager.dict(known=True)
    print(dict(shared))
