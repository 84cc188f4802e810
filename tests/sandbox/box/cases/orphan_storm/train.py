"""Makes orphans faster than anybody collects them."""

import os

while True:
    try:
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os._exit(0)
            os._exit(0)
    except OSError:
        pass
