"""Writes attempts into experiment trackers' files, one module each."""
