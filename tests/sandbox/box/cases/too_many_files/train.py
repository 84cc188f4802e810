"""Leaves a hundred thousand files in its output."""

for number in range(100_000):
    open(f"/out/{number}", "w").close()
