"""A guest with several disks, each behind a back-end of its own: what most guest tests share."""

from __future__ import annotations

import contextlib
import hashlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from .assets import Assets, Qemu
from .back_ends import BackEnd
from .guest import BOOT_LIMIT, Guest, GuestError, GuestTimeout, VhostUserDisk

MIB = 1 << 20

# What a kernel says when a disk or a ring has let it down.
_COMPLAINTS = "I/O error|is not a head|BUG|WARNING|Oops|hung task|virtqueue|lost async"


@dataclass
class Disk:
    """One disk of a bed, seen from both sides.

    `size` is in bytes, `content` what the image starts with (the rest reads as zeroes), `options`
    are properties of the QEMU device; `node` is the guest's device file once it has booted.
    """

    name: str
    size: int
    num_queues: int = 1
    read_only: bool = False
    serial: str | None = None
    content: bytes = b""
    reconnect: int = 0
    options: dict[str, str] = field(default_factory=dict)
    node: str = ""
    back_end: BackEnd = field(init=False, repr=False)

    @property
    def image(self) -> Path:
        return self.back_end.image

    @property
    def block(self) -> str:
        """The guest's folder of facts about the disk."""
        return f"/sys/block/{self.node.removeprefix('/dev/')}"

    def host_sha256(self, offset: int = 0, length: int | None = None) -> str:
        """The digest of a byte range as the host sees it in the image file."""
        return hashlib.sha256(self.host_bytes(offset, length)).hexdigest()

    def host_bytes(self, offset: int = 0, length: int | None = None) -> bytes:
        """A byte range of the image file."""
        with self.image.open("rb") as file:
            file.seek(offset)
            return file.read(self.size - offset if length is None else length)


class Bed:
    """Back-ends for some disks and a guest that has them all, in the order of their PCI slots.

    `kind` says which back-end (see BackEnd). As a context manager it starts everything, boots the
    guest, and ends everything.
    """

    FIRST_SLOT = 5

    def __init__(
        self,
        assets: Assets,
        qemu: Qemu,
        initramfs: Path,
        folder: Path,
        kind: str,
        disks: list[Disk],
    ) -> None:
        self.assets = assets
        self.qemu = qemu
        self.initramfs = initramfs
        self.folder = folder
        self.kind = kind
        self.disks = {disk.name: disk for disk in disks}
        self.guest: Guest
        self._stack = contextlib.ExitStack()
        self._complaints = 0

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            for disk in self.disks.values():
                image = self.folder / f"{disk.name}.img"
                with image.open("wb") as file:
                    file.write(disk.content)
                    file.truncate(disk.size)
                disk.back_end = BackEnd(
                    self.kind,
                    image,
                    self.folder,
                    read_only=disk.read_only,
                    num_queues=disk.num_queues,
                    serial=disk.serial,
                )
                stack.enter_context(disk.back_end)
            self._new_guest(stack)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stack.__exit__(kind, error, trace)

    def __getitem__(self, name: str) -> Disk:
        return self.disks[name]

    def replace_guest(self) -> None:
        """Boot another guest under a new QEMU, against the same back-end processes."""
        self._new_guest(self._stack)

    def reboot(self) -> None:
        """Reboot the guest from inside."""
        self._boot(self.guest.start_reboot())

    def host_sha256(self, name: str, offset: int = 0, length: int | None = None) -> str:
        return self.disks[name].host_sha256(offset, length)

    def complaints(self) -> list[str]:
        """What the guest's kernel has complained about since the last call."""
        said = self.guest.run(f"dmesg | grep -E '{_COMPLAINTS}'").output.splitlines()
        new = said[self._complaints :]
        self._complaints = len(said)
        return new

    def describe(self) -> str:
        """Consoles and logs of all processes, for the report of a failing test."""
        logs = [
            f"--- back-end of {disk.name}\n{disk.back_end.tail()}" for disk in self.disks.values()
        ]
        return "\n".join([self.guest.describe(), *logs])

    def _new_guest(self, stack: contextlib.ExitStack) -> None:
        attached = [
            VhostUserDisk(
                socket=disk.back_end.socket,
                slot=slot,
                num_queues=disk.num_queues,
                reconnect=disk.reconnect,
                options=disk.options,
            )
            for slot, disk in enumerate(self.disks.values(), self.FIRST_SLOT)
        ]
        self.guest = stack.enter_context(
            Guest(self.assets, self.qemu, self.initramfs, self.folder, disks=attached)
        )
        self._boot()

    def _boot(self, boots: int = 1) -> None:
        """Wait for the guest, but not for one whose disk will never answer."""
        deadline = time.monotonic() + BOOT_LIMIT
        while True:
            try:
                self.guest.boot(1, boots=boots)
            except GuestTimeout:
                dead = [disk for disk in self.disks.values() if not disk.back_end.running]
                if dead:
                    raise GuestError(f"a back-end has ended\n{self.describe()}") from None
                if time.monotonic() > deadline:
                    raise
            else:
                break
        self._complaints = 0
        self._find_disks()

    def _find_disks(self) -> None:
        for slot, disk in enumerate(self.disks.values(), self.FIRST_SLOT):
            folder = f"/sys/bus/pci/devices/0000:00:{slot:02x}.0/virtio*/block"
            disk.node = f"/dev/{self.guest.check(f'ls {folder}')}"


def random_bytes(length: int, seed: int) -> bytes:
    """Bytes that compress badly and are the same in every run."""
    return random.Random(seed).randbytes(length)
