"""Checks by daylight: audit, review, replay, approval."""
