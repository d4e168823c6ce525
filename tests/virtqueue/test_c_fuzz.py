"""A few seconds of the hostile driver in c/fuzz_ring.c; the long run is in the changelog."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "packages" / "virtqueue" / "csrc"
HARNESS = Path(__file__).parent / "c" / "fuzz_ring.c"


@pytest.mark.skipif(not CSRC.exists(), reason="the C sources are not there")
@pytest.mark.skipif(shutil.which("clang") is None, reason="no clang (libFuzzer)")
def test_a_hostile_driver_under_asan_and_ubsan(tmp_path: Path) -> None:
    program = tmp_path / "fuzz"
    flags = ["-std=c11", "-g", "-O1", "-fsanitize=fuzzer,address,undefined"]
    flags += ["-fno-sanitize-recover=all", "-DVQ_ROOM=16", f"-I{CSRC}"]
    subprocess.run(
        ["clang", *flags, "-o", program, HARNESS, *sorted(CSRC.glob("*.c"))],
        check=True,
        capture_output=True,
    )
    limits = ["-runs=15000", "-max_total_time=8", "-seed=1", "-max_len=1024", "-len_control=10"]
    done = subprocess.run([program, *limits], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
