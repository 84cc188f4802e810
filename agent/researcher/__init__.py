"""Who proposes the next candidate, what it is told and what it may do."""
