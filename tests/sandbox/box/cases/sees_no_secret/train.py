"""Lists its environment: nothing but what was named."""

import os

print(sorted(set(os.environ) - {"LC_CTYPE"}))
