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
NETLOAD = LOAD.with_name("netload")
PEERS = HERE / "peers" / "target" / "release"
LISTEN_SECONDS = 20.0


class Unavailable(Exception):
    """Something cannot be built or started here; the text says why."""


@dataclass(frozen=True)
class Place:
    """Where a back-end is to listen, what it serves, with how many queues, and on which CPUs.

    `driver` and `back_end` are the processors that the two may run on. `work` is what a net device
    does with packets.
    """

    sockets: tuple[Path, ...]
    image: Path
    queues: int = 1
    work: str = ""
    driver: frozenset[int] = frozenset()
    back_end: frozenset[int] = frozenset()

    @property
    def socket(self) -> Path:
        """Where the (first) device listens."""
        return self.sockets[0]


@contextlib.contextmanager
def confined(cpus: frozenset[int]) -> Iterator[None]:
    """Processes that are started meanwhile run on those processors only; none: where they like."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


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
        base = [str(PEERS / "device"), f"--queues={place.queues}"]
        base += [f"--socket={socket}" for socket in place.sockets]
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
        base = [sys.executable, program, f"--style={style}", f"--queues={place.queues}"]
        base += [f"--socket-path={socket}" for socket in place.sockets]
        return [*base, *options]

    return command


def _blk(*options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        base = [sys.executable, "-m", "vhost_backend", "blk", f"--socket-path={place.socket}"]
        return [*base, f"--blk-file={place.image}", f"--num-queues={place.queues}", *options]

    return command


def _net(style: str, *options: str) -> Callable[[Place], list[str]]:
    def command(place: Place) -> list[str]:
        program = str(HERE / "devices" / "net.py")
        base = [sys.executable, program, f"--style={style}", f"--work={place.work}"]
        pairs = f"--pairs={place.queues}"
        return [*base, pairs, f"--socket-path={place.socket}", *options]

    return command


def _testpmd(place: Place) -> list[str]:
    """Poll-mode forwarding: one thread that is given a processor of its own."""
    mode = {"echo": "io", "sink": "rxonly", "source": "txonly"}[place.work]
    if not place.back_end or place.back_end == place.driver:
        raise Unavailable("testpmd needs a processor of its own")
    main, worker = min(place.driver), min(place.back_end)
    return [
        *("dpdk-testpmd", "--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--no-shconf"),
        *("-l", f"{main},{worker}", f"--main-lcore={main}"),
        *("--vdev", f"net_vhost0,iface={place.socket},queues={place.queues}"),
        *("--", f"--forward-mode={mode}", "--auto-start", "--port-topology=loop"),
        *("--nb-cores=1", f"--rxq={place.queues}", f"--txq={place.queues}"),
        *("--total-num-mbufs=16384", "--txpkts=60"),
    ]


# So long our back-ends look at an empty ring before they sleep, where they are told to.
BUSY_POLL_US = 50
# A poll-mode driver never sleeps; beside one ours does not either.
ALWAYS_POLL_US = 10_000_000
POLL = f"--busy-poll={BUSY_POLL_US}"
ALWAYS = f"--busy-poll={ALWAYS_POLL_US}"

BACKENDS = {
    backend.name: backend
    for backend in (
        Backend("rust-null", "Rust vhost-user-backend, null device", False, "rust", _rust()),
        Backend("null-records", "ours, Python per request, records", True, "", _null("records")),
        Backend("null-requests", "ours, handle(queue, request)", True, "", _null("requests")),
        Backend("null-batch", "ours, batches in C", True, "", _null("batch")),
        Backend("null-records-poll", "ours, records, busy-poll", True, "", _null("records", POLL)),
        Backend("null-batch-poll", "ours, batches in C, busy-poll", True, "", _null("batch", POLL)),
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
        Backend("blk-poll", "ours, vhost-backend blk, busy-poll", True, "", _blk(POLL)),
        Backend("testpmd", "dpdk-testpmd, net_vhost (polls)", False, "dpdk", _testpmd),
        Backend("net-records", "ours, Python per packet, records", True, "", _net("records")),
        Backend("net-batch", "ours, numpy over the batch", True, "", _net("batch")),
        Backend("net-records-poll", "ours, records, polls", True, "", _net("records", ALWAYS)),
        Backend("net-batch-poll", "ours, numpy, polls", True, "", _net("batch", ALWAYS)),
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


def find_dpdk() -> str:
    """The version of testpmd and its vhost driver."""
    if shutil.which("dpdk-testpmd") is None:
        raise Unavailable("dpdk-testpmd is not installed (Debian: dpdk-dev, librte-net-vhost23)")
    if len(os.sched_getaffinity(0)) < 2:
        raise Unavailable("testpmd polls and needs a processor of its own")
    program = ["dpdk-testpmd", "--no-huge", "--no-pci", "--no-shconf", "-m", "64", "-v", "-h"]
    done = subprocess.run(program, capture_output=True, text=True)
    found = re.search(r"RTE Version: '(.*)'", done.stdout + done.stderr)
    return found[1] if found else "of an unknown version"


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
    command = backend.command(place)
    # testpmd puts its threads in their places itself, and runs until its input ends.
    cpus = frozenset() if backend.needs == "dpdk" else place.back_end
    with tempfile.TemporaryFile() as errors:
        with confined(cpus):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env=_environment(),
            )
        try:
            for socket in place.sockets:
                _wait(process, socket, errors.fileno())
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
            for socket in place.sockets:
                socket.unlink(missing_ok=True)


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
