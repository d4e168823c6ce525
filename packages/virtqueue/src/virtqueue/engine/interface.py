"""What a ring engine does, whichever language it is written in.

`DeviceQueue` fills a `QueueBlock` and the arrays it points to, then drives one engine through
these calls.  None takes arguments: they are fields of the block, so that a call into C costs no
conversion.  A call returns a count, 0 or 1, or a negative `Result`.

An engine keeps a private record of each taken chain until it is completed: the writable pieces
(for the status byte and the dirty log), the snapshot whose table it was resolved with, the
provisions it uses and its entry of the in-flight region.  Completion works from that record
alone, because the batch's arrays are overwritten by the next take and memory may have been
replaced in between.  The private pieces of all chains are bounded; a chain for which there is no
room waits (`More.STALLED`), and always fits once nothing is in flight, as a chain's length is
bounded.
"""

from __future__ import annotations

import ctypes
from typing import Literal, Protocol

from ..memory.table import Memory

#: What an engine is called, where one is asked for.
EngineName = Literal["c", "python"]


class Engine(Protocol):
    """One queue's engine.  Not thread-safe: its owner makes one call at a time."""

    name: EngineName
    """"c" or "python"."""

    def set_memory(self, memory: Memory) -> None:
        """The snapshot whose table the next `attach` finds in ``block.table``.

        Only the Python engine has to remember it; `DeviceQueue` keeps it alive either way.
        """

    def attach(self) -> int:
        """Adopt `descriptors`, `driver`, `device`, `table`, `log`, `log_used` and LOG_USED.

        Called once before the first take and after each change of these fields.  Chains that
        are in flight keep the snapshot they were taken with.  The queue keeps a snapshot alive
        while its ``gm_table.pins`` is not 0.  The position (`next_avail`, `next_used`, the wrap
        counters, `signalled_used`, `signalled_valid`) is set by the queue before the first
        attach and belongs to the engine from then on.  ``descriptors`` 0 means that the ring is
        not in memory yet.
        """

    def recover(self) -> int:
        """Set the ring's position from the in-flight region; called once, after `attach`.

        A region of version 0 is initialised.  Otherwise the rules of "Inflight I/O tracking" are
        applied; `next_avail`, `next_used` and the wrap counters are set and the
        chains to be taken again are listed (`resubmit`): takes return them first, in order of
        their counters, marked RESUBMITTED.  Returns how many.
        """

    def take(self) -> int:
        """Take up to `limit` available chains into `records`, `segments`, `done`.

        Completes nothing.  `done` is prefilled with (head, 0, STATUS if the ring has status
        bytes, writable_length).  A chain whose pieces do not fit the rest of `segments` waits
        for the next take.  When fewer than `limit` are taken the ring was seen empty, unless
        `more` says otherwise.  A ring error ends the batch before the bad chain: BROKEN (like
        NEED) is only returned when no chain was taken by this call.
        """

    def publish(self) -> int:
        """Complete the `staged_count` entries of `staged`; set `notify`; return how many."""

    def cycle(self) -> int:
        """Complete `done[0:count]` except the entries marked KEEP, set `notify`, then take.

        When the take ends with BROKEN or NEED the completions have been published all the same.
        Completions are published on a queue that a wrong chain broke, too: the chains before it
        were good.  After RING_MEMORY, TRUNCATED, USED_RING and INFLIGHT they only release.
        """

    def rewind(self) -> int:
        """Give back the last `limit` chains of the current batch; `count` shrinks by as many.

        They have to be in flight and the latest taken; they will be taken again.
        """

    def untake(self, heads: ctypes.Array[ctypes.c_uint16]) -> int:
        """Give back the latest taken of the chains in flight with these heads.

        The longest suffix of what was taken that consists of them alone: a chain that was taken
        later and is not named, or has been completed, ends it.  The position goes back, and marks
        leave the in-flight region, the latest first.  Chains that came from the region go back to
        the head of those that will be taken again, and keep their marks.  Returns how many;
        the first so many of ``heads`` are they, the oldest first.
        """

    def arm(self) -> int:
        """Ask the driver for kicks, pass a full barrier, look again: 1 when chains wait."""

    def disarm(self) -> int:
        """Tell the driver that kicks are not needed (a hint)."""

    def ready(self) -> int:
        """1 when at least one chain is available; changes nothing."""

    def close(self) -> None:
        """Release the records of all chains in flight and the engine's memory."""
