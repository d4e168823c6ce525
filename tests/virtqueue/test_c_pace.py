"""How many requests a handler wants at once follows what a request takes."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "packages" / "virtqueue" / "csrc"
WORLD = Path(__file__).parent / "c" / "pace_world.c"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = shutil.which("cc")
    if compiler is None or not CSRC.exists() or not WORLD.exists():
        pytest.skip("no C compiler, or not the sources")
    program = str(tmp_path_factory.mktemp("pace") / "world")
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", f"-I{CSRC}"]
    subprocess.run([compiler, *flags, str(WORLD), "-o", program], check=True, capture_output=True)
    return program


def shares(world: str, *periods: str) -> list[tuple[int, int]]:
    """Of each period: percent of requests that were taken few at a time, and how many at most."""
    done = subprocess.run([world, *periods], capture_output=True, text=True, check=True, timeout=60)
    return [(int(a), int(b)) for a, b in (line.split() for line in done.stdout.splitlines())]


def test_the_faster_way_is_taken_nearly_always(world: str) -> None:
    ((few, most),) = shares(world, "2:1000:2000")
    assert few > 95
    assert most == 8
    ((few, _),) = shares(world, "2:2000:1000")
    assert few < 5


def test_few_are_preferred_where_it_makes_no_difference(world: str) -> None:
    for cost in (1000, 970, 1100):
        ((few, _),) = shares(world, f"2:1000:{cost}")
        assert few > 90


def test_a_change_is_followed_within_a_second(world: str) -> None:
    (first, second, third) = shares(world, "1:1000:2000", "2:2000:1000", "2:800:1000")
    assert first[0] > 90
    assert second[0] < 10
    assert third[0] > 90


def test_large_requests_are_taken_fewer_at_a_time(world: str) -> None:
    for size, most in ((4096, 8), (32768, 8), (65536, 4), (131072, 2), (1 << 20, 1)):
        assert shares(world, f"1:9000:20000:{size}")[0][1] == most
