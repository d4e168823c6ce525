"""The device's side of one ring, whichever engine drives it."""

import ctypes
import mmap
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Final, NamedTuple, Protocol

from ..config import RingConfig, ring_parts
from ..counters import Counters
from ..engine.choose import make_engine
from ..engine.inflight import InflightRegion
from ..engine.interface import EngineName
from ..errors import ChainCompleted, Need, QueueBroken, UsageError
from ..layout import (
    ABI,
    CHAIN_LIMIT,
    DONE,
    DONE_SIZE,
    MAGIC,
    RECORD,
    RECORD_SIZE,
    SEGMENT_SIZE,
    DoneFlags,
    Provision,
    QueueBlock,
    QueueFlags,
    Reason,
    Result,
)
from ..memory import access
from ..memory.placement import PAGE, Placement, log_pages
from ..memory.table import READ, WRITE, Broken, Memory, Missing, Piece, Table
from . import first_use
from .batch import Batch, Chain

PROVISIONS: Final = 1024
"""Pieces mapped on demand that a queue can use at a time."""


_ProvisionArray: Final = Provision * PROVISIONS

_KEEP: Final = int(DoneFlags.KEEP)
_WROTE_ALL: Final = int(DoneFlags.WROTE_ALL)


class DirtyLog(Protocol):
    """What a queue asks of a dirty log (`guest_memory.DirtyLog` is one)."""

    @property
    def struct_address(self) -> int:
        """Host address of its ``gm_log``."""


class RingState(NamedTuple):
    """The position of a drained ring, to be saved and restored."""

    next_avail: int
    next_used: int
    avail_wrap: int
    used_wrap: int
    signalled_used: int
    signalled_valid: int


class _Unresolved(NamedTuple):
    """Why the ring was not found in memory: facts, as an error would keep the memory mapped.

    The errors that raise them again go through frames that hold the snapshot.
    """

    reason: Reason | None
    """None: memory is missing, ``access`` to ``length`` bytes at ``address``."""
    address: int
    length: int = 0
    access: int = 0


class _Arrays:
    """Zeroed arrays that a queue shares with its engine, in pages of which untouched ones cost
    nothing: a chain can be long, and few are.
    """

    def __init__(self, *sizes: int) -> None:
        rounded = [-(-size // 64) * 64 for size in sizes]
        whole = memoryview(mmap.mmap(-1, sum(rounded), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(whole))
        self.views: list[memoryview] = []
        self.addresses: list[int] = []
        start = 0
        for size, step in zip(sizes, rounded, strict=True):
            self.views.append(whole[start : start + size])
            self.addresses.append(address + start)
            start += step


class DeviceQueue:
    """Takes the chains that a driver offers and gives them back, a batch at a time.

    Not thread-safe: one thread works on a queue at a time (another may hold other queues).

    ``base`` is what SET_VRING_BASE brought: for a split ring the next available index, for a
    packed one bits 0 to 14 the next available slot, 15 its wrap counter, 16 to 30 and 31 the
    same for used (all of them 0, as DPDK sends them: the same position); None for a ring that was
    never used.  ``engine`` is "c", "python" or None for
    what VIRTQUEUE_ENGINE says, else the best there is.  ``batch`` is the most chains that a take
    returns.  ``inflight`` is this queue's part of the in-flight region: chains that a back-end
    before us took and did not complete are taken first, and the region decides the position
    instead of ``base``, unless nothing is in flight and the ring was set up anew.  ``log`` is the
    dirty log.  ``state`` restores a saved position.
    ``counters`` are added to by what the queue does.

    Raises `UsageError` for settings that cannot be, `EngineUnavailable`.  A ring outside of
    guest memory shows at the first take.
    """

    def __init__(
        self,
        config: RingConfig,
        memory: Memory,
        *,
        base: int | None = None,
        engine: EngineName | None = None,
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
        size = config.size
        self._config = config
        self._limit = batch
        self._memory = memory
        self._log = log
        self._inflight = inflight
        self._ring_memory = memory
        self._placed: list[Placement] = []
        self._log_pages: ctypes.Array[ctypes.c_uint64] | None = None
        self._former: list[tuple[Memory, Table]] = []
        self._chains: dict[int, Chain] = {}
        self._staged_count = 0
        self._refused = 0  # chains of the batch that could not be completed
        self._releases: dict[int, Callable[[], object]] = {}
        self._provided = 0  # entries of the provisions that were ever used: the first so many
        self._closed = True

        # Room for the longest chain and the regions it may cross, and for usual batches.
        segments = max(max(CHAIN_LIMIT, size) + 1024, 16 * batch)
        block = QueueBlock()
        arrays = _Arrays(
            batch * RECORD_SIZE,
            segments * SEGMENT_SIZE,
            batch * DONE_SIZE,
            size * DONE_SIZE,
            ctypes.sizeof(_ProvisionArray),
        )
        self._provisions: ctypes.Array[Provision] = _ProvisionArray.from_buffer(arrays.views[4])
        block.magic, block.abi, block.size = MAGIC, ABI, ctypes.sizeof(QueueBlock)
        block.queue_size = size
        block.features = config.features
        block.records, block.segments, block.done, block.staged, block.provisions = arrays.addresses
        block.record_capacity = batch
        block.segment_capacity = segments
        block.staged_capacity = size
        block.provision_capacity = PROVISIONS
        block.limit = batch
        block.table = memory.table_address
        if inflight is not None:
            block.inflight, block.inflight_size = inflight.address, inflight.size
            block.inflight_poison = inflight.poison
            if not inflight.direct:
                block.flags |= QueueFlags.INFLIGHT_UNGUARDED
        self._counters = counters
        if counters is not None:
            block.counters = ctypes.addressof(counters)
        self._block = block
        self._used_known = config.packed or state is not None
        self._set_position(base, state)
        self._batch = Batch(block, arrays.views[0], arrays.views[2], arrays.views[1])
        self._status_flag = int(DoneFlags.STATUS) if config.status_byte else 0
        self._staged_view = arrays.views[3]
        self._engine = make_engine(engine, block, memory)
        self._closed = False
        self._started = False
        self._fresh = state is None
        self._unresolved: _Unresolved | None = None
        self._attach()

    # Set-up.

    def _set_position(self, base: int | None, state: RingState | None) -> None:
        block, size = self._block, self._config.size
        if state is not None:
            (
                block.next_avail,
                block.next_used,
                block.avail_wrap,
                block.used_wrap,
                block.signalled_used,
                block.signalled_valid,
            ) = state
        elif self._config.packed:
            base = 0x8000_8000 if base is None else base
            if not base >> 16:
                base |= base << 16
            block.next_avail, block.avail_wrap = base & 0x7FFF, base >> 15 & 1
            block.next_used, block.used_wrap = base >> 16 & 0x7FFF, base >> 31 & 1
        else:
            block.next_avail = (base or 0) & 0xFFFF
            block.next_used = block.next_avail
        if self._config.packed and max(block.next_avail, block.next_used) >= size:
            raise UsageError(f"base {base!r} lies outside of a ring of {size}")

    def _attach(self) -> None:
        """Resolve the ring's addresses and tell the engine; what is missing shows at a take."""
        block, config = self._block, self._config
        # Kept for the chains, which find their own snapshot's through it.
        table = self._table = Table.of(self._memory)
        placed: list[Placement] = []
        self._unresolved = None
        try:
            for (name, _, length), address, before in zip(
                ring_parts(config.size, config.packed),
                (config.descriptor_address, config.driver_address, config.device_address),
                self._placed or (None, None, None),
                strict=True,
            ):
                written = name == "device" or (config.packed and name == "descriptors")
                wanted = READ | WRITE if written else READ
                pieces = table.ring_pieces(address, length, wanted, config.iommu, self._provisions)
                placed.append(Placement(pieces, before))
            hosts = [part.host for part in placed]
            if any(host % 4 for host in hosts[::2]) or hosts[1] % 2 or hosts[0] % 16:
                raise Broken(Reason.RING_MEMORY, hosts[0])
        # A ring that was mapped stays so: completions still go where the driver looks.
        except Missing as error:
            self._unresolved = _Unresolved(None, error.address, error.length, error.access)
        except Broken as error:
            self._unresolved = _Unresolved(error.reason, error.detail)
        else:
            block.descriptors, block.driver, block.device = hosts
            # What was mapped for the old place stays so until the engine knows the new one.
            self._placed, placed = placed, self._placed
            self._ring_memory = self._memory
        block.table = table.address
        block.log = self._log.struct_address if self._log is not None else 0
        self._place_log(table)
        if not self._used_known and block.descriptors:
            # The used ring itself says where the device before us stopped.
            try:
                index = access.words16(table, block.device + 2, 1, config.big_endian)[0]
                offered = access.words16(table, block.driver + 2, 1, config.big_endian)[0]
            except Broken as error:
                self._unresolved = _Unresolved(error.reason, error.detail)
            else:
                block.next_used = block.signalled_used = index
                self._used_known = True
                # DPDK's virtio-user goes on in its ring though it tells a dead device's successor
                # base 0: a base that is further behind than the ring is long cannot be meant.
                size = config.size
                if (offered - block.next_avail) & 0xFFFF > size >= (offered - index) & 0xFFFF:
                    block.next_avail = index
        self._engine.set_memory(self._memory)
        # What the engine calls may depend on whether memory can make a thread wait.
        self._take = self._engine.take
        self._cycle = self._engine.cycle
        self._check(self._engine.attach())
        if not self._started and block.descriptors:
            self._started = True
            self._start()

    def _start(self) -> None:
        """The ring was found: whether it has a past, and what that left in flight."""
        block, packed, region = self._block, self._config.packed, self._inflight
        self._fresh = self._fresh and first_use.at_reset(block, packed)
        if region is not None and first_use.in_use(region):
            if self._fresh:
                first_use.forget(block, region, packed)
            self._fresh = False
        elif self._fresh:
            self._fresh = first_use.never_used(block, packed)
        if self._fresh:
            # There was nothing to tell the driver of that it may not have been told.
            block.signalled_valid = 1
        if region is not None:
            self._engine.recover()

    def _place_log(self, table: Table) -> None:
        """The guest address at which writes to the ring are logged.

        For a packed ring it is where the ring is: front-ends send the address of the device's
        event structure there (QEMU does), and pages of the ring would not be copied. Behind an
        IOMMU what they send is an IOVA (of the used ring itself, by QEMU).
        """
        block, config = self._block, self._config
        block.log_pages = 0
        block.log_used = config.log_used or 0
        if config.log_used is None or not (config.packed or config.iommu):
            return
        (_, _, descriptors), _, (_, _, used) = ring_parts(config.size, config.packed)
        address, length = config.log_used, used
        if config.packed:
            address, length = config.descriptor_address, descriptors
        try:
            pieces = table.ring_pieces(address, length, READ, config.iommu, self._provisions)
        except (Missing, Broken):
            # What is written until it means something again is where the ring was.
            if not self._placed:
                return
            pieces = self._placed[0 if config.packed else 2].pieces
        block.log_used = pieces[0].guest
        if _contiguous(pieces):
            return
        pages = log_pages(pieces)
        if pages is not None:
            self._log_pages = (ctypes.c_uint64 * len(pages))(*pages)
            block.log_pages = ctypes.addressof(self._log_pages)
            block.log_used = pieces[0].guest % PAGE

    def _check(self, result: int) -> int:
        if result < 0:
            self._fail(result, notify=False)
        return result

    def _fail(self, result: int, notify: bool) -> None:
        block = self._block
        if result == Result.NEED:
            raise Need(block.need_address, block.need_length, block.need_access, notify)
        if result == Result.BROKEN:
            raise QueueBroken(Reason(block.reason), block.detail, notify)
        if result == Result.USAGE:
            raise UsageError(self._refusal(block.detail))
        if result == Result.NO_MEMORY:
            raise MemoryError("the ring engine is out of memory")
        raise UsageError(f"a structure shared with the engine has another ABI ({result})")

    def _refusal(self, head: int) -> str:
        """Why the engine does not take a completion of that head."""
        batch = self._batch
        for record, done in zip(
            RECORD.iter_unpack(batch.records), DONE.iter_unpack(batch.done), strict=True
        ):
            if record[6] == done[0] == head and done[3] > record[5]:
                return f"chain {head} has room for {record[5]} bytes, not {done[3]}"
        return f"head {head} is not in flight, or more was written than it has room for"

    # Taking.

    def take(self, limit: int | None = None) -> Batch:
        """Up to ``limit`` available chains; completes nothing.

        An empty batch that is not ``stalled`` has asked the driver for kicks, passed a full
        barrier and looked again.  Raises `QueueBroken` and `Need`.
        """
        if self._batch.built:
            self._leave_batch(completing=False)
        if limit is not None or self._unresolved is not None:
            self._prepare(limit)
        count = self._take()
        self._block.notify = 0
        return self._begin(count) if limit is None else self._begin_limited(count, limit)

    def cycle(self, limit: int | None = None) -> Batch:
        """Complete the current batch as ``batch.done`` says, publish, take the next.

        ``batch.notify`` of the result says whether to signal the driver.  Raises `QueueBroken`
        and `Need`, whose ``notify`` says the same: what was completed has been published.
        After `UsageError` nothing was completed and the batch has ended; see `refused_batch`.
        """
        notify = False
        if self._batch.built:
            self._leave_batch(completing=True)
        if self._staged_count:
            notify = self.publish()
        if limit is not None or self._unresolved is not None:
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
        known = self._unresolved
        if known is not None and not self._block.stopped and not self._block.reason:
            self._attach()
            known = self._unresolved
            if known is not None:
                if known.reason is None:
                    raise Need(known.address, known.length, known.access)
                truncated = known.reason is Reason.TRUNCATED
                reason = Reason.TRUNCATED if truncated else Reason.RING_MEMORY
                raise QueueBroken(reason, known.address)
        if limit is not None:
            if limit < 0:
                raise UsageError(f"a take of {limit} chains")
            self._block.limit = min(limit, self._limit)

    def _finish_batch(self) -> bool:
        block = self._block
        heads = self._batch.done
        staged = 0
        for entry in DONE.iter_unpack(heads):
            if not entry[2] & _KEEP:
                DONE.pack_into(self._staged_view, staged * DONE_SIZE, *entry)
                staged += 1
        block.count = 0
        self._begin(0, arm=False)
        self._staged_count = staged
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
            refusal = self._refusal(block.detail) if count == Result.USAGE else ""
            block.count = batch._count = 0
            batch.serial += 1
            batch.records = batch._record_views[0]
            batch.done = batch._done_views[0]
            if batch._gone:
                batch._gone = set()
            if refusal:
                raise UsageError(refusal)
            if count < 0:
                batch.notify = notify
                self._fail(count, notify)
            # Nothing there: ask for kicks, then look again, as the driver may have decided not
            # to kick just before.
            wait = arm and not block.more and not block.stopped and block.limit
            if wait and self._engine.arm() > 0:
                count = self._take()
                if count < 0:
                    batch.notify = notify
                    self._fail(count, notify)
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
        """The batch that `cycle` has refused to complete, current again.

        Put its ``done`` right and cycle; only right after the `UsageError`.
        """
        count, self._refused = self._refused, 0
        self._block.count = count
        return self.begin(count)

    def rewind(self, count: int) -> None:
        """Give back the last ``count`` chains of the current batch; they are taken again."""
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

        The takes of the latest chains can be undone, as far as all of them are named here and
        nothing that was taken after them has been completed: `base` goes back before them, their
        marks leave the in-flight region, and they are as if they had never been taken.  The other
        chains that are named stay in flight.  The heads come in the order of the takes.

        Chains that came from the in-flight region (`Chain.resubmitted`) lie before every position
        that `base` can name: they are given back to the region, in which they stay marked.
        A queue that goes on takes all of them again; no kick announces them.  A queue that is
        stopped, or broken so that it completes nothing more, gives nothing back.

        Raises `ChainCompleted` for a chain that has been completed, `UsageError` for a head that is
        not in flight; then nothing is given back.
        """
        named: dict[int, Chain | None] = {}
        for chain in chains:
            head, known, _ = self._find(chain)
            if not 0 <= head < self._config.size:
                raise UsageError(f"head {head} is not in flight")
            named[head] = known
        staged = self._staged_view[: self._staged_count * DONE_SIZE]
        for entry in DONE.iter_unpack(staged):
            if entry[0] in named:
                raise ChainCompleted(f"chain {entry[0]} has been completed")
        heads = (ctypes.c_uint16 * len(named))(*named)
        given = heads[: self._check(self._engine.untake(heads))]
        taken_back = set(given)
        batch = self._batch
        for index, entry in enumerate(DONE.iter_unpack(batch.done)):
            if entry[0] in taken_back and not entry[2] & _KEEP:
                self._leave_out(index)
        for head in given:
            self._chains.pop(head, None)
            known = named[head]
            if known is not None:
                known._close()
        if self._former:
            self._drop_former()
        return given

    # Completing.

    def complete(self, chain: Chain | int, written: int | None = None, status: int = 0) -> None:
        """Stage the completion of a chain, or of a head; `publish` makes it visible.

        ``written`` counts bytes from the first device-writable one; None is what `Chain.write`
        wrote, with the status byte if that is next (0 for a head).  ``status`` goes into the
        last writable byte of rings with status bytes.  A chain that was completed before raises
        `ChainCompleted`.
        """
        head, known, index = self._find(chain)
        flags = self._status_flag
        if known is not None:
            room = known.writable_length
            if known._shared:
                flags |= _WROTE_ALL
            if written is None:
                written = known._written
                if self._status_flag and written == room - 1:
                    written = room
            if not 0 <= written <= room:
                raise UsageError(f"chain {head} has room for {room} bytes, not {written}")
        staged = self._staged_count
        if staged >= self._config.size:
            raise UsageError("more completions are staged than chains can be in flight")
        DONE.pack_into(self._staged_view, staged * DONE_SIZE, head, status, flags, written or 0)
        self._staged_count = staged + 1
        if index >= 0:
            self._leave_out(index)
        if known is not None:
            if known._shadows:
                self._flush(known)
            known._close()
            if index < 0:
                del self._chains[head]

    def _find(self, chain: Chain | int) -> tuple[int, Chain | None, int]:
        """A chain's head, its object if there is one, and its place in the batch or -1."""
        batch = self._batch
        if isinstance(chain, Chain):
            head = chain.head
            if chain._memory is None:
                raise ChainCompleted(f"chain {head} has been completed")
            if chain._batch is batch:
                return head, chain, chain.index
            if self._chains.get(head) is not chain:
                raise UsageError(f"{chain!r} is not of this queue")
            return head, chain, -1
        known = self._chains.get(chain)
        if known is None and batch._count:
            # `done` is the caller's, and may name anything.
            heads = [record[6] for record in RECORD.iter_unpack(batch.records)]
            if chain in heads:
                index = heads.index(chain)
                return chain, batch.built.get(index), index
        return chain, known, -1

    def _leave_out(self, index: int) -> None:
        """A chain of the batch is not the next cycle's any more."""
        self._batch._gone.add(index)
        self._batch.done[index * DONE_SIZE + 3] |= _KEEP

    def publish(self) -> bool:
        """Return the staged chains to the driver; true when it wants to be signalled."""
        staged = self._staged_count
        if not staged:
            return False
        block = self._block
        block.staged_count = staged
        self._staged_count = 0
        result = self._engine.publish()
        if result < 0:
            block.staged_count = 0
            self._fail(result, notify=False)
        if self._former:
            self._drop_former()
        return block.notify != 0

    def _flush(self, chain: Chain) -> None:
        """Give the driver what was written to copies of memory that must not be touched."""
        if not self._block.stopped:
            end = chain.writable_length if chain._shared else chain._written
            for shadow in chain._shadows or ():
                shadow.flush(end)

    # For `Server`, which makes the engine's calls itself.

    def leave_batch(self) -> bool:
        """Before the engine completes the batch: what became of its chains as objects.

        Publishes what was staged; true when the driver wants to be signalled for that.
        """
        if self._batch.built:
            self._leave_batch(completing=True)
        return bool(self._staged_count) and self.publish()

    def begin(self, count: int, left: int | None = None) -> Batch:
        """The batch of ``count`` chains that the engine took; ``left`` of them, or all, are for the
        caller."""
        batch = self._batch
        if batch._count != count:
            batch._count = count
            batch.records = batch._record_views[count]
            batch.done = batch._done_views[count]
        batch._left = count if left is None else left
        batch.serial += 1
        if batch._gone:
            batch._gone = set()
        return batch

    def adopt(self) -> Batch:
        """Before a server goes on, after others may have changed the queue: the batch it uses."""
        batch = self._batch
        batch._memory = self._memory
        batch.notify = False
        if self._former:
            self._drop_former()
        return batch

    def note_left(self, left: int) -> None:
        """A handler in C has worked on the batch and left this many requests."""
        self._batch._left = left

    @property
    def fresh(self) -> bool:
        """Whether the ring began without a past: nothing was completed in it before this queue, of
        which its driver may not have been told.  False as long as the ring is not in memory."""
        return self._fresh and self._started

    @property
    def resolved(self) -> bool:
        """Whether the ring was found in memory; a take looks again, or says what is wrong."""
        return self._unresolved is None

    def _leave_batch(self, completing: bool) -> None:
        """Before the batch is overwritten: its chains are completed, or go on by themselves."""
        batch = self._batch
        built, batch.built = batch.built, {}
        done = batch.done
        for index, chain in built.items():
            if chain._memory is None:
                continue
            if completing:
                entry = index * DONE_SIZE + 3
                if not done[entry] & _KEEP:
                    if chain._shared:
                        done[entry] |= _WROTE_ALL
                    if chain._shadows:
                        self._flush(chain)
                    chain._close()
                    continue
            chain._keep()
            self._chains[chain.head] = chain

    # Notifications.

    def enable_notification(self) -> bool:
        """Ask the driver for kicks; true when chains are available already: take them first."""
        return self._check(self._engine.arm()) > 0

    def disable_notification(self) -> None:
        """Tell the driver that kicks are not needed while we look at the ring anyway.

        Take until a batch is empty before sleeping: that asks for kicks again.
        """
        self._check(self._engine.disarm())

    def ready(self) -> bool:
        """Whether a chain is available; asks nobody for anything."""
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
            entry for entry in self._former if entry[0] is self._ring_memory or entry[1].pins
        ]
        memory = self._batch._memory
        if memory is not self._memory and all(memory is not entry[0] for entry in self._former):
            self._batch._memory = None

    def set_log(self, log: DirtyLog | None, log_used: int | None = None) -> None:
        """Log what is written from now on; ``log_used`` as in `RingConfig`."""
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

        ``release`` is called once no chain uses the piece and its place is wanted, or at
        `reclaim` and `close`.  False when there is no place left: complete something first.
        """
        for attempt in range(2):
            for index in range(PROVISIONS):
                entry = self._provisions[index]
                if not entry.length:
                    self._provided = max(self._provided, index + 1)
                    entry.guest_address = address
                    entry.host_address = host_address
                    entry.access = access
                    entry.uses = 0
                    entry.length = length
                    if release is not None:
                        self._releases[index] = release
                    return True
            if not attempt:
                self.reclaim()
        return False

    def reclaim(self) -> int:
        """Release every provided piece that no chain in flight uses; how many."""
        count = 0
        for index in range(self._provided):
            entry = self._provisions[index]
            if entry.length and not entry.uses and not self._holds_ring(entry):
                self._release(index)
                count += 1
        return count

    def _holds_ring(self, entry: Provision) -> bool:
        block = self._block
        return any(
            entry.host_address <= host < entry.host_address + entry.length
            for host in (block.descriptors, block.driver, block.device)
        )

    def _release(self, index: int) -> None:
        self._provisions[index].length = 0
        release = self._releases.pop(index, None)
        if release is not None:
            release()

    # State.

    @property
    def config(self) -> RingConfig:
        """How the ring is set up."""
        return self._config

    @property
    def base(self) -> int:
        """The position as GET_VRING_BASE wants it; see the class for the encoding."""
        block = self._block
        if not self._config.packed:
            return block.next_avail
        avail = block.next_avail | block.avail_wrap << 15
        return avail | (block.next_used | block.used_wrap << 15) << 16

    def save(self) -> RingState:
        """The position, to give to another queue as ``state``; nothing may be in flight."""
        block = self._block
        if block.in_flight or block.resubmit:
            raise UsageError(f"{block.in_flight + block.resubmit} chains are in flight")
        return RingState(
            block.next_avail,
            block.next_used,
            block.avail_wrap,
            block.used_wrap,
            block.signalled_used,
            block.signalled_valid,
        )

    @property
    def in_flight(self) -> int:
        """Chains taken and not completed."""
        return self._block.in_flight

    def working(self) -> list[tuple[int, bytes]]:
        """Head and first 16 device-readable bytes of chains in flight, for a log.

        Those of the batch in hand and those kept as `Chain`; others are not remembered here.
        """
        block, batch = self._block, self._batch
        if self._closed:
            return []
        done = DONE.iter_unpack(batch._done_views[block.count])
        records = RECORD.iter_unpack(batch._record_views[block.count])
        found = {
            entry[0]: record[0]
            for entry, record in zip(done, records, strict=True)
            if not entry[2] & _KEEP
        }
        found.update((head, chain.header) for head, chain in self._chains.items())
        return list(found.items())

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
    def engine(self) -> EngineName:
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
        """Touch the ring no more: takes are empty, completions only release what they hold."""
        self._block.stopped = 1

    def close(self) -> None:
        """Stop, and release everything.  Chains and views keep their memory mapped."""
        if self._closed:
            return
        self._closed = True
        self.stop()
        self._engine.close()
        for chain in (*self._chains.values(), *self._batch.built.values()):
            chain._close()
        self._chains.clear()
        self._batch.built = {}
        self._batch._count = 0
        self._batch._memory = None
        self._batch.serial += 1
        self._take = self._cycle = _closed_call
        for index in range(self._provided):
            if self._provisions[index].length:
                self._release(index)
        self._former.clear()
        self._block.count = self._block.staged_count = self._staged_count = 0

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


def _contiguous(pieces: list[Piece]) -> bool:
    """Whether they follow each other in the guest's memory."""
    return all(
        piece.guest + piece.length == following.guest for piece, following in pairwise(pieces)
    )
