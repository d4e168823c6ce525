"""What every kind of daemon is made of: vrings, workers, the control plane."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from collections.abc import Callable, Sequence

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder

from .backend import VhostUserBackend
from .control import Answer, ControlPlane, Outcome
from .errors import BackendUsageError, Refused
from .vring import VringState
from .vring_locks import Vring, VringMutex, VringRwLock
from .worker import VringEpollHandler

log: logging.Logger = logging.getLogger("vhost_backend")


class DaemonBase:
    """A backend, its vrings and workers, and the state machine that a connection drives.

    The parameters are `VhostUserDaemon`'s; `worker_type` is the kind of workers, `wake` what they
    call when something that the connection waits for may have happened.
    """

    def __init__(
        self,
        name: str,
        backend: VhostUserBackend,
        memory: MemoryHolder | None,
        *,
        mapper: Mapper | None,
        engine: str | None,
        vring: type[VringMutex] | type[VringRwLock],
        memory_slots: bool,
        drain_timeout: float,
        worker_type: type[VringEpollHandler],
        wake: Callable[[], None],
        busy_poll: float = 0.0,
        cpus: Sequence[int] = (),
    ) -> None:
        self.name = name
        self.memory: MemoryHolder = memory if memory is not None else MemoryHolder()
        self._backend = backend
        self._drain_timeout = drain_timeout
        self._connection: socket.socket | None = None
        status_byte = bool(getattr(backend, "status_byte", False))
        self.vrings: list[Vring] = [
            vring(
                VringState(index, backend.max_queue_size(), engine=engine, status_byte=status_byte)
            )
            for index in range(backend.num_queues())
        ]
        self._workers = _make_workers(name, backend, self.vrings, worker_type, busy_poll, cpus)
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
        for vring_ in self.vrings:
            with vring_.get_mut() as state:
                state.name = name
                state.on_truncated = self._hang_up

    def get_epoll_handlers(self) -> list[VringEpollHandler]:
        """The workers, by thread number: where a device registers descriptors of its own."""
        return list(self._workers)

    def _hang_up(self) -> None:
        """End the present connection, from any thread."""
        connection = self._connection
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _report(self, error: Exception) -> None:
        """Log what has ended a connection."""
        if isinstance(error, vp.RemoteProtocolError | Refused):
            log.warning("%s: closing the connection: %s", self.name, error)
        elif isinstance(error, vp.ProtocolError | OSError):
            log.info("%s: the connection was lost: %s", self.name, error)
        else:
            # A mistake of ours, or of the back-end's: loud, but the next front-end is served.
            log.error("%s: closing the connection", self.name, exc_info=error)

    def _drained(self, busy: Sequence[int]) -> bool:
        """Whether none of these rings has a request in flight."""
        return not any(self._control.in_flight(index) for index in busy)

    def _late(self, what: str) -> None:
        log.warning("%s: requests in flight did not end in time: %s", self.name, what)


def close_lent(answer: Outcome) -> None:
    """Close the descriptors that went with an answer, if that was ours to do."""
    if isinstance(answer, Answer) and answer.close:
        for fd in answer.fds:
            os.close(fd)


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
        raise BackendUsageError(f"this process may not run on processors {sorted(missing)}")
    workers = []
    seen = 0
    for thread_id, mask in enumerate(backend.queues_per_thread()):
        mask &= (1 << len(vrings)) - 1
        if mask & seen:
            raise BackendUsageError("a queue belongs to two workers")
        seen |= mask
        owned = [vring for index, vring in enumerate(vrings) if mask >> index & 1]
        cpu = cpus[thread_id % len(cpus)] if cpus else None
        workers.append(
            worker_type(
                backend, owned, thread_id, f"{name}-{thread_id}", busy_poll=busy_poll, cpu=cpu
            )
        )
    if seen != (1 << len(vrings)) - 1:
        raise BackendUsageError("a queue belongs to no worker")
    return workers
