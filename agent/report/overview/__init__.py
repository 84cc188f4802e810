"""What all attempts of a night say together."""
