"""A short form of the two-process stress; the long one is a script beside this file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from virtqueue import EngineName


@pytest.mark.parametrize(
    "flags",
    [[], ["--event-idx"], ["--event-idx", "--in-order"]],
    ids=lambda f: "".join(f) or "flags",
)
def test_no_chain_and_no_wake_up_is_lost(
    engine: EngineName, packed: bool, flags: list[str]
) -> None:
    arguments = [sys.executable, str(Path(__file__).parent / "stress_ring.py"), *flags]
    arguments += ["--chains", "4000", "--engine", engine]
    arguments += ["--packed", "--size", "201"] if packed else []
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
