"""What a person sees of a session."""
