"""`python -m flexrun` is the command `flexrun`."""

from __future__ import annotations

import sys

from flexrun.cli import main

if __name__ == "__main__":
    sys.exit(main())
