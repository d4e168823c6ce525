"""How one ring is set up; the same value serves the device's side and the driver's."""

from typing import Final, NamedTuple

from .errors import UsageError
from .layout import MAX_QUEUE_SIZE, Features

_PACKED: Final = int(Features.PACKED)
_EVENT_IDX: Final = int(Features.EVENT_IDX)
_INDIRECT: Final = int(Features.INDIRECT)
_IN_ORDER: Final = int(Features.IN_ORDER)
_BIG_ENDIAN: Final = int(Features.BIG_ENDIAN)
_IOMMU: Final = int(Features.IOMMU)
_STATUS_BYTE: Final = int(Features.STATUS_BYTE)
_LOG_USED: Final = int(Features.LOG_USED)


class RingConfig(NamedTuple):
    """The negotiated shape of a ring and where its three parts are.

    Addresses are front-end user addresses as SET_VRING_ADDR brings them, or IOVAs with
    ``iommu``.  ``driver_address`` and ``device_address`` are the available and the used ring of
    a split ring, the driver's and the device's event suppression structure of a packed one.
    """

    size: int
    """Descriptors: 1 to 32768, for a split ring a power of two (virtio 2.6, 2.7, 2.8.10)."""
    descriptor_address: int
    driver_address: int
    device_address: int
    packed: bool = False
    """VIRTIO_F_RING_PACKED."""
    event_idx: bool = False
    """VIRTIO_F_EVENT_IDX."""
    indirect: bool = True
    """VIRTIO_F_INDIRECT_DESC."""
    in_order: bool = False
    """VIRTIO_F_IN_ORDER."""
    big_endian: bool = False
    """A legacy guest of the other byte order; split rings only."""
    iommu: bool = False
    """VIRTIO_F_ACCESS_PLATFORM."""
    status_byte: bool = False
    """Completion writes a status into the chain's last writable byte (blk, scsi, ...)."""
    log_used: int | None = None
    """Guest address (an IOVA with ``iommu``) for logging writes to the used ring
    (VHOST_VRING_F_LOG).  A packed ring is logged at its own address, whatever this says other than
    None."""

    @property
    def features(self) -> Features:
        """These settings as the engines' flags."""
        # Plain numbers: flags are slow to combine, and a ring's first request waits for this.
        return Features(
            _PACKED * self.packed
            | _EVENT_IDX * self.event_idx
            | _INDIRECT * self.indirect
            | _IN_ORDER * self.in_order
            | _BIG_ENDIAN * self.big_endian
            | _IOMMU * self.iommu
            | _STATUS_BYTE * self.status_byte
            | _LOG_USED * (self.log_used is not None)
        )

    def check(self) -> None:
        """Raise `UsageError` when no such ring can exist, or a part of it is not aligned
        (virtio 2.7, 2.8.10)."""
        self.check_shape()
        self._check_alignment()

    def check_shape(self) -> None:
        """Raise `UsageError` when no ring of this size and format can exist."""
        if not 1 <= self.size <= MAX_QUEUE_SIZE:
            raise UsageError(f"a ring has 1 to {MAX_QUEUE_SIZE} descriptors, not {self.size}")
        if not self.packed and self.size & (self.size - 1):
            raise UsageError(f"a split ring's size is a power of two, not {self.size}")
        if self.packed and self.big_endian:
            raise UsageError("a packed ring is always little-endian")

    def _check_alignment(self) -> None:
        for (_, alignment, _), address in zip(
            ring_parts(self.size, self.packed),
            (self.descriptor_address, self.driver_address, self.device_address),
            strict=True,
        ):
            if address % alignment:
                raise UsageError(f"ring part at {address:#x} is not aligned to {alignment}")


def ring_parts(size: int, packed: bool) -> tuple[tuple[str, int, int], ...]:
    """(name, alignment, bytes) of the descriptor, driver and device area (virtio 2.7, 2.8.10).

    The event index fields are always counted in: their two bytes may be read or written.
    """
    if packed:
        return (("descriptors", 16, 16 * size), ("driver", 4, 4), ("device", 4, 4))
    return (
        ("descriptors", 16, 16 * size),
        ("driver", 2, 6 + 2 * size),
        ("device", 4, 6 + 8 * size),
    )


class RingLayout(NamedTuple):
    """Offsets of a ring's parts from its start, and the bytes of all of it."""

    descriptor: int
    driver: int
    device: int
    size: int


def ring_layout(size: int, packed: bool = False) -> RingLayout:
    """Where the parts of a ring of ``size`` descriptors go when they are laid out in a row.

    The start has to be aligned to 16 bytes; so is the size that is returned.
    """
    offsets: list[int] = []
    end = 0
    for _, alignment, length in ring_parts(size, packed):
        end = -(-end // alignment) * alignment
        offsets.append(end)
        end += length
    return RingLayout(offsets[0], offsets[1], offsets[2], -(-end // 16) * 16)
