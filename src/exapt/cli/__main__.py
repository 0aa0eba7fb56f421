"""``python -m exapt.cli``, for launchers such as torchrun that start a module."""

import sys

from exapt.cli import main

if __name__ == "__main__":
    sys.exit(main())
