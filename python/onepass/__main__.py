"""Runs the command line as `python -m onepass`, for where the script is not on PATH.

The console script `onepass` calls the same function; nothing else belongs here.
"""

from __future__ import annotations

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
