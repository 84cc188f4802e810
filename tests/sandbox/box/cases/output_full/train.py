"""Writes a checkpoint larger than its place."""

with open("/out/checkpoint", "wb") as file:
    while True:
        file.write(bytes(2**16))
