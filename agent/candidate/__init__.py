"""The files that an attempt is made of."""
