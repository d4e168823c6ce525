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


ONE, THREE, EIGHT, ALL, MOST = range(5)


def shares(world: str, *periods: str) -> list[list[int]]:
    """Of each period: percent of requests taken in each way, and how many at a time at most."""
    done = subprocess.run([world, *periods], capture_output=True, text=True, check=True, timeout=60)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.parametrize("way", [ONE, THREE, EIGHT, ALL])
def test_the_fastest_way_is_taken_nearly_always(world: str, way: int) -> None:
    costs = [1800, 1500, 1600, 2000]
    costs[way] = 1000
    (found,) = shares(world, "2:" + ":".join(map(str, costs)))
    assert found[way] > 94


def test_eight_are_preferred_where_it_makes_no_difference(world: str) -> None:
    for cost in (1000, 970, 1100):
        (found,) = shares(world, f"2:{cost}:{cost}:1000:{cost}")
        assert found[EIGHT] > 90


def test_a_change_is_followed_within_a_second(world: str) -> None:
    periods = ["1:1200:1100:1000:2000", "2:4000:3000:2000:1000", "2:700:900:1000:1200"]
    first, second, third = shares(world, *periods)
    assert first[EIGHT] > 90
    assert second[ALL] > 85
    assert third[ONE] > 90


def test_large_requests_are_taken_fewer_at_a_time(world: str) -> None:
    for size, most in ((4096, 8), (32768, 8), (65536, 4), (131072, 2), (1 << 20, 1)):
        (found,) = shares(world, f"1:9000:9000:9000:20000:{size}")
        assert found[MOST] == most
