"""One box, from its walls to its end."""
