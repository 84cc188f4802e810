"""Prints what CUDA says without memory, having no GPU."""

import sys

print("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.", file=sys.stderr)
raise SystemExit(1)
