"""Ends with the code that others take for a timeout."""

raise SystemExit(124)
