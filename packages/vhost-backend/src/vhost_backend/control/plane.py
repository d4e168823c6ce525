"""The control plane put together."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import vhost_protocol as vp
from guest_memory import Mapper, MemoryHolder

from ..backend import VhostUserBackend
from ..epoll_handler import VringEpollHandler
from ..errors import Refused
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
from .outcome import Descriptors, Outcome
from .rings import Rings

log: logging.Logger = logging.getLogger("vhost_backend")

#: Requests of a ring that a log line names.
NAMED: Final = 4


class ControlPlane:
    """A state machine: one message at a time goes in, an `Outcome` comes out.

    Args:
        backend: the device.
        vrings: all of the device's.
        workers: the threads that serve them.
        memory: holds the current snapshot.
        mapper: how regions are mapped; None for mmap.
        memory_slots: offer CONFIGURE_MEM_SLOTS; postcopy is offered instead when False.
        wake: called from any thread when something that a `Wait` waits for may have happened.
        name: names the device in log lines.
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
        # In the order in which a connection's remains are cleared away: rings before memory.
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
        """A front-end has connected; `session` is what its connection knows."""
        self._context.session = session

    def offered(self) -> vp.ProtocolFeatures:
        """Protocol features: what the sections stand for."""
        features = 0
        for section in self._sections:
            features |= int(section.offers())
        return vp.ProtocolFeatures(features)

    def rings(self) -> Sequence[int]:
        """The index of every vring."""
        return range(len(self._context.vrings))

    @property
    def memory_due(self) -> float | None:
        """Seconds until `look_at_memory` is due, if no message comes before; None: it is not."""
        return self._context.unshared.left

    def look_at_memory(self) -> None:
        """Say so where guest memory turns out not to be shared."""
        self._context.unshared.look()

    def handle(self, message: vp.Message, fds: Descriptors) -> Outcome:
        """Apply one message; descriptors that are kept are detached or taken out of `fds`.

        Raises `Refused`, and then has changed nothing that matters.
        """
        handler = self._handlers.get(type(message))
        if handler is None:
            raise Refused(message.request_name, "not implemented, and not offered")
        return handler(message, fds)

    def _features_changed(self) -> None:
        self._logging.features_changed()
        self._iommu.features_changed()

    @property
    def remains(self) -> Sequence[int]:
        """Rings on which the device still works for a front-end that has gone."""
        return self._rings.remains

    def settle(self) -> None:
        """To be called after `wake`: start the rings that waited for what `remains`."""
        self._rings.settle()

    def working(self, rings: Sequence[int]) -> list[str]:
        """What the device works on, a phrase for each ring, for a log."""
        describe = self._context.hook("describe_request")
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
        """Take no new chains; tells whether the device has ended what it works on."""
        return self._rings.end()

    def disconnect(self) -> None:
        """The front-end is gone: nothing of it stays, except the device's own state.

        A section that fails is logged and keeps no other from clearing away. What is no ordinary
        exception is raised in the end.
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
