"""Does nothing wrong."""

print("done")
