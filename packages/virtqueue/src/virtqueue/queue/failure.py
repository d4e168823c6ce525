"""What the negative result of an engine's call means for the caller."""

from __future__ import annotations

from typing import NoReturn

from ..errors import Need, QueueBroken, UsageError
from ..layout import DONE, RECORD, DoneField, QueueBlock, Reason, RecordField, Result
from .batch import Batch


def fail(block: QueueBlock, batch: Batch, result: int, notify: bool) -> NoReturn:
    """Raise the error of a `Result`, with the facts that are in the block."""
    if result == Result.NEED:
        raise Need(block.need_address, block.need_length, block.need_access, notify)
    if result == Result.BROKEN:
        raise QueueBroken(Reason(block.reason), block.detail, notify)
    if result == Result.USAGE:
        raise UsageError(refusal(batch, block.detail))
    if result == Result.NO_MEMORY:
        raise MemoryError("the ring engine is out of memory")
    raise UsageError(f"a structure shared with the engine has another ABI ({result})")


def refusal(batch: Batch, head: int) -> str:
    """Why the engine does not take a completion of that head."""
    for record, done in zip(
        RECORD.iter_unpack(batch.records), DONE.iter_unpack(batch.done), strict=True
    ):
        room, written = record[RecordField.WRITABLE_LENGTH], done[DoneField.WRITTEN]
        if record[RecordField.HEAD] == done[DoneField.HEAD] == head and written > room:
            return f"chain {head} has room for {room} bytes, not {written}"
    return f"head {head} is not in flight, or more was written than it has room for"
