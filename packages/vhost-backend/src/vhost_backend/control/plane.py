"""`ControlPlane`: all sections together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final, TypeVar

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder

from ..backend import VhostUserBackend, VhostUserBackendBase, provided
from ..epoll_handler import VringEpollHandler
from ..errors import DeviceRefused, Refused
from ..vring.locks import Vring
from .context import Context, Section
from .device_messages import Device
from .device_state import DeviceState
from .dirty_log import Logging
from .inflight import Inflight
from .iommu import Iommu
from .memory_guard import MemoryGuard
from .memory_table import MemoryTable
from .negotiation import Negotiation
from .outcome import Descriptors, Outcome, Wait
from .rings import Rings

log: logging.Logger = logging.getLogger("vhost_backend")

T = TypeVar("T")

#: The most requests of one ring that a log line names.
NAMED: Final = 4


class ControlPlane:
    """A state machine: one message at a time goes in, an `Outcome` comes out.

    Args:
        backend: the device.
        vrings: all of the device's.
        workers: the threads that serve them.
        memory: holds the current snapshot.
        mapper: maps regions; None for mmap.
        memory_slots: offer CONFIGURE_MEM_SLOTS; postcopy is offered instead when False.
        wake: called from any thread when a `Wait` may have become ready.
        name: the device's name in log lines.
    """

    def __init__(
        self,
        backend: VhostUserBackend,
        vrings: Sequence[Vring],
        workers: Sequence[VringEpollHandler],
        memory: MemoryHolder,
        *,
        mapper: Mapper | None = None,
        memory_slots: bool = True,
        wake: Callable[[], None] = lambda: None,
        name: str = "",
    ) -> None:
        context = Context(backend, vrings, workers, memory, mapper, MemoryGuard(), wake, name)
        self._context = context
        self._rings = Rings(context)
        self._logging = Logging(context)
        self._iommu = Iommu(context, self._rings.recall)
        # `disconnect` goes in this order: rings before memory.
        self._sections: tuple[Section, ...] = (
            self._rings,
            Inflight(context),
            self._logging,
            self._iommu,
            DeviceState(context),
            Device(context, self._rings.reset),
            MemoryTable(context, slots=memory_slots),
            Negotiation(context, self.offered, self._rings.stop, self._features_changed),
        )
        self._handlers: dict[type[vp.Message], Callable[..., Outcome]] = {}
        for section in self._sections:
            self._handlers.update(section.handlers)

    def connect(self, session: vp.Session) -> None:
        """Begin with a new front-end; `session` is its connection's protocol state."""
        self._context.session = session

    def offered(self) -> vp.ProtocolFeatures:
        """The protocol features that the sections implement."""
        features = 0
        for section in self._sections:
            features |= int(section.offers())
        return vp.ProtocolFeatures(features)

    def rings(self) -> Sequence[int]:
        """The index of every vring."""
        return range(len(self._context.vrings))

    @property
    def memory_due(self) -> float | None:
        """Seconds until `look_at_memory` is due if no message comes before; None when it is not.

        While messages come, the front-end may be about to set up the next ring.
        """
        return self._context.unshared.left

    def look_at_memory(self) -> None:
        """Log a warning if guest memory seems not to be shared."""
        self._context.unshared.look()

    def handle(self, message: vp.Message, fds: Descriptors) -> Outcome:
        """Apply one message; handlers detach the descriptors that they keep, or take them out of
        `fds`.

        Raises `Refused`, and then has changed nothing that matters.
        """
        handler = self._handlers.get(type(message))
        if handler is None:
            raise Refused(message.request_name, "not implemented, and not offered")
        request = message.request_name
        outcome = _refusing(request, lambda: handler(message, fds))
        if isinstance(outcome, Wait):
            finish = outcome.finish
            return outcome._replace(
                finish=lambda: _refusing(request, finish),
                what=f"{request} of {outcome.what}" if outcome.what else request,
            )
        return outcome

    def _features_changed(self) -> None:
        self._logging.features_changed()
        self._iommu.features_changed()

    @property
    def remains(self) -> Sequence[int]:
        """Rings on which the device still works for a front-end that has gone."""
        return self._rings.remains

    def settle(self) -> None:
        """Start rings that waited for requests which have ended. Call it after each `wake`."""
        self._rings.settle()

    def working(self, rings: Sequence[int]) -> list[str]:
        """The requests that the device works on: a phrase for each ring, for the log."""
        describe = provided(self._context.backend, VhostUserBackendBase.describe_request)
        phrases = []
        for index in rings:
            with self._context.vrings[index].get_ref() as state:
                queue, count = state.queue, state.in_flight
                known = [] if queue is None else queue.working()
            if count:
                names = [
                    f"head {head}" + (f" ({describe(header)})" if describe else "")
                    for head, header in known[:NAMED]
                ]
                phrases.append(f"{count} on vring {index}: {', '.join(names) or 'unknown'}")
        return phrases

    def end_requests(self) -> Callable[[], bool]:
        """Take no new chains; returns a function that tells whether all requests have ended."""
        return self._rings.end()

    def disconnect(self) -> None:
        """Forget the front-end that has gone; only the device's own state stays.

        When a section fails, the error is logged and the other sections still disconnect. An error
        that is no `Exception` (KeyboardInterrupt, SystemExit) is raised at the end.
        """
        passes: BaseException | None = None
        for section in self._sections:
            try:
                section.disconnect()
            except BaseException as error:
                log.exception(
                    "%s: a front-end's remains cannot all be cleared away", self._context.name
                )
                if not isinstance(error, Exception):
                    passes = error
        self._context.session = None
        if passes is not None:
            raise passes


def _refusing(request: str, call: Callable[[], T]) -> T:
    """Call `call`, and turn a device's refusal into one of the message `request`."""
    try:
        return call()
    except DeviceRefused as error:
        raise Refused(request, error.reason) from error
