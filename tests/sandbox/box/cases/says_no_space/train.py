"""Says that the disk is full, and it is not."""

with open("/out/checkpoint", "wb") as file:
    file.write(b"x" * 4096)
raise OSError(28, "No space left on device", "/out/checkpoint")
