"""`python -m dpofast` is `dpofast`."""

import sys

from dpofast.cli import main

sys.exit(main())
