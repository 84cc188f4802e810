"""Writes NULs, terminal escapes and what is no text."""

import os

os.write(1, b"\0\xff\xfe\x1b]0;title\x07\r\n")
