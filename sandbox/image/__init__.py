"""What boxes are made from."""
