"""Every case: its load, its contestants, and where their threads run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Case:
    """One load and its contestants.

    `load` holds the load generator's options. `placement` says where driver and back-end run:
    "together" on one processor, "apart" on two, or "free" (docs/performance-decisions.md says why).
    One process serves all `devices`, and each device has a load generator of its own. `work` is the
    forwarding mode of a net device, "" for a block device.
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
        """Return the case with these contestants only."""
        return replace(self, contestants=tuple(n for n in self.contestants if n in names))


DEPTHS = (1, 32, 128)
NULL = ("rust-null", "null-records", "null-requests", "null-batch")
NULL_POLLING = ("rust-null", "null-records-poll", "null-batch-poll")
RUST_FILE = ("rust-file", "blk")
SHORT_FILE = ("rust-file", "qsd-threads", "blk")
READ_FILE = ("rust-file", "qsd-threads", "qsd-io_uring", "qsd-native", "blk")
# aio=native needs O_DIRECT: its writes would pass the page cache, the others' would not.
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
