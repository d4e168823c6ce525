"""The comparison of both engines, guided by the coverage of the Python engine.

    pip install atheris
    python tests/virtqueue/fuzz_engines.py -max_total_time=900 [CORPUS]

The scripts, the drivers and what has to agree are those of ``test_differential.py``; libFuzzer
chooses the bytes that hypothesis makes them from.
"""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

# It has no types, and is installed for this alone.
atheris: Any = import_module("atheris")

with atheris.instrument_imports(include=["virtqueue"]):
    import virtqueue.engine.python.packed
    import virtqueue.engine.python.split  # noqa: F401

import test_differential as differential  # noqa: E402

KINDS: list[Any] = [
    differential.test_the_engines_agree_on_drivers_that_break_them,
    differential.test_the_engines_agree_on_drivers_that_keep_the_rules,
]


def one(data: bytes) -> None:
    """One script; its first byte says whether its driver keeps the rules."""
    if data:
        KINDS[data[0] & 1].hypothesis.fuzz_one_input(data[1:])


def main() -> None:
    if differential.ENGINES != ("python", "c"):
        sys.exit("there is no C engine to compare with")
    # A script takes a kilobyte: short inputs end before they have done anything.
    atheris.Setup([*sys.argv, "-max_len=4096", "-len_control=0"], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
