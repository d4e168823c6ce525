"""Completions by head that wait for the next publishing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from ..errors import UsageError
from ..layout import DONE, DONE_SIZE, DoneField, DoneFlags, QueueBlock

_KEEP: Final = int(DoneFlags.KEEP)


class Staged:
    """The array of staged completions, up to as many as chains can be in flight."""

    def __init__(self, block: QueueBlock, entries: memoryview) -> None:
        self._block = block
        self._entries = entries
        self.count: int = 0

    def add(self, head: int, status: int, flags: int, written: int) -> None:
        """One more; raises `UsageError` when there is no room."""
        if self.count >= self._block.staged_capacity:
            raise UsageError("more completions are staged than chains can be in flight")
        DONE.pack_into(self._entries, self.count * DONE_SIZE, head, status, flags, written)
        self.count += 1

    def add_batch(self, done: memoryview) -> None:
        """The completions of a batch; nothing else is staged."""
        for head, status, flags, written in DONE.iter_unpack(done):
            if not flags & _KEEP:
                self.add(head, status, flags, written)

    def any_of(self, heads: Iterable[int]) -> int | None:
        """One of the heads that is staged."""
        entries = DONE.iter_unpack(self._entries[: self.count * DONE_SIZE])
        return next(iter({entry[DoneField.HEAD] for entry in entries}.intersection(heads)), None)

    def hand_over(self) -> None:
        """The engine takes them with its next call."""
        self._block.staged_count, self.count = self.count, 0

    def drop(self) -> None:
        """They are not completed."""
        self._block.staged_count = self.count = 0
