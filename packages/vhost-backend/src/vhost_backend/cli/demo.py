"""`vhost-backend demo`: device, daemon and driver at once, without a virtual machine.

The demo makes a disk image. The real daemon serves it over a Unix socket, in a process of its own.
The embedded driver attaches to it, and writes, reads back and checks every block: first one request
at a time, then many at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import os
import random
import shlex
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, NamedTuple

from vhost_protocol import Frontend, ProtocolError
from virtqueue import VirtqueueError

from ..devices.blk import S_OK, SECTOR, T_IN, T_OUT
from ..devices.blk.image_lock import ImageLock
from ..driver import BlockDriver, DriverSession
from ..driver.block import DRIVER_FEATURES
from ..errors import VhostBackendError
from .engine import chosen_engine

if TYPE_CHECKING:
    from rich.progress import Progress

DESCRIPTION = (
    "Make a disk image and serve it by the daemon in a process of its own. Attach the embedded\n"
    "driver, write, read back and verify. Then print how to give the same image to QEMU."
)
EPILOG = "The image stays where it was made, so that the printed commands work."

BLOCK = 4096
DEPTHS = (1, 32)
SEED = 20240229
TIMEOUT = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    parser.add_argument(
        "--size", type=_size, default=32, metavar="MIB", help="image size, 1 to 1024 (default 32)"
    )
    parser.add_argument(
        "--image",
        type=Path,
        metavar="IMG",
        help="where to make the image; an existing file is overwritten unless it is in use",
    )
    parser.add_argument(
        "--qemu",
        action="store_true",
        help="instead boot a guest under QEMU and test the disk there (from a clone's folder)",
    )


class Result(NamedTuple):
    """One phase: `latencies` in seconds, one for each operation."""

    name: str
    depth: int
    latencies: list[float]
    seconds: float


def run(options: SimpleNamespace) -> int:
    """Run the demo; 0 when every checksum was right."""
    if options.qemu:
        return _guest_tests()
    if importlib.util.find_spec("rich") is None:
        raise VhostBackendError("the demo draws with rich, the [cli] extra: pip install rich")
    engine = chosen_engine()
    image = options.image if options.image is not None else _default_image()
    blocks = options.size * 2**20 // BLOCK
    _make_image(image, blocks * BLOCK)
    with _tidy_end(), _daemon(image) as connection, _output():
        results = _exercise(connection, blocks)
    _check_image(image, blocks)
    with _output():
        _report(results, engine)
        _print_qemu(image)
        sys.stdout.flush()
    return 0


def _make_image(image: Path, size: int) -> None:
    """Make an image of zeroes; it replaces a regular file that no other program uses."""
    try:
        fd = os.open(image, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise VhostBackendError(f"{image}: exists and is not a regular file")
            lock = ImageLock(fd, str(image), writes=True)
            other = lock.others()
            if other is not None:
                raise VhostBackendError(f"{image}: {other} has it open: end that, or use --image")
            lock.acquire()
            os.ftruncate(fd, 0)
            os.ftruncate(fd, size)
            lock.close()
        finally:
            os.close(fd)
    except OSError as error:
        raise VhostBackendError(f"{image}: {error.strerror}") from None


@contextlib.contextmanager
def _output() -> Iterator[None]:
    """Turn an error of printing, such as a full disk, into a `VhostBackendError`."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise VhostBackendError(f"cannot write the output: {error.strerror}") from None


@contextlib.contextmanager
def _tidy_end() -> Iterator[None]:
    """Turn SIGTERM and SIGHUP into `SystemExit`, so that the daemon ends as for Ctrl-C."""

    def end(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    # An ignored signal stays ignored: that is how nohup works.
    heard = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, end) for number in heard}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# -- the daemon, in its own process ---------------------------------------------------------------


@contextlib.contextmanager
def _daemon(image: Path) -> Iterator[socket.socket]:
    """A connection to a daemon that serves the image; the daemon ends with the context."""
    command = [sys.executable, "-m", "vhost_backend", "blk"]
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with ours, theirs:
        command += [f"--fd={theirs.fileno()}", f"--blk-file={image}", "--serial=demo"]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()])
        theirs.close()
        try:
            try:
                yield ours
            except (ProtocolError, VirtqueueError, VhostBackendError) as error:
                # A process that is killed hangs up a moment before it has ended.
                try:
                    ended: int | None = process.wait(0.5)
                except subprocess.TimeoutExpired:
                    ended = None
                what = "" if ended is None else f"the daemon ended with status {ended}: "
                raise VhostBackendError(f"{what}{error}") from None
            ours.close()
            # Without a limit: its last flush may take long, and it logs what it waits for.
            if process.wait() != 0:
                raise VhostBackendError(f"the daemon ended with status {process.returncode}")
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


# -- the work -------------------------------------------------------------------------------------


def _content(index: int) -> bytes:
    """The content for block `index`, different in every block."""
    return random.Random(SEED + index).randbytes(BLOCK)


def _exercise(connection: socket.socket, blocks: int) -> list[Result]:
    from rich.progress import BarColumn, Progress, TextColumn

    results = []
    columns = (
        TextColumn("{task.description:<24}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
    )
    with (
        DriverSession(
            Frontend(connection.dup(), timeout=TIMEOUT), features=DRIVER_FEATURES
        ) as session,
        Progress(*columns) as progress,
    ):
        driver = BlockDriver(session, depth=max(DEPTHS), max_io=BLOCK)
        if driver.capacity != blocks * BLOCK:
            raise VhostBackendError(f"the disk has {driver.capacity} bytes, not {blocks * BLOCK}")
        contents = [_content(index) for index in range(blocks)]
        for depth in DEPTHS:
            # Each round writes other content, so that no read can pass with the last round's.
            results += _round(progress, driver, depth, contents[depth:] + contents[:depth])
    return results


def _round(
    progress: Progress, driver: BlockDriver, depth: int, contents: list[bytes]
) -> list[Result]:
    """Write every block, flush, read every block back; each in an order of its own."""
    order = list(range(len(contents)))
    sums = [zlib.crc32(content) for content in contents]
    shuffle = random.Random(SEED + depth).shuffle

    def write(block: int) -> tuple[int, bytes, int]:
        return T_OUT, contents[block], 0

    def read(block: int) -> tuple[int, bytes, int]:
        return T_IN, b"", BLOCK

    def verify(block: int, data: bytes) -> None:
        if zlib.crc32(data) != sums[block]:
            raise VhostBackendError(f"block {block} does not hold what was written")

    shuffle(order)
    wrote = _phase(
        progress, f"write, depth {depth}", driver, depth, order, write, lambda block, data: None
    )
    driver.flush()
    shuffle(order)
    checked = _phase(
        progress, f"read and verify, depth {depth}", driver, depth, order, read, verify
    )
    return [wrote, checked]


def _phase(
    progress: Progress,
    name: str,
    driver: BlockDriver,
    depth: int,
    order: list[int],
    make: Callable[[int], tuple[int, bytes, int]],
    finish: Callable[[int, bytes], None],
) -> Result:
    task = progress.add_task(name, total=len(order))
    started: dict[int, float] = {}
    latencies: list[float] = []
    todo = iter(order)
    begin = time.perf_counter()
    exhausted = False
    while not exhausted or driver.in_flight:
        while driver.in_flight < depth and not exhausted:
            block = next(todo, None)
            if block is None:
                exhausted = True
                break
            kind, payload, length = make(block)
            driver.submit(kind, block * (BLOCK // SECTOR), payload, length, tag=block)
            started[block] = time.perf_counter()
        driver.kick()
        if not driver.in_flight:
            break
        for completion, data in driver.collect():
            if completion.status != S_OK:
                raise VhostBackendError(f"{name}: status {completion.status}")
            done = completion.tag
            assert isinstance(done, int)
            latencies.append(time.perf_counter() - started.pop(done))
            finish(done, data)
        progress.update(task, completed=len(latencies))
    return Result(name, depth, latencies, time.perf_counter() - begin)


def _check_image(image: Path, blocks: int) -> None:
    """Check that the image file holds the blocks that the last round wrote."""
    expected = hashlib.sha256()
    for block in range(blocks):
        expected.update(_content((block + DEPTHS[-1]) % blocks))
    with open(image, "rb") as file:
        actual = hashlib.file_digest(file, "sha256")
    if actual.digest() != expected.digest():
        raise VhostBackendError(f"{image} does not hold what was written")


# -- the output -----------------------------------------------------------------------------------


def _report(results: list[Result], engine: str) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"embedded driver and daemon, 4 KiB random, ring engine {engine}")
    table.add_column("phase")
    console = Console()
    micro = "µs" if console.encoding.startswith("utf") else "us"
    for name in ("operations", "MiB/s", f"p50 {micro}", f"p99 {micro}"):
        table.add_column(name, justify="right")
    for result in results:
        ordered = sorted(result.latencies)
        count = len(ordered)
        table.add_row(
            result.name,
            f"{count:,}",
            f"{count * BLOCK / 2**20 / result.seconds:.1f}",
            f"{ordered[count // 2] * 1e6:.0f}",
            f"{ordered[min(count - 1, count * 99 // 100)] * 1e6:.0f}",
        )
    console.print(table)
    console.print("every block was read back with the right checksum, and the image file agrees")


def _print_qemu(image: Path) -> None:
    quoted = shlex.quote(str(image))
    command = shlex.join([sys.executable, "-m", "vhost_backend"])
    print(f"""
the same image, for QEMU:
  {command} blk --socket-path=/tmp/vhost-demo.sock --blk-file={quoted}
  qemu-system-x86_64 -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\
    -chardev socket,id=disk,path=/tmp/vhost-demo.sock,reconnect=1 \\
    -device vhost-user-blk-pci,chardev=disk
(newer QEMU: reconnect-ms=1000)
(add a bootable disk or -kernel; the image is then /dev/vda in the guest)""")


def _guest_tests() -> int:
    tests = Path("tests/guest/test_blk.py")
    if not tests.is_file():
        raise VhostBackendError("--qemu runs the guest tests of a clone: start it in its folder")
    missing = [
        name
        for name in ("pytest", "pytest-timeout")
        if importlib.util.find_spec(name.replace("-", "_")) is None
    ]
    if missing:
        command = shlex.join([sys.executable, "-m", "pip", "install", *missing])
        raise VhostBackendError(f"--qemu runs the guest tests with pytest: {command}")
    with tempfile.NamedTemporaryFile(suffix=".xml") as results:
        command_line = [sys.executable, "-m", "pytest", "-v", "-rs", str(tests)]
        status = subprocess.call([*command_line, f"--junitxml={results.name}"])
        if status == 0 and not _some_ran(results.name):
            raise VhostBackendError("--qemu has tested nothing: every guest test was skipped")
    return status


def _some_ran(results: str) -> bool:
    """Whether pytest's report has a test that was not skipped."""
    from xml.etree import ElementTree

    suites = ElementTree.parse(results).iter("testsuite")
    return any(int(suite.get("tests", 0)) > int(suite.get("skipped", 0)) for suite in suites)


def _default_image() -> Path:
    directory = Path(tempfile.gettempdir()) / f"vhost-demo-{os.getuid()}"
    directory.mkdir(mode=0o700, exist_ok=True)
    status = directory.lstat()  # a link could lead to any folder of ours
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid():
        raise VhostBackendError(f"{directory} is no folder of this user's: use --image")
    return directory / "disk.img"


def _size(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 1 to 1024")
    return number
