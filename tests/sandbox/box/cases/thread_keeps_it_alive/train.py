"""Reaches its end while a thread does not."""

import threading
import time

threading.Thread(target=time.sleep, args=(60,)).start()
print("done", flush=True)
