"""The parts of every kind of daemon: vrings, workers, the control plane."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
from collections.abc import Callable, Sequence
from typing import Final

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder
from virtqueue import EngineName, UsageError, load_engine

from ..backend import STATUS_BYTE, VhostUserBackend
from ..control import ControlPlane
from ..epoll_handler import VringEpollHandler
from ..errors import BackendUsageError, Refused, is_shortage
from ..rate_limited_log import RateLimited
from ..vring.locks import Vring, VringMutex, VringRwLock
from ..vring.state import VringState
from .conversation import Conversation, Line
from .waiting import Remains, WaitLog

log: logging.Logger = logging.getLogger("vhost_backend")

#: Errors of connections that were gone before `accept` took them (accept(2)).
_PASSING: Final = frozenset(
    (errno.ECONNABORTED, errno.EAGAIN, errno.EINTR, errno.EPROTO, errno.EPERM)
)


class DaemonBase:
    """A back-end, its vrings and workers, and the control plane that a connection drives.

    The parameters are `VhostUserDaemon`'s. `worker_type` is the class of the workers. They call
    `wake` when the connection's wait may be over.
    """

    def __init__(
        self,
        name: str,
        backend: VhostUserBackend,
        memory: MemoryHolder | None,
        *,
        mapper: Mapper | None,
        engine: EngineName | None,
        vring: type[VringMutex] | type[VringRwLock],
        memory_slots: bool,
        drain_warning: float,
        worker_type: type[VringEpollHandler],
        wake: Callable[[], None],
        busy_poll: float = 0.0,
        cpus: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.memory: MemoryHolder = memory if memory is not None else MemoryHolder()
        self._backend = backend
        if not drain_warning > 0:
            raise BackendUsageError(f"drain_warning is more than 0 s, not {drain_warning}")
        self._drain_warning = drain_warning
        self._connection: socket.socket | None = None
        self._shortages = RateLimited(log)
        try:
            load_engine(engine)
        except UsageError as error:
            raise BackendUsageError(str(error)) from None
        own = STATUS_BYTE.of(backend)
        status_byte = own is not None and own.status_byte
        self.vrings: list[Vring] = [
            vring(
                VringState(index, backend.max_queue_size(), engine=engine, status_byte=status_byte)
            )
            for index in range(backend.num_queues())
        ]
        self._workers = _make_workers(name, backend, self.vrings, worker_type, busy_poll, cpus)
        self._unstarted = list(self._workers)
        self._starting = threading.Lock()
        for worker in self._workers:
            worker.on_failure = self._worker_failed
        self._control = ControlPlane(
            backend,
            self.vrings,
            self._workers,
            self.memory,
            mapper=mapper,
            memory_slots=memory_slots,
            wake=wake,
            name=name,
        )
        self._remains = Remains(
            self._control, lambda: self._wait_log("the end of the last connection", self._left)
        )
        for vring_ in self.vrings:
            with vring_.get_mut() as state:
                state.name = name
                state.events.on_truncated = self._hang_up

    def get_epoll_handlers(self) -> list[VringEpollHandler]:
        """The workers, by thread number. A device registers descriptors of its own there."""
        return list(self._workers)

    def _start_workers(self) -> None:
        with self._starting:
            while self._unstarted:
                self._unstarted[0].start()
                del self._unstarted[0]

    def _hang_up(self) -> None:
        """End the present connection, from any thread."""
        self._shut(socket.SHUT_RDWR)

    def _shut(self, how: int) -> None:
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(how)

    def _worker_failed(self, error: BaseException) -> None:
        """End the daemon, because a worker has ended by `error`."""
        raise NotImplementedError

    def _left(self) -> Sequence[int]:
        """Rings on which the device works for a front-end that has gone."""
        return self._control.remains

    def _begin(self, session: vp.Session, line: Line) -> Conversation:
        """Begin the conversation with a front-end that has connected."""
        self._control.connect(session)
        log.info("%s: a front-end has connected", self.name)
        return Conversation(self._control, line, self._remains, self._wait_log, self._refused)

    def _end(self, conversation: Conversation, close: Callable[[], None]) -> None:
        """End the conversation: forget the front-end, and hang up by `close`."""
        self._connection = None
        conversation.close()
        try:
            self._control.disconnect()
        finally:
            close()
            log.info("%s: the front-end has gone", self.name)

    def _report(self, error: BaseException) -> BaseException | None:
        """Log the error that ended a connection, and return it unless it was a hang-up."""
        if is_shortage(error):
            # Neither the front-end's fault nor the device's.
            log.error("%s: closing the connection: this machine is short: %s", self.name, error)
        elif isinstance(error, vp.RemoteProtocolError | Refused):
            log.warning("%s: closing the connection: %s", self.name, error)
        elif isinstance(error, vp.ProtocolError) or _is_hang_up(error):
            log.info("%s: the connection was lost: %s", self.name, error)
            return None
        else:
            # Our mistake, or the back-end's: log it loudly, but serve the next front-end.
            log.error("%s: closing the connection", self.name, exc_info=error)
        return error

    def _wait_log(self, what: str, rings: Callable[[], Sequence[int]]) -> WaitLog:
        """The log of a wait for requests of these rings."""
        return WaitLog(
            f"{self.name}: {what}", lambda: self._control.working(rings()), self._drain_warning
        )

    def _refused(self, error: Refused) -> None:
        """Log a refusal that the front-end was told of."""
        level = logging.ERROR if is_shortage(error) else logging.WARNING
        log.log(level, "%s: %s", self.name, error)

    def _not_accepted(self, error: OSError, pause: Pause) -> float:
        """After an `accept` that failed: the seconds to wait before the next one.

        Front-ends wait in the socket's queue meanwhile. Raises an error that no waiting can mend.
        """
        if error.errno in _PASSING:
            return 0.0
        if is_shortage(error):
            seconds = next(pause)
            self._shortages.error(
                "%s: a front-end has to wait, as this machine is short: %s", self.name, error
            )
            return seconds
        raise error


class Pause:
    """Iterates over the seconds between attempts, which double up to the longest."""

    def __init__(self, first: float = 0.05, longest: float = 1.0) -> None:
        self._next = first
        self._longest = longest

    def __iter__(self) -> Pause:
        return self

    def __next__(self) -> float:
        seconds, self._next = self._next, min(2 * self._next, self._longest)
        return seconds


def say_another_waits(name: str) -> None:
    """Log that a front-end has connected while another one is served."""
    log.warning(
        "%s: another front-end has connected, and waits until the present one has gone", name
    )


def _is_hang_up(error: BaseException) -> bool:
    """Whether the socket's error means that the peer has gone, or that we hung up."""
    return isinstance(error, ConnectionError) or (
        isinstance(error, OSError) and error.errno in (errno.ENOTCONN, errno.ESHUTDOWN)
    )


def _make_workers(
    name: str,
    backend: VhostUserBackend,
    vrings: Sequence[Vring],
    worker_type: type[VringEpollHandler],
    busy_poll: float,
    cpus: Sequence[int],
) -> list[VringEpollHandler]:
    if not 0 <= busy_poll < 1:
        raise BackendUsageError(f"busy_poll is 0 to 1 s, not {busy_poll}")
    missing = set(cpus) - os.sched_getaffinity(0)
    if missing:
        raise BackendUsageError(f"this process is not allowed on processors {sorted(missing)}")
    workers = []
    for thread_id, mask in enumerate(backend.queues_per_thread()):
        owned = [vring for index, vring in enumerate(vrings) if mask >> index & 1]
        cpu = cpus[thread_id % len(cpus)] if cpus else None
        workers.append(
            worker_type(
                backend, owned, thread_id, f"{name}-{thread_id}", busy_poll=busy_poll, cpu=cpu
            )
        )
    return workers
