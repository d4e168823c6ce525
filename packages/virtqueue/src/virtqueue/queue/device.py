"""The device's side of one ring, whichever engine drives it."""

import ctypes
from collections.abc import Callable, Iterable
from typing import Any, Final

from ..config import RingConfig
from ..counters import Counters
from ..engine.choose import make_engine
from ..engine.inflight import InflightRegion
from ..errors import ChainCompleted, Need, QueueBroken, UsageError
from ..layout import DoneFlags, Reason, Result
from ..memory.table import DirtyLog, Memory, Table
from .batch import Batch
from .chain import Chain
from .chain_objects import ChainObjects
from .failure import fail, refusal
from .first_use import has_no_past
from .position import RingState, position_base, saved_position, set_position
from .ring_place import RingPlace
from .shared import Shared
from .staged import Staged

_WROTE_ALL: Final = int(DoneFlags.WROTE_ALL)


class DeviceQueue:
    """Takes the chains that a driver offers and gives them back, a batch at a time.

    Not thread-safe: one thread works on a queue at a time, and other threads on other queues.

    ``base`` is the position that SET_VRING_BASE brought; None for a ring that was never used.  For
    a split ring it is the next available index.  For a packed one bits 0 to 14 are the next
    available slot and bit 15 its wrap counter, bits 16 to 30 and 31 the same for used; where all of
    those are 0, as DPDK sends them, used is at the available position.

    ``engine`` is "c" or "python"; None means VIRTQUEUE_ENGINE's, or else the best there is.
    ``batch`` bounds the chains of a take.  ``inflight`` is this queue's part of the in-flight
    region.  The queue first takes the chains that an earlier back-end took and did not complete,
    and begins at the region's position instead of ``base``, unless nothing is in flight and the
    ring was set up anew.  ``log`` is the dirty log.  ``state`` restores a saved position.  The
    engine adds to ``counters``.

    Raises `UsageError` for impossible settings, `EngineUnavailable`.  A ring outside of guest
    memory shows at the first take.
    """

    def __init__(
        self,
        config: RingConfig,
        memory: Memory,
        *,
        base: int | None = None,
        engine: str | None = None,
        batch: int = 128,
        inflight: InflightRegion | None = None,
        log: DirtyLog | None = None,
        state: RingState | None = None,
        counters: Counters | None = None,
    ) -> None:
        # Addresses are the driver's: a wrong one shows at a take, as a broken queue.
        config.check_shape()
        if not 1 <= batch <= 65535:
            raise UsageError(f"a batch has 1 to 65535 chains, not {batch}")
        self._config = config
        self._limit = batch
        self._memory = memory
        self._log = log
        self._inflight = inflight
        self._former: list[tuple[Memory, Table]] = []
        self._refused = 0  # chains of the batch that could not be completed
        self._closed = True
        self._counters = counters
        shared = Shared(config, batch, inflight, counters)
        block = self._block = shared.block
        block.table = memory.table_address
        set_position(block, config, base, state)
        self._provisions = shared.provisions
        self._place = RingPlace(block, shared.provisions, config.packed or state is not None)
        self._batch = Batch(block, shared.records, shared.done, shared.segments)
        self._objects = ChainObjects(block, self._batch)
        self._status_flag = int(DoneFlags.STATUS) if config.status_byte else 0
        self._staged = Staged(block, shared.staged)
        self._engine = make_engine(engine, block, memory)
        self._closed = False
        self._started = False
        self._fresh = state is None
        self._lost = True
        self._attach()

    # Set-up.

    def _attach(self) -> None:
        """Find the ring in memory and tell the engine.  A take reports missing memory."""
        block = self._block
        # Kept for the chains, which find their own snapshot's through it.
        table = self._table = Table.of(self._memory)
        block.log = self._log.struct_address if self._log is not None else 0
        former = self._place.find(table, self._config)
        self._lost = self._place.lost
        block.table = table.address
        self._engine.set_memory(self._memory)
        # What the engine calls may depend on whether memory can make a thread wait.
        self._take = self._engine.take
        self._cycle = self._engine.cycle
        self._check(self._engine.attach())
        del former  # the mappings of the old place, which the engine knew until now
        if not self._started and block.descriptors:
            self._started = True
            self._fresh = self._fresh and has_no_past(block, self._config.packed, self._inflight)
            if self._fresh:
                # Nothing was completed before: no signal can be missing.
                block.signalled_valid = 1
            if self._inflight is not None:
                self._engine.recover()

    def _check(self, result: int) -> int:
        if result < 0:
            fail(self._block, self._batch, result, notify=False)
        return result

    # Taking.

    def take(self, limit: int | None = None) -> Batch:
        """Take up to ``limit`` available chains; completes nothing.

        Before it returns an empty batch that is not ``stalled``, the queue has asked the driver for
        kicks, passed a full barrier and looked again.  Raises `QueueBroken` and `Need`.
        """
        if self._batch.built:
            self._objects.leave_batch(completing=False)
        if limit is not None or self._lost:
            self._prepare(limit)
        count = self._take()
        self._block.notify = 0
        return self._begin(count) if limit is None else self._begin_limited(count, limit)

    def cycle(self, limit: int | None = None) -> Batch:
        """Complete the current batch as ``batch.done`` says, publish, take the next.

        ``batch.notify`` of the result says whether to signal the driver.  Raises `QueueBroken`
        and `Need`, whose ``notify`` says the same, since the completions are published by then.
        After `UsageError` nothing was completed and the batch has ended; see `refused_batch`.
        """
        notify = False
        if self._batch.built:
            self._objects.leave_batch(completing=True)
        if self._staged.count:
            notify = self.publish()
        if limit is not None or self._lost:
            try:
                self._prepare(limit)
            except (QueueBroken, Need) as error:
                # Complete the batch all the same, without a take.
                error.notify = self._finish_batch() or notify
                raise
        count = self._cycle()
        if notify:
            self._block.notify = 1
        return self._begin(count) if limit is None else self._begin_limited(count, limit)

    def _prepare(self, limit: int | None) -> None:
        if self._lost and not self._block.stopped and not self._block.reason:
            self._attach()
            self._place.check()
        if limit is not None:
            if limit < 0:
                raise UsageError(f"a take has a limit of 0 or more chains, not {limit}")
            self._block.limit = min(limit, self._limit)

    def _finish_batch(self) -> bool:
        self._staged.add_batch(self._batch.done)
        self._block.count = 0
        self._begin(0, arm=False)
        return self.publish()

    def _begin_limited(self, count: int, limit: int) -> Batch:
        # The limit holds for the second look, too.
        try:
            return self._begin(count, arm=limit != 0)
        finally:
            self._block.limit = self._limit

    def _begin(self, count: int, arm: bool = True) -> Batch:
        block, batch = self._block, self._batch
        notify = block.notify != 0
        if count == Result.USAGE:
            self._refused = batch._count
        if count <= 0:
            refused = refusal(batch, block.detail) if count == Result.USAGE else ""
            block.count = 0
            batch._begin(0)
            if refused:
                raise UsageError(refused)
            if count < 0:
                batch.notify = notify
                fail(block, batch, count, notify)
            # Nothing there: ask for kicks, then look again, as the driver may have decided not
            # to kick just before.
            wait = arm and not block.more and not block.stopped and block.limit
            if wait and self._engine.arm() > 0:
                count = self._take()
                if count < 0:
                    batch.notify = notify
                    fail(block, batch, count, notify)
            if not count:
                batch.notify = notify
                return batch
        batch._count = batch._left = count
        batch.serial += 1
        batch._memory = self._memory
        batch.records = batch._record_views[count]
        batch.done = batch._done_views[count]
        batch.notify = notify
        if batch._gone:
            batch._gone = set()
        if self._former:
            self._drop_former()
        return batch

    def refused_batch(self) -> Batch:
        """Make the batch that `cycle` has refused to complete current again.

        Call it right after the `UsageError`, mend the batch's ``done`` and cycle.
        """
        count, self._refused = self._refused, 0
        self._block.count = count
        return self._batch._begin(count)

    def rewind(self, count: int) -> None:
        """Give back the last ``count`` chains of the batch; a later take takes them again."""
        batch, block = self._batch, self._block
        if not 0 <= count <= len(batch):
            raise UsageError(f"the batch has {len(batch)} chains, {count} cannot be given back")
        left = len(batch) - count
        block.limit = count
        try:
            self._check(self._engine.rewind())
        finally:
            block.limit = self._limit
        for index in range(left, left + count):
            chain = batch.built.pop(index, None)
            if chain is not None:
                chain._close()
        batch._count = left
        batch.records = batch._record_views[left]
        batch.done = batch._done_views[left]

    def give_back(self, chains: Iterable[Chain | int]) -> list[int]:
        """Undo the takes of chains, or of heads, on which no work has begun; the heads given back.

        The queue can undo its latest takes: from the latest one back to the first chain that is not
        named here or has been completed.  `base` goes back before these chains and their marks
        leave the in-flight region, as if they had never been taken.  Other chains that are named
        stay in flight.  The heads come in the order of the takes.

        Chains that came from the in-flight region (`Chain.resubmitted`) lie before every position
        that `base` can name.  They go back to the region and stay marked there.  A queue that goes
        on takes all of them again; no kick announces them.  A queue that is stopped, or broken so
        that it completes nothing more, gives nothing back.

        Raises `ChainCompleted` for a chain that has been completed, `UsageError` for a head that is
        not in flight; then nothing is given back.
        """
        named = self._objects.find_all(chains)
        staged = self._staged.any_of(named)
        if staged is not None:
            raise ChainCompleted(f"chain {staged} has been completed")
        heads = (ctypes.c_uint16 * len(named))(*named)
        given = heads[: self._check(self._engine.untake(heads))]
        self._objects.forget({head: named[head] for head in given})
        if self._former:
            self._drop_former()
        return given

    # Completing.

    def complete(self, chain: Chain | int, written: int | None = None, status: int = 0) -> None:
        """Stage the completion of a chain, or of a head; `publish` makes it visible.

        ``written`` counts bytes from the first device-writable one.  None means the bytes that
        `Chain.write` wrote, and the status byte if it is the next one; 0 for a head.  ``status``
        goes into the last writable byte of rings with status bytes.  Raises `ChainCompleted` for a
        chain that was completed before.
        """
        head, known, index = self._objects.find(chain)
        flags = self._status_flag
        if known is not None:
            written = known._count_written(written, bool(flags))
            if known._shared:
                flags |= _WROTE_ALL
        self._staged.add(head, status, flags, written or 0)
        self._objects.complete(head, known, index)

    def publish(self) -> bool:
        """Return the staged chains to the driver; true when it wants to be signalled."""
        staged = self._staged
        if not staged.count:
            return False
        block = self._block
        staged.hand_over()
        result = self._engine.publish()
        if result < 0:
            staged.drop()
            fail(block, self._batch, result, notify=False)
        if self._former:
            self._drop_former()
        return block.notify != 0

    @property
    def fresh(self) -> bool:
        """Whether the ring began without a past: no device before this queue completed a chain in
        it, and no signal can be missing.  False as long as the ring is not in memory."""
        return self._fresh and self._started

    @property
    def resolved(self) -> bool:
        """Whether the ring was found in memory.  If not, a take looks again and says why."""
        return not self._lost

    # Notifications.

    def enable_notification(self) -> bool:
        """Ask the driver for kicks; true when chains are available already: take them first."""
        return self._check(self._engine.arm()) > 0

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed, while the caller looks at the ring anyway.

        Take until a batch is empty before sleeping: that asks for kicks again.
        """
        self._check(self._engine.disarm())

    def ready(self) -> bool:
        """Whether a chain is available; does not ask for kicks."""
        return self._engine.ready() > 0

    # Memory.

    def set_memory(self, memory: Memory) -> None:
        """Use a new snapshot for later takes, and find the ring anew in it.

        Chains in flight keep the snapshot they were taken with.
        """
        if self._closed:
            raise UsageError("the queue is closed")
        if memory is not self._memory:
            self._former.append((self._memory, Table.of(self._memory)))
            self._memory = memory
        self._attach()
        self._drop_former()

    def _drop_former(self) -> None:
        self._former = [
            entry for entry in self._former if entry[0] is self._place.memory or entry[1].pins
        ]
        memory = self._batch._memory
        if memory is not self._memory and all(memory is not entry[0] for entry in self._former):
            self._batch._memory = None

    def set_log(self, log: DirtyLog | None, log_used: int | None = None) -> None:
        """Log writes from now on; ``log_used`` as in `RingConfig`."""
        self._log = log
        self._config = self._config._replace(log_used=log_used)
        self._block.features = self._config.features
        self._attach()

    @property
    def memory(self) -> Memory:
        """The snapshot that takes use."""
        return self._memory

    @property
    def window(self) -> memoryview | None:
        """The flat window that offsets in records refer to."""
        return self._memory.window

    def provide(
        self,
        address: int,
        length: int,
        access: int,
        host_address: int,
        release: Callable[[], object] | None = None,
    ) -> bool:
        """Say where memory that is mapped on demand lies, after `Need`.

        The queue calls ``release`` when no chain uses the piece and its place is wanted, or in
        `reclaim` and `close`.  False when there is no place left: complete something first.
        """
        return self._provisions.provide(address, length, access, host_address, release)

    def reclaim(self) -> int:
        """Release every provided piece that no chain in flight uses; how many."""
        return self._provisions.reclaim()

    # State.

    @property
    def config(self) -> RingConfig:
        """How the ring is set up."""
        return self._config

    @property
    def base(self) -> int:
        """The position as GET_VRING_BASE wants it; see the class for the encoding."""
        return position_base(self._block, self._config.packed)

    def save(self) -> RingState:
        """The position, to give to another queue as ``state``; nothing may be in flight."""
        return saved_position(self._block)

    @property
    def in_flight(self) -> int:
        """Chains taken and not completed."""
        return self._block.in_flight

    def working(self) -> list[tuple[int, bytes]]:
        """Head and first 16 device-readable bytes of chains in flight, for a log.

        It knows the chains of the current batch and those kept as `Chain`, and no others.
        """
        return [] if self._closed else list(self._objects.headers().items())

    @property
    def resubmitted(self) -> int:
        """Chains of the in-flight region that have not been taken again yet."""
        return self._block.resubmit

    @property
    def settled(self) -> bool:
        """Whether no chain in flight was taken with an earlier snapshot than `memory`."""
        return not any(table.pins for memory, table in self._former if memory is not self._memory)

    @property
    def broken(self) -> QueueBroken | None:
        """Why the queue takes nothing more, or None."""
        block = self._block
        if not block.reason:
            return None
        return QueueBroken(Reason(block.reason), block.detail)

    @property
    def engine(self) -> str:
        """ "c" or "python"."""
        return self._engine.name

    @property
    def block_address(self) -> int:
        """Host address of the block that the engine works on, as `Server` and C code want it."""
        return ctypes.addressof(self._block)

    @property
    def taken(self) -> int:
        """Chains taken, ever."""
        return self._block.taken

    @property
    def completed(self) -> int:
        """Chains returned to the driver, ever."""
        return self._block.completed

    def stop(self) -> None:
        """Touch the ring no more: takes return nothing, completions only release their records."""
        self._block.stopped = 1

    def close(self) -> None:
        """Stop, and release everything.  Chains and views keep their memory mapped."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._engine.close()
        self._objects.close()
        self._batch._count = 0
        self._batch._memory = None
        self._batch.serial += 1
        self._take = self._cycle = _closed_call
        self._provisions.close()
        self._former.clear()
        self._block.count = 0
        self._staged.drop()

    def __del__(self) -> None:
        # The engine's records count in the snapshot's pins: they must not outlive the queue.
        if not getattr(self, "_closed", True):
            self.close()

    def __enter__(self) -> "DeviceQueue":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _closed_call() -> int:
    raise UsageError("the queue is closed")
