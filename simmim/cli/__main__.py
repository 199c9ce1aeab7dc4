"""`python -m simmim.cli`."""

import sys

from simmim.cli.main import main

sys.exit(main())
