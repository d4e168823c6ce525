"""What is measured: cases, who takes part in them, and the rows of targets that they answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One load and who takes part.

    `load` are the generator's options. `placement` says where the driver's and the back-end's
    threads may run, the same for every contestant: "together" on one processor, "apart" on two, or
    "free" (see performance.md). With `devices` above 1 one process serves them all, each with a
    load generator of its own. `work` is what a net device does.
    """

    name: str
    group: str
    load: tuple[str, ...]
    contestants: tuple[str, ...]
    queues: int = 1
    devices: int = 1
    placement: str = "free"
    work: str = ""
    short: bool = False

    def only(self, names: set[str]) -> Case:
        """The case with those contestants."""
        return replace(self, contestants=tuple(n for n in self.contestants if n in names))


@dataclass(frozen=True)
class Check:
    """One figure of one of ours in a case, against the best of `peers` (prefixes of names).

    The time to set up is taken from all cases that set up alike.
    """

    case: str
    ours: str
    peers: str
    key: str
    factor: float


@dataclass(frozen=True)
class Row:
    """A line of the summary: a bound on each of its checks' ratios, at least or at most."""

    work: str
    peer: str
    checks: tuple[Check, ...]
    most: bool = False


DEPTHS = (1, 32, 128)
NULL = ("rust-null", "null-records", "null-requests", "null-batch")
NULL_POLLING = ("rust-null", "null-records-poll", "null-batch-poll")
RUST_FILE = ("rust-file", "blk")
SHORT_FILE = ("rust-file", "qsd-threads", "blk")
READ_FILE = ("rust-file", "qsd-threads", "qsd-io_uring", "qsd-native", "blk")
# aio=native needs O_DIRECT, which does not mean the same for writes to the page cache.
WRITE_FILE = ("rust-file", "qsd-threads", "qsd-io_uring", "blk")
NET = ("testpmd", "net-records", "net-batch")


def _null() -> Iterator[Case]:
    for depth in DEPTHS:
        load: tuple[str, ...] = (f"--depth={depth}",)
        yield Case(f"null, depth {depth}", "null", load, NULL, placement="together", short=True)
    for depth in DEPTHS:
        load = (f"--depth={depth}",)
        name = f"null, depth {depth}, two processors"
        yield Case(name, "null apart", load, NULL, placement="apart")
    for depth in DEPTHS:
        load = (f"--depth={depth}",)
        name = f"null, depth {depth}, busy-poll"
        short = depth == 32
        yield Case(name, "busy-poll", load, NULL_POLLING, placement="apart", short=short)
    names = (*NULL, *NULL_POLLING[1:])
    name = "null, depth 1, driver polls"
    yield Case(name, "busy-poll", ("--poll",), names, placement="apart")
    load = ("--depth=32", "--packed")
    yield Case("null, depth 32, packed", "null", load, NULL[1:], placement="together")
    load = ("--depth=32", "--indirect")
    yield Case("null, depth 32, indirect", "null", load, NULL, placement="together")


def _file() -> Iterator[Case]:
    for depth in DEPTHS:
        load: tuple[str, ...] = (f"--depth={depth}",)
        yield Case(f"4 KiB random read, depth {depth}", "file", load, READ_FILE, short=True)
    for depth in DEPTHS:
        load = (f"--depth={depth}", "--write-percent=100")
        yield Case(f"4 KiB random write, depth {depth}", "file", load, WRITE_FILE)
    for depth in DEPTHS:
        load = (f"--depth={depth}",)
        name = f"4 KiB random read, depth {depth}, two queues"
        yield Case(name, "file", load, READ_FILE, queues=2)
    contestants: tuple[str, ...] = (*SHORT_FILE, "blk-poll")
    name = "4 KiB random read, depth 1, driver polls"
    yield Case(name, "busy-poll", ("--poll",), contestants, placement="apart")
    name = "4 KiB random read, depth 32, busy-poll"
    contestants = ("rust-file", "blk", "blk-poll")
    yield Case(name, "busy-poll", ("--depth=32",), contestants, placement="apart")


def _scale() -> Iterator[Case]:
    for devices in (1, 4, 16, 64):
        load: tuple[str, ...] = ("--depth=8",)
        names: tuple[str, ...] = ("rust-null", "null-records", "null-batch")
        yield Case(f"devices: {devices}", "devices", load, names, devices=devices)
    for queues in (1, 2, 4, 8):
        load = ("--depth=32",)
        names = (*RUST_FILE, "rust-null", "null-records", "null-batch")
        yield Case(f"queues: {queues}", "queues", load, names, queues=queues)
    for regions in (2, 8, 64, 509):
        load = ("--depth=32", f"--regions={regions}")
        names = ("rust-null", "null-records", "null-batch", "rust-file", "blk")
        yield Case(f"regions: {regions}", "regions", load, names)
    for kib in (4, 16, 64, 256, 1024):
        load = ("--depth=8", f"--block={kib * 1024}")
        names = ("rust-file", "qsd-io_uring", "blk")
        yield Case(f"request: {kib} KiB", "size", load, names)


def _net() -> Iterator[Case]:
    for depth in DEPTHS:
        load: tuple[str, ...] = (f"--depth={depth}",)
        name, short = f"net echo, depth {depth}", depth == 32
        yield Case(name, "net", load, NET, placement="apart", work="echo", short=short)
    polled = ("testpmd", "net-records-poll", "net-batch-poll")
    for depth in DEPTHS:
        load = (f"--depth={depth}", "--poll")
        name = f"net echo, depth {depth}, both poll"
        yield Case(name, "net", load, polled, placement="apart", work="echo")
    load = ("--depth=32", "--packet=1514", "--mergeable")
    name = "net echo, depth 32, 1514 bytes, mergeable"
    yield Case(name, "net", load, NET, placement="apart", work="echo")
    for work in ("sink", "source"):
        load = ("--depth=128",)
        yield Case(f"net {work}, depth 128", "net", load, NET, placement="apart", work=work)


CASES = (*_null(), *_file(), *_net(), *_scale())


def _over_depths(
    case: str, ours: str, peers: str, factors: tuple[float, float, float]
) -> tuple[Check, ...]:
    pairs = zip(DEPTHS, factors, strict=True)
    return tuple(Check(case.format(depth), ours, peers, "rate", factor) for depth, factor in pairs)


def _null_row(what: str, ours: str, factors: tuple[float, float, float]) -> Row:
    checks = _over_depths("null, depth {}", ours, "rust-null", factors)
    return Row(f"null device, {what}: depth 1 / 32 / 128", "Rust null device", checks)


def _file_row(what: str, case: str, peers: str, factors: tuple[float, float, float]) -> Row:
    peer = {"qsd": "qemu-storage-daemon, best aio", "rust-file": "Rust preadv/pwritev"}[peers]
    return Row(
        f"file, 4 KiB {what}: depth 1 / 32 / 128", peer, _over_depths(case, "blk", peers, factors)
    )


READ, WRITE = "4 KiB random read, depth {}", "4 KiB random write, depth {}"
TWO = READ + ", two queues"
POLLED_NULL = "null, depth 1, driver polls"
POLLED_FILE = "4 KiB random read, depth 1, driver polls"
ROWS = (
    _null_row("Python per request, records", "null-records", (0.9, 1.0, 1.0)),
    _null_row("handle(queue, request)", "null-requests", (0.85, 0.4, 0.3)),
    _null_row("batches in C, both sleep", "null-batch", (1.0, 1.2, 2.0)),
    Row(
        "null device, batches in C, our busy-poll on: depth 1 / 32 / 128",
        "Rust null device",
        _over_depths("null, depth {}, busy-poll", "null-batch-poll", "rust-null", (2.0, 2.5, 3.0)),
    ),
    _file_row("random read", READ, "qsd", (2.0, 3.0, 3.0)),
    _file_row("random read", READ, "rust-file", (1.0, 1.2, 1.2)),
    _file_row("random write", WRITE, "rust-file", (1.0, 1.2, 1.2)),
    _file_row("random read, two queues", TWO, "rust-file", (1.0, 1.2, 1.2)),
    Row(
        "p99 at depth 1, sleeping: null records / handle / C, file read",
        "best peer",
        (
            *(
                Check("null, depth 1", name, "", "p99_ns", 1.2)
                for name in ("null-records", "null-requests", "null-batch")
            ),
            Check(READ.format(1), "blk", "", "p99_ns", 1.2),
        ),
        most=True,
    ),
    Row(
        "p99 at depth 1, driver and back-end poll: null records / C, file read",
        "best peer",
        (
            Check(POLLED_NULL, "null-records-poll", "", "p99_ns", 1.2),
            Check(POLLED_NULL, "null-batch-poll", "", "p99_ns", 1.2),
            Check(POLLED_FILE, "blk-poll", "", "p99_ns", 1.2),
        ),
        most=True,
    ),
    Row(
        "CPU time per I/O, depth 32: file read / write",
        "best peer",
        (
            Check(READ.format(32), "blk", "", "cpu_ns_per_request", 1.0),
            Check(WRITE.format(32), "blk", "", "cpu_ns_per_request", 1.0),
        ),
        most=True,
    ),
    Row(
        "connect to first request: null in C / file",
        "Rust",
        (
            Check("", "null-batch", "rust-null", "setup_us", 3.0),
            Check("", "blk", "rust-file", "setup_us", 3.0),
        ),
        most=True,
    ),
)
