"""Makes a file of a terabyte that holds nothing."""

with open("/out/sparse", "wb") as file:
    file.truncate(2**40)
