"""Ends as a program that the kernel killed for memory would: words and code, and no kill."""

import sys

print("Killed", file=sys.stderr)
print("RuntimeError: DataLoader worker (pid 7) is killed by signal: Killed.", file=sys.stderr)
raise SystemExit(137)
