"""``python -m yolotrt``."""

import sys

from yolotrt.cli import main

if __name__ == "__main__":
    sys.exit(main())
