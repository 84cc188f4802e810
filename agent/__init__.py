"""Decides what to try next; knows nothing of Docker."""
