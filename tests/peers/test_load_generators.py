"""The benchmarks' load generators against the benchmarks' devices: nothing is timed here.

The generators are drivers of their own in C that check what comes back, so that a device which is
measured by them is shown to work as well: every status, every word read, every packet's number and
length.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TIMES = ("--seconds=0.5", "--warm-up=0.1", "--connect-timeout=30")

pytestmark = pytest.mark.skipif(
    shutil.which("make") is None or shutil.which("cc") is None, reason="no C compiler and make"
)


@pytest.fixture(scope="module")
def generators(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("generators")
    command = ["make", "--silent", f"BUILD={folder}"]
    subprocess.run(command, cwd=BENCHMARKS / "load", check=True, capture_output=True)
    return folder


@contextmanager
def serving(program: str, *options: str) -> Iterator[None]:
    """Run one of the benchmarks' devices; it must end well, and say only where it serves."""
    command = [sys.executable, str(BENCHMARKS / "devices" / program), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield
        finally:
            process.terminate()
            _, errors = process.communicate()
    said = [line for line in errors.splitlines() if ": serving on " not in line]
    assert (process.returncode, said) == (0, [])


def load(generator: Path, socket: Path, *options: str) -> dict[str, Any]:
    command = [str(generator), f"--socket={socket}", *TIMES, *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    figures: dict[str, Any] = json.loads(done.stdout)
    return figures


@pytest.mark.parametrize("style", ["records", "batch"])
@pytest.mark.parametrize(
    ("work", "options"),
    [
        ("echo", ("--depth=32",)),
        ("echo", ("--depth=200", "--packed", "--no-event-idx", "--packet=1514")),
        ("echo", ("--depth=16", "--mergeable", "--regions=9", "--poll")),
        ("sink", ("--depth=32",)),
        ("source", ()),
    ],
)
def test_a_network_device(
    style: str, work: str, options: tuple[str, ...], generators: Path, tmp_path: Path
) -> None:
    socket = tmp_path / "net.sock"
    with serving("net.py", f"--socket-path={socket}", f"--style={style}", f"--work={work}"):
        figures = load(generators / "netload", socket, f"--direction={work}", *options)
    assert figures["requests"] > 0
    assert figures["lost"] == 0


@pytest.mark.parametrize("style", ["records", "requests", "batch"])
def test_two_null_devices_in_one_process(style: str, generators: Path, tmp_path: Path) -> None:
    sockets = [tmp_path / "one.sock", tmp_path / "two.sock"]
    paths = [f"--socket-path={socket}" for socket in sockets]
    with serving("null.py", f"--style={style}", "--queues=2", *paths):
        for socket in sockets:
            options = ("--queues=2", "--depth=32", "--write-percent=30", "--flush-every=50")
            figures = load(generators / "load", socket, *options)
            assert figures["requests"] > 0
            assert figures["odd_used_lengths"] == 0
            assert figures["wrong_bases"] == 0
