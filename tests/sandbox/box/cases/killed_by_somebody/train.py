"""Is killed by a signal that is not ours and not the kernel's for memory."""

import os
import signal

os.kill(os.getpid(), signal.SIGKILL)
