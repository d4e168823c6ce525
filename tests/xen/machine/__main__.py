"""Fetch, build, boot, and write the results as JSON."""

import argparse
import json
import sys
from pathlib import Path

from .boot import run
from .errors import MachineFailed, Unavailable
from .fetch import check_host, fetch


def main() -> int:
    """Return 0 when the machine ran to its end, 3 when this host cannot run it, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="python -m machine", description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results here, not to the terminal")
    parser.add_argument("--console", type=Path, help="write the machine's console here")
    arguments = parser.parse_args()
    here = Path(__file__).resolve().parent
    try:
        check_host()
        done = run(fetch(), here.parents[2], here.parent / "inside")
    except Unavailable as error:
        print(error, file=sys.stderr)
        return 3
    except MachineFailed as error:
        print(error, file=sys.stderr)
        return 1
    if arguments.console:
        arguments.console.write_text(done.console)
    text = json.dumps(
        {
            "seconds": round(done.seconds, 1),
            "cpu_seconds": round(done.cpu_seconds, 1),
            "results": done.results,
        },
        indent=1,
    )
    if arguments.output:
        arguments.output.write_text(text)
    else:
        print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
