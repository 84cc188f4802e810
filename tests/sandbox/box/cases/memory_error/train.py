"""Asks for more address space than there is: a Python error, not a kill."""

bytearray(2**60)
