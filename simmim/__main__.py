"""`python -m simmim` is the command `simmim`."""

import sys

from simmim.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
