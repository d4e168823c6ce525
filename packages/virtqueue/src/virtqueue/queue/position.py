"""The position of a ring: as SET_VRING_BASE brings it, and saved whole."""

from typing import NamedTuple

from ..config import RingConfig
from ..errors import UsageError
from ..layout import QueueBlock


class RingState(NamedTuple):
    """The position of a drained ring, to be saved and restored."""

    next_avail: int
    next_used: int
    avail_wrap: int
    used_wrap: int
    signalled_used: int
    signalled_valid: int


def set_position(
    block: QueueBlock, config: RingConfig, base: int | None, state: RingState | None
) -> None:
    """Begin at a saved position, or at ``base`` as in `DeviceQueue`; raises `UsageError`."""
    size = config.size
    if state is not None:
        (
            block.next_avail,
            block.next_used,
            block.avail_wrap,
            block.used_wrap,
            block.signalled_used,
            block.signalled_valid,
        ) = state
    elif config.packed:
        base = 0x8000_8000 if base is None else base
        if not base >> 16:
            base |= base << 16
        block.next_avail, block.avail_wrap = base & 0x7FFF, base >> 15 & 1
        block.next_used, block.used_wrap = base >> 16 & 0x7FFF, base >> 31 & 1
    else:
        block.next_avail = (base or 0) & 0xFFFF
        block.next_used = block.next_avail
    if config.packed and max(block.next_avail, block.next_used) >= size:
        raise UsageError(f"base {base!r} lies outside of a ring of {size}")


def position_base(block: QueueBlock, packed: bool) -> int:
    """The position as GET_VRING_BASE wants it; `DeviceQueue` has the encoding."""
    if not packed:
        return block.next_avail
    avail = block.next_avail | block.avail_wrap << 15
    return avail | (block.next_used | block.used_wrap << 15) << 16


def saved_position(block: QueueBlock) -> RingState:
    """The position of a ring in which nothing is in flight; raises `UsageError` otherwise."""
    if block.in_flight or block.resubmit:
        raise UsageError(
            f"no position to save: {block.in_flight + block.resubmit} chains are in flight"
        )
    return RingState(
        block.next_avail,
        block.next_used,
        block.avail_wrap,
        block.used_wrap,
        block.signalled_used,
        block.signalled_valid,
    )
