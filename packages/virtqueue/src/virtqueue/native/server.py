"""Serving one queue from C: sleep, take, have a handler work, complete, signal."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import partial
from typing import Final

from ..c_library import library
from ..errors import EngineUnavailable, UsageError
from ..queue.batch import Batch
from ..queue.device import DeviceQueue
from ..queue.native_side import NativeSide
from .handler import CHandler


class ServerBlock(ctypes.Structure):
    """``struct vq_server`` (80 bytes)."""

    size: int
    owner: int
    interrupt: int
    signal: int
    queue: int
    handler: int
    context: int
    epoll_fd: int
    kick_fd: int
    call_fd: int
    left: int
    spin_ns: int
    spin_max_ns: int
    batch: int

    _fields_ = [
        ("size", ctypes.c_uint32),
        ("owner", ctypes.c_uint32),
        ("interrupt", ctypes.c_uint32),
        ("signal", ctypes.c_uint32),
        ("queue", ctypes.c_uint64),
        ("handler", ctypes.c_uint64),
        ("context", ctypes.c_uint64),
        ("epoll_fd", ctypes.c_int32),
        ("kick_fd", ctypes.c_int32),
        ("call_fd", ctypes.c_int32),
        ("left", ctypes.c_uint32),
        ("spin_ns", ctypes.c_uint32),
        ("spin_max_ns", ctypes.c_uint32),
        ("batch", ctypes.c_uint64),
    ]


_ENGINE: Final = 1


class Server:
    """One worker that serves one queue which the C engine drives.

    The worker sleeps on ``epoll_fd``, an epoll descriptor.  Its owner registers ``kick_fd`` there
    with its own number as data, and edge-triggered, so that nothing has to be read from it.  An
    event of any other descriptor in ``epoll_fd`` ends a sleep.  ``call_fd`` is the eventfd by which
    the driver is signalled; -1 for none.  ``handler`` works on batches in C; without a handler the
    batches are the caller's.  ``spin_max`` bounds, in seconds, how long the worker looks at the
    ring before it sleeps; the time adapts to the length of sleeps, and with 0 there is no looking.

    The worker holds a lock of its own around all calls.  Other threads make three calls without it:
    they call `interrupt` and wake ``epoll_fd`` to have the lock soon, and may `borrow` the queue,
    and `give_back`, while a handler in C works.

    Raises `EngineUnavailable` for a queue that another engine drives, `UsageError`.
    """

    def __init__(
        self,
        queue: DeviceQueue,
        epoll_fd: int,
        kick_fd: int = -1,
        call_fd: int = -1,
        *,
        handler: CHandler | None = None,
        spin_max: float = 0.0,
    ) -> None:
        if not 0 <= spin_max < 1:
            raise UsageError(f"a worker looks for 0 to 1 s before it sleeps, not {spin_max}")
        if queue.engine != "c":
            raise EngineUnavailable(
                f"a queue is served from C when C drives it, not {queue.engine}"
            )
        loaded = library()
        self.queue: DeviceQueue = queue
        side = self._side = NativeSide(queue)
        #: Kept so that a handler's memory stays mapped, and its context alive.
        self._memory = queue.memory
        self._handler = handler
        block = self._block = ServerBlock(
            size=ctypes.sizeof(ServerBlock),
            owner=_ENGINE,
            queue=side.block_address,
            handler=0 if handler is None else handler.function,
            context=0 if handler is None else handler.context,
            batch=0 if handler is None else handler.batch,
            epoll_fd=epoll_fd,
            kick_fd=kick_fd,
            call_fd=call_fd,
            spin_ns=round(spin_max * 1e9),
            spin_max_ns=round(spin_max * 1e9),
        )
        argument = ctypes.c_void_p(ctypes.addressof(block))
        self.serve: Callable[[], int] = partial(loaded.released.vq_serve, argument)
        """Repeat `turn`, asleep in between, until there is a batch for the caller; its size.

        With a handler the caller gets a batch of which some requests are `left`, or during which
        the queue was borrowed.  0 means `interrupt`, or an event that is no kick.  Releases the
        GIL.
        """
        self._held_turn = partial(loaded.held.vq_turn_held, argument)
        self._released_turn = partial(loaded.released.vq_turn, argument)
        self.turn: Callable[[], int] = self._held_turn
        """Complete the batch, signal the driver if it wants that, take the next; its size.

        0 when there is none.  Negative when `DeviceQueue.cycle` has an error to raise; the
        completions are published and signalled by then.  Keeps the GIL where memory cannot make a
        thread wait, and then leaves a signal to `serve`, which must follow a 0: a hostile front-end
        can make the write wait (see ``virtqueue.h``), and every thread that wants the GIL with it.
        """
        self.begin: Callable[[int], Batch] = (
            side.begin if handler is None else lambda count: side.begin(count, block.left)
        )
        """The batch of as many chains as `turn` or `serve` returned."""
        self._borrow = partial(loaded.held.vq_borrow, argument)
        self.give_back: partial[None] = partial(loaded.held.vq_give_back, argument)
        """End what `borrow` began."""

    def resume(self, kick_fd: int, call_fd: int) -> Batch:
        """Before serving, with the lock: adopt what other threads may have changed.

        Returns the object that every `begin` will return.
        """
        block, side = self._block, self._side
        block.owner = _ENGINE
        block.kick_fd = kick_fd
        block.call_fd = call_fd
        self._memory = side.memory
        bounded = getattr(self._memory, "bounded", True)
        self.turn = self._held_turn if bounded else self._released_turn
        return side.adopt()

    def leave(self) -> None:
        """Before `turn` or `serve`: settle the chains of the batch that were used as objects
        (`Batch.built`) or completed one by one."""
        if self._side.leave_batch():
            self.signal()

    @property
    def handled(self) -> bool:
        """Whether a handler in C works on the batches."""
        return self._handler is not None

    @property
    def left(self) -> int:
        """How many requests of the batch the handler left."""
        left: int = self._block.left
        return left

    def interrupt(self) -> None:
        """From any thread: make `serve` and `turn` return soon.  Wake the epoll descriptor next."""
        self._block.interrupt = 1

    def signal(self) -> None:
        """From any thread: signal the driver at the next turn, even if it does not want that."""
        self._block.signal = 1

    def clear_interrupt(self) -> None:
        """Before looking at the epoll descriptor's events: a later `interrupt` counts again."""
        self._block.interrupt = 0

    def own(self) -> None:
        """With the lock, when no thread has borrowed the queue: end the time in which they may.

        After a `give_back` other threads may borrow it again until this call.
        """
        self._block.owner = _ENGINE

    def borrow(self) -> bool:
        """From any thread: take the queue while a handler in C works.  False when none does."""
        return bool(self._borrow())

    @property
    def spin(self) -> float:
        """How long the next wait looks before it sleeps, in seconds."""
        nanoseconds: int = self._block.spin_ns
        return nanoseconds / 1e9
