"""Makes a machine ready and measures it."""
