"""Ends with a code of its own."""

raise SystemExit(3)
