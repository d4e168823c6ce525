"""`vhost-backend blk`: a disk, by the specification's "Backend program conventions"."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import TYPE_CHECKING

from ..errors import VhostBackendError
from .engine import chosen_engine

if TYPE_CHECKING:
    # Only parsing needs it: `main` drops it again before the daemon starts.
    import argparse

    from guest_memory import Mapper

    from ..devices import BlockDevice

DESCRIPTION = "Serve a file or block device as a virtio disk, in the foreground, until SIGTERM."
EPILOG = """\
attach it to QEMU (guest memory must be shared):
  qemu-system-x86_64 -m 1G \\
    -object memory-backend-memfd,id=mem,size=1G,share=on -machine q35,memory-backend=mem \\
    -chardev socket,id=disk,path=PATH,reconnect=1 \\
    -device vhost-user-blk-pci,chardev=disk,num-queues=N

With reconnect=1 (newer QEMU: reconnect-ms=1000) the guest goes on after this program was started
anew. One disk serves one guest at a time; no other program may use its image meanwhile.

SIGUSR1 prints the counters of each queue; VIRTQUEUE_ENGINE=c|python chooses the ring engine.
"""

MAX_QUEUES = 64
MAX_PROCESSOR = (1 << 16) - 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's options."""
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--socket-path", metavar="PATH", help="Unix socket to listen on")
    where.add_argument(
        "--fd", type=_fd, metavar="N", help="inherited descriptor: a connected or listening socket"
    )
    parser.add_argument(
        "--blk-file",
        type=_image,
        metavar="IMG",
        required=True,
        help="block device or raw image",
    )
    parser.add_argument("--read-only", action="store_true", help="refuse every change")
    parser.add_argument(
        "--num-queues", type=_queues, default=1, metavar="N", help=f"1 to {MAX_QUEUES} (default 1)"
    )
    parser.add_argument(
        "--serial", default="", metavar="S", help="serial number, 20 ASCII bytes at most"
    )
    parser.add_argument(
        "--direct",
        action="store_true",
        help="bypass the page cache (O_DIRECT), with an io_uring where the kernel permits one",
    )
    parser.add_argument(
        "--locking",
        choices=("auto", "on", "off"),
        default="auto",
        help="lock the image while a guest uses it, with flock and as QEMU does: auto (default, "
        "where the file system has locks), on (fail where it has none) or off",
    )
    parser.add_argument(
        "--busy-poll",
        type=_microseconds,
        default=0.0,
        metavar="US",
        help="look at the rings for up to US microseconds before sleeping (default 0); this saves "
        "wake-ups, but keeps a processor busy for each queue that has work",
    )
    parser.add_argument(
        "--cpus",
        type=_cpus,
        default=(),
        metavar="LIST",
        help="processors for the queues' threads, in turn, such as 2,3 or 0-3",
    )
    parser.add_argument(
        "--no-mem-slots",
        action="store_true",
        help="offer postcopy migration instead of memory slots; the protocol forbids both",
    )
    parser.add_argument(
        "--xen", action="store_true", help="map memory for a Xen front-end; needs [xen]"
    )
    parser.add_argument(
        "--metrics",
        type=_metrics,
        metavar="WHERE",
        help="serve counters to Prometheus on unix:PATH or HOST:PORT (loopback); needs [metrics]",
    )
    parser.add_argument(
        "--print-capabilities", action="store_true", help="print capabilities as JSON and exit"
    )


def run(options: SimpleNamespace) -> int:
    """Serve until a signal."""
    # Imported only now: --help needs none of it.
    from ..daemon.serve import serve
    from ..devices import BlockDevice
    from ..fds.listener import Listener
    from .main import say

    engine = chosen_engine()
    mapper = _xen_mapper(options.no_mem_slots) if options.xen else None
    # The image before the socket: a front-end must not find a socket without a disk.
    device = BlockDevice(
        options.blk_file,
        read_only=options.read_only,
        num_queues=options.num_queues,
        serial=options.serial,
        direct=options.direct,
        locking=options.locking,
    )
    where = options.socket_path if options.fd is None else Listener.from_fd(options.fd)

    def announce() -> None:
        say(_describe(device, engine, options))

    serve(
        device,
        where,
        engine=engine,
        mapper=mapper,
        memory_slots=not options.no_mem_slots,
        metrics=options.metrics,
        busy_poll=options.busy_poll,
        cpus=options.cpus,
        ready=announce,
    )
    return 0


def _xen_mapper(postcopy: bool) -> Mapper:
    if postcopy:
        raise VhostBackendError("--xen and --no-mem-slots: there is no postcopy migration on Xen")
    from guest_memory import MmapMapper
    from virtqueue import SigbusGuard

    try:
        from vhost_xen import XenMapper, XenUnavailable, check_devices
    except ImportError:
        raise VhostBackendError(
            "--xen needs vhost-xen, the [xen] extra; in a clone: "
            "pip install ./packages/guest-memory ./packages/vhost-xen"
        ) from None
    try:
        check_devices()
    except XenUnavailable as error:
        raise VhostBackendError(f"--xen: {error}") from None
    mapper: Mapper = XenMapper(files=MmapMapper(guarded=SigbusGuard.available()))
    return mapper


def _describe(device: BlockDevice, engine: str, options: SimpleNamespace) -> str:
    from ..devices.blk import SECTOR

    where = options.socket_path if options.fd is None else f"descriptor {options.fd}"
    access = "read-only" if device.read_only else "read-write"
    queues = "1 queue" if device.num_queues == 1 else f"{device.num_queues} queues"
    return (
        f"serving {device.path} ({device.capacity * SECTOR / 2**20:g} MiB, {access}, {queues}, "
        f"engine {engine}) on {where}"
    )


def _queues(text: str) -> int:
    from argparse import ArgumentTypeError

    number = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= number <= MAX_QUEUES:
        raise ArgumentTypeError(f"{text!r} is not a number from 1 to {MAX_QUEUES}")
    return number


def _microseconds(text: str) -> float:
    from argparse import ArgumentTypeError

    number = int(text) if text.isascii() and text.isdigit() else -1
    if not 0 <= number < 1_000_000:
        raise ArgumentTypeError(f"{text!r} is not a number from 0 to 999999")
    return number / 1e6


def _cpus(text: str) -> tuple[int, ...]:
    from argparse import ArgumentTypeError

    processors: list[int] = []
    for part in text.split(","):
        first, dash, last = part.partition("-")
        if not dash:
            last = first
        if not all(word.isascii() and word.isdigit() for word in (first, last)):
            raise ArgumentTypeError(f"{text!r} is not a list of processors such as 2,3 or 0-3")
        if not int(first) <= int(last) <= MAX_PROCESSOR:
            raise ArgumentTypeError(f"{part!r} is no range from 0 to {MAX_PROCESSOR}")
        processors += range(int(first), int(last) + 1)
    return tuple(processors)


def _image(text: str) -> str:
    from argparse import ArgumentTypeError

    if not text:
        raise ArgumentTypeError("the path of an image is empty")
    return text


def _metrics(text: str) -> str:
    from argparse import ArgumentTypeError

    _, colon, port = text.rpartition(":")
    named = text.startswith("unix:") and text != "unix:"
    if not named and not (colon and port.isascii() and port.isdigit() and int(port) <= 65535):
        raise ArgumentTypeError(f"{text!r} is neither unix:PATH nor HOST:PORT")
    return text


def _fd(text: str) -> int:
    from argparse import ArgumentTypeError

    try:
        number = int(text)
        os.fstat(number)
    except (ValueError, OverflowError):
        raise ArgumentTypeError(f"{text!r} is not a descriptor number") from None
    except OSError:
        raise ArgumentTypeError(f"descriptor {text} is not open") from None
    return number
