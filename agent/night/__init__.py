"""A session: begins, loops, waits, comes back."""
