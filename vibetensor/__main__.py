"""`python -m vibetensor` is the `vibetensor` command."""

import sys

from vibetensor.train.cli import main

sys.exit(main())
