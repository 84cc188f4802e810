"""The only truth of a session: its events, their ledger, and folds over them."""
