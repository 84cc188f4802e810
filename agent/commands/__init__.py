"""What a person types, by part of the night."""
