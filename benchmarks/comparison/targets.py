"""The targets: bounds on the ratios of ours to a peer, one row of the summary each."""

from __future__ import annotations

from dataclasses import dataclass

from comparison.cases import DEPTHS


@dataclass(frozen=True)
class Check:
    """A bound on one figure: `ours` against the best peer whose name begins with `peers`.

    `case` is empty for the set-up time: all cases that set up alike give it.
    """

    case: str
    ours: str
    peers: str
    key: str
    factor: float


@dataclass(frozen=True)
class Row:
    """One line of the summary; with `most`, each check's factor is an upper bound."""

    work: str
    peer: str
    checks: tuple[Check, ...]
    most: bool = False


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
