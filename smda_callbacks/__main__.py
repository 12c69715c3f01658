"""``python -m smda_callbacks`` is the command ``smda``."""

from __future__ import annotations

import sys

from smda_callbacks.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
