"""Random I/O on a block device that checks the content of every block it reads."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable
from typing import Any, NamedTuple

from ..devices.blk import S_OK, SECTOR, T_IN, T_OUT
from ..driver import BlockDriver, DriverSession, SessionError
from ..errors import VhostBackendError

#: Bytes in a block: the unit of reading, writing and checking.
BLOCK = 4096

_STAMP = struct.Struct("<QQ")


class _Tag(NamedTuple):
    """A request's block, and the sequence number that it writes there (0: it reads)."""

    block: int
    sequence: int


class WrongData(VhostBackendError):
    """A device lost, repeated or garbled data. `block` is the block's number."""

    def __init__(self, block: int, what: str) -> None:
        super().__init__(f"block {block}: {what}")
        self.block = block
        self.what = what


class BlockWorkload:
    """Random reads and writes that check every answer.

    Each written block repeats its own number and a growing sequence number to the end. So lost,
    repeated, torn and mixed-up writes all show. Two requests for one block are never in flight
    together. A completion without a request raises `virtqueue.QueueBroken`; one with a bad status
    or wrong data raises `WrongData`.

    `blocks` is the number of blocks of 4 KiB to use, from block `first` on. They must be zero at
    the beginning. `seed` makes the choice of requests repeatable.
    """

    def __init__(
        self,
        session: DriverSession,
        *,
        blocks: int = 256,
        first: int = 0,
        depth: int = 16,
        queue: int = 0,
        indirect: bool = False,
        seed: int = 0,
    ) -> None:
        self._options: dict[str, Any] = {"queue": queue, "depth": depth, "indirect": indirect}
        self._driver = BlockDriver(session, max_io=BLOCK, **self._options)
        self._random = random.Random(seed)
        self._first = first
        self._written = [0] * blocks
        #: Sequence numbers of writes that were never answered: a block may hold one of them, too.
        self._unanswered: dict[int, list[int]] = {}
        self._idle = list(range(blocks))
        self._sequence = 0
        #: Requests that have completed correctly.
        self.completed: int = 0

    def resume(self, session: DriverSession, **options: Any) -> None:
        """Continue over a new session with the same disk.

        Requests in flight in the old session are forgotten; their writes may have been done or not.
        `options` replace `depth`, `queue` and `indirect`.
        """
        for tag in self._driver.abandon():
            assert isinstance(tag, _Tag)
            if tag.sequence:
                self._unanswered.setdefault(tag.block, []).append(tag.sequence)
            self._idle.append(tag.block)
        self._options.update(options)
        self._driver = BlockDriver(session, max_io=BLOCK, **self._options)

    @property
    def queue(self) -> int:
        """The queue that the requests go through."""
        return int(self._options["queue"])

    @property
    def in_flight(self) -> int:
        """Requests submitted and not completed."""
        return self._driver.in_flight

    def submit(self) -> None:
        """Fill the queue with requests and kick."""
        driver = self._driver
        while driver.idle_slots:
            place = self._random.randrange(len(self._idle))
            self._idle[place], self._idle[-1] = self._idle[-1], self._idle[place]
            block = self._idle.pop()
            sector = (self._first + block) * (BLOCK // SECTOR)
            if self._random.random() < 0.5:
                self._sequence += 1
                data = self._content(block, self._sequence)
                driver.submit(T_OUT, sector, data, tag=_Tag(block, self._sequence))
            else:
                driver.submit(T_IN, sector, length=BLOCK, tag=_Tag(block, 0))
        driver.kick()

    def collect(self, timeout: float = 10.0) -> int:
        """Wait for completions and check them; returns how many there were.

        Raises `SessionError` when nothing completes within `timeout` seconds.
        """
        finished = self._driver.collect(timeout)
        for completion, data in finished:
            assert isinstance(completion.tag, _Tag)
            block, sequence = completion.tag
            if completion.status != S_OK:
                raise WrongData(block, f"status {completion.status}")
            if sequence:
                self._written[block] = sequence
                self._unanswered.pop(block, None)
                if completion.written != 1:
                    raise WrongData(block, f"a write wrote {completion.written} bytes of memory")
            else:
                self._check(block, data)
            self._idle.append(block)
        self.completed += len(finished)
        return len(finished)

    def poll(self) -> int:
        """Collect completions without waiting."""
        try:
            return self.collect(0)
        except SessionError:
            return 0

    def run(self, requests: int, timeout: float = 10.0) -> None:
        """Complete at least `requests` more requests, and keep the queue full meanwhile."""
        until = self.completed + requests
        while self.completed < until:
            self.submit()
            self.collect(timeout)

    def drain(self, timeout: float = 10.0) -> None:
        """Wait for all requests in flight."""
        while self.in_flight:
            self.collect(timeout)

    def verify(self, timeout: float = 10.0) -> None:
        """Wait for all requests in flight, then read every block and check it."""
        self.drain(timeout)
        blocks = list(range(len(self._written)))
        while blocks or self.in_flight:
            while blocks and self._driver.idle_slots:
                block = blocks.pop()
                sector = (self._first + block) * (BLOCK // SECTOR)
                self._idle.remove(block)
                self._driver.submit(T_IN, sector, length=BLOCK, tag=_Tag(block, 0))
            self._driver.kick()
            self.collect(timeout)

    def verify_image(self, read: Callable[[int, int], bytes]) -> None:
        """Check every block by `read(offset, length)`, without the device."""
        for block in range(len(self._written)):
            self._check(block, read((self._first + block) * BLOCK, BLOCK))

    def _content(self, block: int, sequence: int) -> bytes:
        if not sequence:
            return bytes(BLOCK)
        return _STAMP.pack(block, sequence) * (BLOCK // _STAMP.size)

    def _check(self, block: int, data: bytes) -> None:
        sequence = self._written[block]
        for perhaps in self._unanswered.pop(block, ()):
            if data == self._content(block, perhaps):
                sequence = self._written[block] = perhaps
        if data != self._content(block, sequence):
            found = _STAMP.unpack_from(data.ljust(_STAMP.size, b"\0"))
            raise WrongData(
                block,
                f"holds block {found[0]} of write {found[1]}, not of write {sequence}",
            )
