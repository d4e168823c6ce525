"""The examples do what they say: as a reader runs them, and over a socket as a guest uses them."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

from guest_memory import GuestAddress
from vhost_backend.testing import BlockDriver, DriverSession, attached

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(path.name for path in EXAMPLES.glob("*.py"))


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(EXAMPLES / example), *arguments]
    return subprocess.run(command, text=True, capture_output=True, timeout=60)


def load(example: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(example.removesuffix(".py"), EXAMPLES / example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextlib.contextmanager
def serving(example: str, *arguments: str, last: str = "SOCKET") -> Iterator[Path]:
    """An example's process; SOCKET in its arguments is a path, at which it listens by then."""
    with tempfile.TemporaryDirectory(prefix="vhost-") as folder:
        words = [word.replace("SOCKET", f"{folder}/s") for word in arguments]
        awaited = Path(last.replace("SOCKET", f"{folder}/s"))
        command = [sys.executable, "-W", "error", str(EXAMPLES / example), *words]
        with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
            try:
                deadline = time.monotonic() + 60
                while not awaited.exists():
                    assert process.poll() is None
                    assert time.monotonic() < deadline
                    time.sleep(0.01)
                yield Path(folder, "s")
                process.send_signal(signal.SIGTERM)
                assert process.wait(60) == 0
                assert process.stderr is not None
                assert "Traceback" not in process.stderr.read()
                assert os.listdir(folder) == []
            finally:
                process.kill()


@pytest.mark.parametrize("example", PROGRAMS)
def test_each_is_explained(example: str) -> None:
    """In the table, and by its own first lines, which name a command that starts it."""
    assert f"[{example}]({example})" in (EXAMPLES / "README.md").read_text()
    assert f"python examples/{example}" in str(load(example).__doc__)


# -- as a reader runs them ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("example", "arguments", "said"),
    [
        ("text_source.py", (), r"(The quick brown fox\. ){2}The quic\n"),
        (
            "overlay_disk.py",
            (),
            r"changed\nas it was\n1 MiB of changes takes \d{1,2} KiB\nthe image is as it was\n",
        ),
        (
            "numpy_batch.py",
            (),
            r"\(0, 0\) is 0 away\n\(3, 4\) is 5 away\n\(6, 8\) is 10 away\n24750 in all\n",
        ),
        ("reference_readme.py", (), r"[0-9a-f]{64}\n"),
        ("one_ring.py", ("hello", "big", "world"), r"HELLO\nBIG\nWORLD\n"),
        ("one_ring.py", (), r"SOME\nWORDS\n"),
    ],
)
def test_it_says_what_it_did(example: str, arguments: tuple[str, ...], said: str) -> None:
    if example == "numpy_batch.py":
        pytest.importorskip("numpy")
    done = run(example, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(said, done.stdout)


@pytest.mark.parametrize(
    ("example", "arguments"),
    [
        ("two_disks.py", ()),
        ("two_disks.py", ("a.img", "a.sock", "b.img")),
        ("overlay_disk.py", ("a.sock",)),
        ("unordered_disk.py", ("a.sock",)),
        ("text_source.py", ("a.sock", "more")),
        ("reference_readme.py", ("a.sock", "more")),
        ("numpy_batch.py", ("a.sock", "more")),
    ],
)
def test_arguments_that_do_not_fit_are_one_line(example: str, arguments: tuple[str, ...]) -> None:
    done = run(example, *arguments)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"usage: python examples/{example} ")
    assert done.stderr.count("\n") == 1


def test_what_an_example_needs_besides_is_named(tmp_path: Path) -> None:
    (tmp_path / "numpy.py").write_text("raise ImportError('not here')")
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "numpy_batch.py")],
        text=True,
        capture_output=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )
    assert (done.returncode, done.stderr) == (1, "this example needs numpy: pip install numpy\n")


def test_coroutines_answer_in_an_order_of_their_own() -> None:
    done = run("unordered_disk.py")
    assert done.returncode == 0, done.stderr
    order = [int(number) for number in re.findall(r"^sector (\d) holds \1$", done.stdout, re.M)]
    assert sorted(order) == list(range(8))
    assert order != sorted(order)
    assert re.fullmatch(r"[1-8] of 8 were overtaken, 0 given up\n", done.stderr)


def test_a_ring_is_filled_many_times_over() -> None:
    words = [f"word{number}" for number in range(500)]
    done = run("one_ring.py", *words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.split() == [word.upper() for word in words]


def test_a_back_end_is_asked_what_it_offers(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8 << 20))
    daemon = [sys.executable, "-m", "vhost_backend", "blk", f"--blk-file={image}"]
    done = run("what_is_offered.py", *daemon, "--num-queues=3")
    assert done.returncode == 0, done.stderr
    assert "queues: 3\n" in done.stdout
    assert "memory slots: 509\n" in done.stdout
    assert "configuration space begins: 00 40 00 00 00 00 00 00\n" in done.stdout
    with serving("overlay_disk.py", "SOCKET", str(image)) as socket:
        done = run("what_is_offered.py", str(socket))
        assert done.returncode == 0, done.stderr
        assert "queues: 1\n" in done.stdout


@pytest.mark.parametrize("arguments", [("/missing/program",), (sys.executable, "-c", "0")])
def test_a_back_end_that_cannot_be_asked_is_one_line(arguments: tuple[str, ...]) -> None:
    done = run("what_is_offered.py", *arguments)
    assert done.returncode == 1
    assert done.stderr.startswith("what_is_offered: ")
    assert done.stderr.count("\n") == 1


# -- as a guest uses them -------------------------------------------------------------------------


def test_an_overlay_keeps_what_was_written_and_not_in_its_image(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    content = bytes(range(256)) * 4096
    image.write_bytes(content)
    with serving("overlay_disk.py", "SOCKET", str(image)) as socket:
        with DriverSession.connect(socket) as session:
            driver = BlockDriver(session)
            assert driver.capacity == len(content)
            driver.write(16384 - 512, b"x" * 1024)  # over the edge of two clusters
        with DriverSession.connect(socket) as session:
            driver = BlockDriver(session)
            expected = content[: 16384 - 512] + b"x" * 1024 + content[16384 + 512 :]
            assert driver.read(0, len(content)) == expected
    assert image.read_bytes() == content


@pytest.mark.parametrize("example", ["overlay_disk.py", "unordered_disk.py"])
def test_disks_refuse_what_is_not_on_them(tmp_path: Path, example: str) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(8192))
    with serving(example, "SOCKET", str(image)) as socket, DriverSession.connect(socket) as session:
        driver = BlockDriver(session)
        statuses = []
        for kind, sector, payload, length in [
            (0, 15, b"", 512),
            (0, 16, b"", 512),  # behind the end
            (0, 0, b"", 511),
            (1, 1 << 60, bytes(512), 0),
            (1, 0, bytes(100), 0),
            (99, 0, b"", 0),
        ]:
            driver.submit(kind, sector, payload, length)
            driver.kick()
            ((completion, _),) = driver.collect()
            statuses.append(completion.status)
    assert statuses == [0, 1, 1, 1, 1, 2]
    assert image.read_bytes() == bytes(8192)


def test_two_disks_are_two(tmp_path: Path) -> None:
    images = [tmp_path / "a.img", tmp_path / "b.img"]
    for image in images:
        image.write_bytes(bytes(4096))
    arguments = (str(images[0]), "SOCKET", str(images[1]), "SOCKET.2")
    with serving("two_disks.py", *arguments, last="SOCKET.2") as socket:
        for path, text in ((socket, b"a"), (socket.with_suffix(".2"), b"b")):
            with DriverSession.connect(path) as session:
                BlockDriver(session).write(0, text * 512)
    assert [image.read_bytes()[:512] for image in images] == [b"a" * 512, b"b" * 512]


def test_numpy_answers_every_shape_of_request() -> None:
    """In one piece at any alignment, scattered, too small, with bytes too many."""
    pytest.importorskip("numpy")
    device = load("numpy_batch.py").Distances()
    question = struct.pack("<dd", 5.0, 12.0)
    with attached(device) as session:
        vring, memory = session.vrings[0], session.memory
        place = session.allocate(4096)
        memory.write(place, question)
        memory.write(GuestAddress(place + 16), bytes(8))
        shapes: list[tuple[list[tuple[int, int]], list[tuple[int, int]]]] = [
            ([(place, 16)], [(place + 101, 8)]),
            ([(place, 9), (place + 9, 7)], [(place + 200, 3), (place + 300, 5)]),
            ([(place, 16)], [(place + 400, 4)]),
            ([(place, 24)], [(place + 500, 8)]),
        ]
        identities = [vring.submit(readable, writable) for readable, writable in shapes]
        vring.kick()
        written: dict[int, int] = {}
        while len(written) < len(shapes):
            written.update(vring.completions())
        assert [written[identity] for identity in identities] == [8, 8, 0, 0]
        thirteen = struct.pack("<d", 13.0)
        assert memory.read(GuestAddress(place + 101), 8) == thirteen
        scattered = memory.read(GuestAddress(place + 200), 3)
        assert scattered + memory.read(GuestAddress(place + 300), 5) == thirteen
        assert memory.read(GuestAddress(place + 400), 8) == bytes(8)
        assert memory.read(GuestAddress(place + 500), 8) == bytes(8)


def test_the_references_example_serves_one_front_end_after_another() -> None:
    with serving("reference_readme.py", "SOCKET") as path:
        for event_idx in (False, True):
            with DriverSession.connect(path, timeout=60, event_idx=event_idx) as session:
                vring = session.vrings[0]
                room = session.allocate(4096)
                for _ in range(20):
                    for _ in range(5):
                        vring.submit([], [(room, 4096)])
                    vring.kick()
                    count = 0
                    while count < 5:
                        # Raises when completions came without a signal that was asked for.
                        done = vring.completions(60)
                        assert {written for _, written in done} == {4096}
                        count += len(done)
