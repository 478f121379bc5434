"""``python -m gpufgbg``."""

import sys

from gpufgbg.cli import main

sys.exit(main())
