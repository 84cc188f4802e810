"""Writes attempts into the files of experiment trackers, one module each."""
