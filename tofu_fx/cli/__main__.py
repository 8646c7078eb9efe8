"""`python -m tofu_fx.cli`."""

import sys

from tofu_fx.cli import main

sys.exit(main())
