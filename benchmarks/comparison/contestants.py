"""Every contestant: what it is, what it needs, and the command that starts it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from comparison.builds import BENCHMARKS, PEERS, Unavailable


@dataclass(frozen=True)
class Place:
    """One turn's sockets, image, queues and processors.

    `driver` and `back_end` are the processors of each side, empty for any. `work` is the forwarding
    mode of a net device, "" for a block device.
    """

    sockets: tuple[Path, ...]
    image: Path
    queues: int = 1
    work: str = ""
    driver: frozenset[int] = frozenset()
    back_end: frozenset[int] = frozenset()

    @property
    def socket(self) -> Path:
        """The socket of the first device."""
        return self.sockets[0]


@dataclass(frozen=True)
class Backend:
    """One contestant: `ours` marks this project's, `needs` names the peer to build or find."""

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
        program = str(BENCHMARKS / "devices" / "null.py")
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
        program = str(BENCHMARKS / "devices" / "net.py")
        base = [sys.executable, program, f"--style={style}", f"--work={place.work}"]
        pairs = f"--pairs={place.queues}"
        return [*base, pairs, f"--socket-path={place.socket}", *options]

    return command


def _testpmd(place: Place) -> list[str]:
    """Forward in poll mode: one thread with a processor of its own."""
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


# How long a busy-polling back-end of ours looks at an empty ring before it sleeps.
BUSY_POLL_US = 50
# Beside a poll-mode driver, which never sleeps, ours never sleeps either.
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
