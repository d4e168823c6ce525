"""The front-end's settings of one ring."""

from __future__ import annotations

from typing import Final

from guest_memory import DirtyLog
from virtqueue import InflightRegion, RingConfig

from ..errors import BackendUsageError
from ..features import VirtioFeature

_RING_PACKED: Final = int(VirtioFeature.RING_PACKED)
_EVENT_IDX: Final = int(VirtioFeature.EVENT_IDX)
_INDIRECT_DESC: Final = int(VirtioFeature.INDIRECT_DESC)
_IN_ORDER: Final = int(VirtioFeature.IN_ORDER)
_ACCESS_PLATFORM: Final = int(VirtioFeature.ACCESS_PLATFORM)


class RingSettings:
    """The settings of one ring. A reset replaces them by new ones.

    `size` is the number of descriptors (SET_VRING_NUM). `addresses` are those of the descriptor,
    driver (available) and device (used) area as the front-end sent them: user addresses, or IOVAs
    with ACCESS_PLATFORM. `base` is where to start, in SET_VRING_BASE's format. `enabled` is the
    last SET_VRING_ENABLE, also while the ring is stopped.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self.addresses: tuple[int, int, int] | None = None
        self.base: int = 0
        self.features: VirtioFeature = VirtioFeature(0)
        self.big_endian: bool = False
        self.enabled: bool = False
        #: The dirty log of guest memory.
        self.log: DirtyLog | None = None
        #: The guest address at which the used ring is logged, or None.
        self.log_used: int | None = None
        #: This ring's part of the in-flight region, when the front-end keeps one.
        self.inflight: InflightRegion | None = None

    def config(self, index: int, status_byte: bool) -> RingConfig:
        """The ring as it would be started now, as number `index`.

        Raises `BackendUsageError` without addresses.
        """
        if self.addresses is None:
            raise BackendUsageError(f"vring {index} has no addresses")
        features = int(self.features)  # numbers: flags would cost a microsecond each
        return RingConfig(
            size=self.size,
            descriptor_address=self.addresses[0],
            driver_address=self.addresses[1],
            device_address=self.addresses[2],
            packed=bool(features & _RING_PACKED),
            event_idx=bool(features & _EVENT_IDX),
            indirect=bool(features & _INDIRECT_DESC),
            in_order=bool(features & _IN_ORDER),
            iommu=bool(features & _ACCESS_PLATFORM),
            big_endian=self.big_endian,
            status_byte=status_byte,
            log_used=self.log_used,
        )
