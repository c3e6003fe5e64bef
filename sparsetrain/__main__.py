"""``python -m sparsetrain``: the same as the command ``sparsetrain``."""

import sys

from sparsetrain.cli import main

sys.exit(main())
