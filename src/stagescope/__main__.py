"""`python -m stagescope`."""

import sys

from stagescope.cli import main

sys.exit(main())
