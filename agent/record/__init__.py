"""The only truth of a session: events, ledger, folds."""
