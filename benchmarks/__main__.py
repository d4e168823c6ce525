"""``python -m benchmarks`` is ``python benchmarks/run.py``."""

import runpy
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent

if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    runpy.run_path(str(HERE / "run.py"), run_name="__main__")
