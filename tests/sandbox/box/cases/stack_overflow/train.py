"""Runs out of stack in native code."""

import ctypes
import threading

threading.stack_size(2**16)
libc = ctypes.CDLL(None)
compare = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p)


def deeper():
    again = compare(lambda one, other: deeper() or 0)
    libc.qsort(ctypes.create_string_buffer(16), 2, 8, again)


import sys

sys.setrecursionlimit(10**6)
thread = threading.Thread(target=deeper)
thread.start()
thread.join()
