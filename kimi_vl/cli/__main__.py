"""``python -m kimi_vl.cli`` is ``kimi-vl``."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
