"""Takes memory until the kernel ends it."""

hoard = []
while True:
    hoard.append(bytearray(8 * 2**20))
