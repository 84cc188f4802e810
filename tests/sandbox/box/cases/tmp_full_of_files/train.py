"""Makes files of no size until /tmp takes no more."""

number = 0
while True:
    open(f"/tmp/{number}", "w").close()
    number += 1
