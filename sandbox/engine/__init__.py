"""Finds a container engine, or starts its own."""
