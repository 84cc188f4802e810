"""Tries the walls for real."""
