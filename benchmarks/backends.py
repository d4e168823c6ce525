"""The back-ends that are compared: how each is built, started and told apart."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
LOAD = HERE / "load" / "build" / "load"
PEERS = HERE / "peers" / "target" / "release"
LISTEN_SECONDS = 20.0


class Unavailable(Exception):
    """Something cannot be built or started here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a back-end is to listen, what it serves, and with how many queues."""

    socket: Path
    image: Path
    queues: int


@dataclass(frozen=True)
class Backend:
    """One competitor. `ours` marks this project's; `needs` is what must have been built."""

    name: str
    what: str
    ours: bool
    needs: str
    command: Callable[[Place], list[str]]


def _rust(*options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        base = [str(PEERS / "device"), f"--socket={place.socket}", f"--queues={place.queues}"]
        return base + [option.format(image=place.image) for option in options]

    return command


def _qemu(aio: str, cache: str = "") -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        return [
            "qemu-storage-daemon",
            "--blockdev",
            f"driver=file,node-name=disk,filename={place.image},aio={aio}{cache}",
            "--export",
            f"type=vhost-user-blk,id=export,node-name=disk,writable=on,num-queues={place.queues},"
            f"addr.type=unix,addr.path={place.socket}",
        ]

    return command


def _null(style: str, *options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        program = str(HERE / "devices" / "null.py")
        base = [sys.executable, program, f"--style={style}", f"--socket-path={place.socket}"]
        return [*base, f"--queues={place.queues}", *options]

    return command


def _blk(*options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        base = [sys.executable, "-m", "vhost_backend", "blk", f"--socket-path={place.socket}"]
        return [*base, f"--blk-file={place.image}", f"--num-queues={place.queues}", *options]

    return command


BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("rust-null", "Rust vhost-user-backend, null device", False, "rust", _rust()),
        Backend("null-records", "ours, Python per request, records", True, "", _null("records")),
        Backend("null-requests", "ours, handle(queue, request)", True, "", _null("requests")),
        Backend("null-batch", "ours, batches in C", True, "", _null("batch")),
        Backend(
            "rust-file",
            "Rust vhost-user-backend, preadv/pwritev",
            False,
            "rust",
            _rust("--file={image}"),
        ),
        Backend("qsd-threads", "qemu-storage-daemon, aio=threads", False, "qemu", _qemu("threads")),
        Backend(
            "qsd-io_uring", "qemu-storage-daemon, aio=io_uring", False, "qemu", _qemu("io_uring")
        ),
        Backend(
            "qsd-native",
            "qemu-storage-daemon, aio=native (O_DIRECT)",
            False,
            "qemu",
            _qemu("native", ",cache.direct=on"),
        ),
        Backend("blk", "ours, vhost-backend blk", True, "", _blk()),
    )
}


def _run(command: list[str], cwd: Path | None = None) -> str:
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise Unavailable(f"`{' '.join(command)}`: {lines[-1]}")
    return done.stdout


def build_load() -> None:
    """Compile the load generator."""
    _run(["make", "--silent", f"BUILD={LOAD.parent}"], HERE / "load")


def build_rust() -> str:
    """Compile the Rust peers from the versions in their lock file; which those are."""
    _run(["cargo", "build", "--release", "--locked", "--quiet"], HERE / "peers")
    lock = (HERE / "peers" / "Cargo.lock").read_text()
    found = dict(re.findall(r'name = "([\w-]+)"\nversion = "([\d.]+)"', lock))
    crates = ("vhost", "vhost-user-backend", "virtio-queue", "vm-memory")
    compiler = _run(["rustc", "--version"]).split()[1]
    return ", ".join(f"{name} {found[name]}" for name in crates) + f" (rustc {compiler}, LTO)"


def find_qemu() -> str:
    """The version of qemu-storage-daemon."""
    if shutil.which("qemu-storage-daemon") is None:
        raise Unavailable("qemu-storage-daemon is not installed")
    text = _run(["qemu-storage-daemon", "--help"])
    if "vhost-user-blk" not in text:
        raise Unavailable("this qemu-storage-daemon has no vhost-user-blk export")
    return _run(["qemu-storage-daemon", "--version"]).splitlines()[0].split("version ")[1]


def build_ours() -> str:
    """Which engine and versions of ours are measured."""
    program = (
        "import vhost_backend, virtqueue;"
        "print(f'vhost-backend {vhost_backend.__version__}, virtqueue {virtqueue.__version__},'"
        "f' {virtqueue.default_engine()} engine')"
    )
    return _run([sys.executable, "-c", program]).strip()


@contextlib.contextmanager
def started(backend: Backend, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """Run a back-end until the block ends."""
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            backend.command(place), stdout=subprocess.DEVNULL, stderr=errors, env=_environment()
        )
        try:
            _wait(process, place.socket, errors.fileno())
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            place.socket.unlink(missing_ok=True)


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONWARNINGS": "ignore"}


def _wait(process: subprocess.Popen[bytes], socket: Path, errors: int) -> None:
    end = time.monotonic() + LISTEN_SECONDS
    while not socket.exists():
        if process.poll() is not None:
            text = os.pread(errors, 65536, 0).decode(errors="replace").strip()
            raise Unavailable((text.splitlines() or [f"ended with {process.returncode}"])[-1])
        if time.monotonic() > end:
            raise Unavailable(f"did not listen within {LISTEN_SECONDS:g} s")
        time.sleep(0.005)
