"""A short form of c/stress_ring.c, two processes in C; the long one is by hand."""

from __future__ import annotations

import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "packages" / "virtqueue" / "csrc"
PROGRAM = Path(__file__).parent / "c" / "stress_ring.c"


@pytest.mark.skipif(not CSRC.exists(), reason="the C sources are not there")
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
def test_no_chain_and_no_wake_up_is_lost(tmp_path: Path) -> None:
    program = tmp_path / "stress"
    command = shlex.split("cc -std=c11 -O2 -Wall -Wextra -Werror")
    command += [f"-I{CSRC}", "-o", str(program), str(PROGRAM), *map(str, sorted(CSRC.glob("*.c")))]
    subprocess.run(command, check=True, capture_output=True)
    for format_ in ("split", "packed"):
        for notification in ("flags", "event"):
            arguments = [program, format_, notification, "100000"]
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=100)
            expected = "100000 chains, none lost or repeated\n"
            assert (done.returncode, done.stdout) == (0, expected), done.stderr
