"""``python -m benchmarks``: measure our back-ends beside their peers (comparison/command.py)."""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Files of this folder import each other by the same names as when each is run as a program.
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from comparison.command import main

    sys.exit(main())
