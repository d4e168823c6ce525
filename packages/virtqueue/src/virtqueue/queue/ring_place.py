"""Where a queue's ring lies: its three parts in host memory, and the addresses it is logged at."""

import ctypes
from itertools import pairwise
from typing import NamedTuple

from ..config import RingConfig, ring_parts
from ..errors import Need, QueueBroken
from ..layout import QueueBlock, Reason
from ..memory import access
from ..memory.placement import PAGE, Placement, log_pages
from ..memory.table import READ, WRITE, Broken, Memory, Missing, Piece, Table
from .provisions import Provisions


class _Trouble(NamedTuple):
    """Why the ring was not found in memory: facts, as an error would keep the memory mapped.

    The errors that raise them again go through frames that hold the snapshot.
    """

    reason: Reason | None
    """None: memory is missing, ``access`` to ``length`` bytes at ``address``."""
    address: int
    length: int = 0
    access: int = 0


class RingPlace:
    """Finds a ring's parts in each snapshot and enters their host addresses in the block.

    ``used_known`` says that the block's position is whole; otherwise the used ring tells where the
    device before us stopped, when it is first found.
    """

    def __init__(self, block: QueueBlock, provisions: Provisions, used_known: bool) -> None:
        self._block = block
        self._provisions = provisions
        self._used_known = used_known
        self._placed: list[Placement] = []
        self._log_pages: ctypes.Array[ctypes.c_uint64] | None = None
        self._trouble: _Trouble | None = None
        self.memory: Memory | None = None
        """The snapshot that the ring was found in."""

    @property
    def lost(self) -> bool:
        """Whether the last search did not find the ring; `check` says why."""
        return self._trouble is not None

    def find(self, table: Table, config: RingConfig) -> list[Placement]:
        """Look for the ring in a snapshot.

        A ring that was found before stays where it was: completions still go where the driver
        looks.  Returns what was mapped for the old place, to be kept until the engine knows the new
        one.
        """
        block = self._block
        placed: list[Placement] = []
        self._trouble = None
        try:
            for (name, _, length), address, before in zip(
                ring_parts(config.size, config.packed),
                (config.descriptor_address, config.driver_address, config.device_address),
                self._placed or (None, None, None),
                strict=True,
            ):
                written = name == "device" or (config.packed and name == "descriptors")
                wanted = READ | WRITE if written else READ
                pieces = self._pieces(table, config, address, length, wanted)
                placed.append(Placement(pieces, before))
            hosts = [part.host for part in placed]
            if any(host % 4 for host in hosts[::2]) or hosts[1] % 2 or hosts[0] % 16:
                raise Broken(Reason.RING_MEMORY, hosts[0])
        except Missing as error:
            self._trouble = _Trouble(None, error.address, error.length, error.access)
        except Broken as error:
            self._trouble = _Trouble(error.reason, error.detail)
        else:
            block.descriptors, block.driver, block.device = hosts
            self._placed, placed = placed, self._placed
            self.memory = table.memory
        self._place_log(table, config)
        if not self._used_known and block.descriptors:
            self._load_used(table, config)
        return placed

    def _pieces(
        self, table: Table, config: RingConfig, address: int, length: int, wanted: int
    ) -> list[Piece]:
        return table.ring_pieces(address, length, wanted, config.iommu, self._provisions.entries)

    def _load_used(self, table: Table, config: RingConfig) -> None:
        """The used ring itself says where the device before us stopped."""
        block = self._block
        try:
            index = access.words16(table, block.device + 2, 1, config.big_endian)[0]
            offered = access.words16(table, block.driver + 2, 1, config.big_endian)[0]
        except Broken as error:
            self._trouble = _Trouble(error.reason, error.detail)
            return
        block.next_used = block.signalled_used = index
        self._used_known = True
        # DPDK's virtio-user goes on in its ring though it tells a dead device's successor base 0: a
        # base that is further behind than the ring is long cannot be meant.
        size = config.size
        if (offered - block.next_avail) & 0xFFFF > size >= (offered - index) & 0xFFFF:
            block.next_avail = index

    def _place_log(self, table: Table, config: RingConfig) -> None:
        """The guest address at which writes to the ring are logged.

        For a packed ring it is where the ring is: front-ends send the address of the device's
        event structure there (QEMU does), and pages of the ring would not be copied. Behind an
        IOMMU what they send is an IOVA (of the used ring itself, by QEMU).
        """
        block = self._block
        block.log_pages = 0
        block.log_used = config.log_used or 0
        if config.log_used is None or not (config.packed or config.iommu):
            return
        (_, _, descriptors), _, (_, _, used) = ring_parts(config.size, config.packed)
        address, length = config.log_used, used
        if config.packed:
            address, length = config.descriptor_address, descriptors
        try:
            pieces = self._pieces(table, config, address, length, READ)
        except (Missing, Broken):
            # What is written until it means something again is where the ring was.
            if not self._placed:
                return
            pieces = self._placed[0 if config.packed else 2].pieces
        block.log_used = pieces[0].guest
        if _contiguous(pieces):
            return
        pages = log_pages(pieces)
        if pages is not None:
            self._log_pages = (ctypes.c_uint64 * len(pages))(*pages)
            block.log_pages = ctypes.addressof(self._log_pages)
            block.log_used = pieces[0].guest % PAGE

    def check(self) -> None:
        """Raise `Need` or `QueueBroken` when the last search did not find the ring."""
        trouble = self._trouble
        if trouble is None:
            return
        if trouble.reason is None:
            raise Need(trouble.address, trouble.length, trouble.access)
        truncated = trouble.reason is Reason.TRUNCATED
        raise QueueBroken(Reason.TRUNCATED if truncated else Reason.RING_MEMORY, trouble.address)


def _contiguous(pieces: list[Piece]) -> bool:
    """Whether they follow each other in the guest's memory."""
    return all(
        piece.guest + piece.length == following.guest for piece, following in pairwise(pieces)
    )
