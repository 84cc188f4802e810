"""All that the rest of nightlab sees of the sandbox."""
