"""Is not Python."""

def train(:
