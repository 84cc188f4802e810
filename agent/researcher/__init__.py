"""Who proposes the next candidate, and what it may do."""
