"""What a driver remembers of the chains that the device has."""

from __future__ import annotations

from typing import NamedTuple

from ..errors import QueueBroken
from ..layout import Reason


class Offered(NamedTuple):
    """A chain that the device has."""

    identity: int
    slots: tuple[int, ...]
    """Split: its descriptors of the table; packed: one element a slot of the ring."""
    writable: int


def take_used(
    offered: dict[int, Offered], head: int, written: int, in_order: bool
) -> list[tuple[Offered, int]]:
    """Take the chains that one used entry stands for out of `offered`, with the bytes of each.

    With IN_ORDER the entry stands for all chains that were offered before it, too; their writable
    bytes count as written.  Raises `QueueBroken` for a chain that the device does not have.
    """
    chain = offered.get(head)
    if chain is None or written > chain.writable:
        raise QueueBroken(Reason.USED_RING, head)
    used = []
    for other in offered.values() if in_order else (chain,):
        used.append((other, written if other is chain else other.writable))
        if other is chain:
            break
    for other, _ in used:
        del offered[other.identity]
    return used
