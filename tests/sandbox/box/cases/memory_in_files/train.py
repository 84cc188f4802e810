"""Fills /tmp beyond the memory limit: files in memory count, and no kill frees them."""

with open("/tmp/hoard", "wb") as file:
    while True:
        file.write(bytes(2**16))
