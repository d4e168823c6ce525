"""What a driver remembers of the chains that the device has."""

from __future__ import annotations

from typing import NamedTuple


class Offered(NamedTuple):
    """A chain that the device has."""

    identity: int
    slots: tuple[int, ...]
    """Split: its descriptors of the table; packed: one element a slot of the ring."""
    writable: int


def up_to(offered: dict[int, Offered], identity: int) -> list[Offered]:
    """With IN_ORDER a used id stands for itself and all that were offered before it."""
    batch: list[Offered] = []
    for chain in offered.values():
        batch.append(chain)
        if chain.identity == identity:
            break
    return batch
