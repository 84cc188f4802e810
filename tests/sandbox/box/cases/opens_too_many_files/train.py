"""Opens files until none opens."""

kept = [open("/dev/null") for _ in range(1000)]
