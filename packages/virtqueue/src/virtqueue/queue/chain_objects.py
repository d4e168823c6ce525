"""The chains of a queue that its user holds as objects: in the batch, or kept until completed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..errors import ChainCompleted, UsageError
from ..layout import (
    DONE,
    DONE_FLAGS_OFFSET,
    DONE_SIZE,
    RECORD,
    DoneField,
    DoneFlags,
    QueueBlock,
    RecordField,
)
from .batch import Batch
from .chain import Chain

_KEEP: Final = int(DoneFlags.KEEP)
_WROTE_ALL: Final = int(DoneFlags.WROTE_ALL)


class ChainObjects:
    """What became of each chain that was asked for as an object."""

    def __init__(self, block: QueueBlock, batch: Batch) -> None:
        self._block = block
        self._batch = batch
        self.kept: dict[int, Chain] = {}
        """Chains that go on after their batch, by head."""

    def find(self, chain: Chain | int) -> tuple[int, Chain | None, int]:
        """A chain's head, its object if there is one, and its place in the batch or -1."""
        batch = self._batch
        if isinstance(chain, Chain):
            head = chain.head
            if chain._memory is None:
                raise ChainCompleted(f"chain {head} has been completed")
            if chain._batch is batch:
                return head, chain, chain.index
            if self.kept.get(head) is not chain:
                raise UsageError(f"{chain!r} is not of this queue")
            return head, chain, -1
        known = self.kept.get(chain)
        if known is None and batch._count:
            # `done` is the caller's, and may name anything.
            heads = [record[RecordField.HEAD] for record in RECORD.iter_unpack(batch.records)]
            if chain in heads:
                index = heads.index(chain)
                return chain, batch.built.get(index), index
        return chain, known, -1

    def find_all(self, chains: Iterable[Chain | int]) -> dict[int, Chain | None]:
        """The objects of chains, or of heads, by head."""
        named: dict[int, Chain | None] = {}
        for chain in chains:
            head, known, _ = self.find(chain)
            if not 0 <= head < self._block.queue_size:
                raise UsageError(f"head {head} is not in flight")
            named[head] = known
        return named

    def complete(self, head: int, known: Chain | None, index: int) -> None:
        """A chain was completed by itself; what `find` found of it."""
        if index >= 0:
            self._leave_out(index)
        if known is not None:
            if known._shadows:
                self._flush(known)
            known._close()
            if index < 0:
                del self.kept[head]

    def forget(self, gone: dict[int, Chain | None]) -> None:
        """The takes of these chains were undone."""
        for index, entry in enumerate(DONE.iter_unpack(self._batch.done)):
            if entry[DoneField.HEAD] in gone and not entry[DoneField.FLAGS] & _KEEP:
                self._leave_out(index)
        for head, known in gone.items():
            self.kept.pop(head, None)
            if known is not None:
                known._close()

    def _leave_out(self, index: int) -> None:
        """A chain of the batch is not the next cycle's any more."""
        self._batch._gone.add(index)
        self._batch.done[index * DONE_SIZE + DONE_FLAGS_OFFSET] |= _KEEP

    def _flush(self, chain: Chain) -> None:
        """Give the driver what was written to copies of memory that must not be touched."""
        if not self._block.stopped:
            end = chain.writable_length if chain._shared else chain._written
            for shadow in chain._shadows or ():
                shadow.flush(end)

    def leave_batch(self, completing: bool) -> None:
        """Before the batch is overwritten: its chains are completed, or go on by themselves."""
        batch = self._batch
        built, batch.built = batch.built, {}
        done = batch.done
        for index, chain in built.items():
            if chain._memory is None:
                continue
            if completing:
                entry = index * DONE_SIZE + DONE_FLAGS_OFFSET
                if not done[entry] & _KEEP:
                    if chain._shared:
                        done[entry] |= _WROTE_ALL
                    if chain._shadows:
                        self._flush(chain)
                    chain._close()
                    continue
            chain._keep()
            self.kept[chain.head] = chain

    def headers(self) -> dict[int, bytes]:
        """First 16 device-readable bytes by head, of chains in the batch or kept."""
        block, batch = self._block, self._batch
        done = DONE.iter_unpack(batch._done_views[block.count])
        records = RECORD.iter_unpack(batch._record_views[block.count])
        found = {
            entry[DoneField.HEAD]: record[RecordField.HEADER]
            for entry, record in zip(done, records, strict=True)
            if not entry[DoneField.FLAGS] & _KEEP
        }
        found.update((head, chain.header) for head, chain in self.kept.items())
        return found

    def close(self) -> None:
        """Every chain ends, completed or not."""
        for chain in (*self.kept.values(), *self._batch.built.values()):
            chain._close()
        self.kept.clear()
        self._batch.built = {}
