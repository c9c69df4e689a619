"""`python -m dpofast` is `dpofast`."""

import sys

from dpofast.cli.main import main

sys.exit(main())
