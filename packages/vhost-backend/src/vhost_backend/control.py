"""The control plane: what each front-end message does to the device. No sockets, no waiting.

`ControlPlane.handle` takes one message and its descriptors, checks it against the present state,
applies it to memory, rings and workers, and returns what to answer. A message that breaks a rule
raises `Refused` and has changed nothing. The connection's thread is the only caller, so the state
here needs no lock; what workers share is in `vring.py`, behind each ring's lock.

Section names in comments are those of the vhost-user specification.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from typing import NamedTuple

import vhost_protocol as vp
from guest_memory import (
    MAX_MEM_SLOTS,
    GuestAddress,
    GuestMemory,
    GuestMemoryError,
    Mapper,
    MemoryHolder,
    Region,
    SharedMapping,
    UserAddress,
    allocate_memfd,
)
from virtqueue import InflightRegion, UsageError, inflight_size

from .backend import VhostUserBackend
from .errors import Refused
from .features import VirtioFeature
from .vring import Vring, VringState
from .worker import VringEpollHandler

log = logging.getLogger("vhost_backend")

#: What the daemon itself implements for every device.
CORE_FEATURES = (
    vp.ProtocolFeatures.MQ
    | vp.ProtocolFeatures.REPLY_ACK
    | vp.ProtocolFeatures.RESET_DEVICE
    | vp.ProtocolFeatures.CONFIGURE_MEM_SLOTS
    | vp.ProtocolFeatures.STATUS
    | vp.ProtocolFeatures.INFLIGHT_SHMFD
)


class Answer(NamedTuple):
    """A reply of the request's own kind; `close`: its `fds` are closed once it is sent."""

    message: vp.Reply
    fds: tuple[int, ...] = ()
    close: bool = False


class Draining(NamedTuple):
    """Vring `ring` still has requests in flight; `ControlPlane.stopped` makes the answer."""

    ring: int


Fds = list[vp.OwnedFd]
Outcome = Answer | Draining | None
"""None: done; acknowledge the request if it asks for that."""


class ControlPlane:
    """The device's state on one connection after another.

    `vrings` are all of the device's, `workers` the threads that serve them, `memory` holds the
    current snapshot. `on_drained` is called from any thread when a ring that `Draining` was
    returned for has no request in flight any more.
    """

    def __init__(
        self,
        backend: VhostUserBackend,
        vrings: Sequence[Vring],
        workers: Sequence[VringEpollHandler],
        memory: MemoryHolder,
        *,
        mapper: Mapper | None = None,
        on_drained: Callable[[], None] = lambda: None,
    ) -> None:
        self._backend = backend
        self._vrings = vrings
        self._memory = memory
        self._mapper = mapper
        self._on_drained = on_drained
        #: Worker and position in it, by vring.
        self._places: list[tuple[VringEpollHandler, int]] = _places(backend, vrings, workers)
        self.features = VirtioFeature(0)
        self.protocol_features = vp.ProtocolFeatures(0)
        self.owned = False
        self.status = 0
        self._handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.GetFeatures: self._get_features,
            vp.SetFeatures: self._set_features,
            vp.GetProtocolFeatures: self._get_protocol_features,
            vp.SetProtocolFeatures: self._set_protocol_features,
            vp.SetOwner: self._set_owner,
            vp.ResetOwner: self._reset_owner,
            vp.GetQueueNum: self._get_queue_num,
            vp.GetMaxMemSlots: self._get_max_mem_slots,
            vp.SetMemTable: self._set_mem_table,
            vp.AddMemReg: self._add_mem_reg,
            vp.RemMemReg: self._rem_mem_reg,
            vp.SetVringNum: self._set_vring_num,
            vp.SetVringAddr: self._set_vring_addr,
            vp.SetVringBase: self._set_vring_base,
            vp.GetVringBase: self._get_vring_base,
            vp.SetVringKick: self._set_vring_kick,
            vp.SetVringCall: self._set_vring_call,
            vp.SetVringErr: self._set_vring_err,
            vp.SetVringEnable: self._set_vring_enable,
            vp.GetInflightFd: self._get_inflight_fd,
            vp.SetInflightFd: self._set_inflight_fd,
            vp.GetConfig: self._get_config,
            vp.SetConfig: self._set_config,
            vp.GetStatus: self._get_status,
            vp.SetStatus: self._set_status,
            vp.ResetDevice: self._reset_device,
        }

    # -- offers ---------------------------------------------------------------------------------

    @property
    def offered_features(self) -> VirtioFeature:
        """Virtio feature bits offered to this front-end."""
        return VirtioFeature(self._backend.features()) | VirtioFeature.PROTOCOL_FEATURES

    @property
    def offered_protocol_features(self) -> vp.ProtocolFeatures:
        """Protocol features offered: the daemon's own and those the back-end asks for."""
        return CORE_FEATURES | (self._backend.protocol_features() & vp.ProtocolFeatures.CONFIG)

    # -- entry points ---------------------------------------------------------------------------

    def handle(self, message: vp.Message, fds: Fds) -> Outcome:
        """Apply one message. Raises `Refused`; descriptors that are kept are detached."""
        handler = self._handlers.get(type(message))
        if handler is None:
            raise Refused(type(message).__name__, "not implemented, and not offered")
        return handler(message, fds)

    def stopped(self, index: int) -> Answer:
        """Stop a ring that has drained, or has had its time, and answer GET_VRING_BASE."""
        with self._vrings[index].get_mut() as vring:
            if vring.queue is not None and vring.queue.in_flight:
                log.warning("vring %d stops with requests in flight", index)
            base = vring.stop()
        return Answer(vp.VringBaseReply(index, base))

    def in_flight(self, index: int) -> int:
        """Requests of a ring that the device still works on."""
        with self._vrings[index].get_ref() as state:
            return state.queue.in_flight if state.queue is not None else 0

    def begin_disconnect(self) -> list[int]:
        """Take no new chains; returns the rings that still have requests in flight."""
        for index, vring in enumerate(self._vrings):
            self._unwatch(index)
            with vring.get_mut() as state:
                state.begin_drain(self._on_drained)
        return [index for index in range(len(self._vrings)) if self.in_flight(index)]

    def disconnect(self) -> None:
        """The front-end is gone: nothing of it stays, except the device's own state."""
        for index, vring in enumerate(self._vrings):
            self._unwatch(index)
            with vring.get_mut() as state:
                state.reset()
        self._memory.replace(GuestMemory())
        self.features = VirtioFeature(0)
        self.protocol_features = vp.ProtocolFeatures(0)
        self.owned = False
        self.status = 0

    # -- negotiation ----------------------------------------------------------------------------

    def _get_features(self, message: vp.GetFeatures, fds: Fds) -> Outcome:
        return Answer(vp.FeaturesReply(int(self.offered_features)))

    def _set_features(self, message: vp.SetFeatures, fds: Fds) -> Outcome:
        features = VirtioFeature(message.features)
        # In plain integers: what ~ does to a flag type differs between Python versions.
        unknown = message.features & ~int(self.offered_features)
        if unknown:
            raise Refused("SET_FEATURES", f"bits {unknown:#x} were not offered")
        self.features = features
        self._backend.acked_features(int(features))
        self._backend.set_event_idx(bool(features & VirtioFeature.EVENT_IDX))
        for index, vring in enumerate(self._vrings):
            with vring.get_mut() as state:
                state.features = features
                if not features & VirtioFeature.PROTOCOL_FEATURES:
                    # "Ring states": a front-end that cannot enable rings has them all enabled.
                    state.set_enabled(True)
            self._scan(index)
        return None

    def _get_protocol_features(self, message: vp.GetProtocolFeatures, fds: Fds) -> Outcome:
        return Answer(vp.ProtocolFeaturesReply(self.offered_protocol_features))

    def _set_protocol_features(self, message: vp.SetProtocolFeatures, fds: Fds) -> Outcome:
        unknown = int(message.features) & ~int(self.offered_protocol_features)
        if unknown:
            raise Refused("SET_PROTOCOL_FEATURES", f"bits {unknown:#x} were not offered")
        self.protocol_features = message.features
        return None

    def _set_owner(self, message: vp.SetOwner, fds: Fds) -> Outcome:
        if self.owned:
            raise Refused("SET_OWNER", "this connection owns the device already")
        self.owned = True
        return None

    def _reset_owner(self, message: vp.ResetOwner, fds: Fds) -> Outcome:
        # Deprecated; the specification recommends to do no more than disable all rings.
        for vring in self._vrings:
            with vring.get_mut() as state:
                state.set_enabled(False)
        self.owned = False
        return None

    def _get_queue_num(self, message: vp.GetQueueNum, fds: Fds) -> Outcome:
        return Answer(vp.QueueNumReply(self._backend.num_queues()))

    def _get_status(self, message: vp.GetStatus, fds: Fds) -> Outcome:
        return Answer(vp.StatusReply(self.status))

    def _set_status(self, message: vp.SetStatus, fds: Fds) -> Outcome:
        if message.status == 0 and self.status:
            self._reset()
        self.status = message.status
        return None

    def _reset_device(self, message: vp.ResetDevice, fds: Fds) -> Outcome:
        self._reset()
        return None

    def _reset(self) -> None:
        """Rings stopped and disabled, the device as new; memory and negotiation stay."""
        for index, vring in enumerate(self._vrings):
            self._unwatch(index)
            with vring.get_mut() as state:
                features = state.features
                state.reset()
                state.features = features
        self._backend.reset_device()

    # -- memory ---------------------------------------------------------------------------------

    def _get_max_mem_slots(self, message: vp.GetMaxMemSlots, fds: Fds) -> Outcome:
        return Answer(vp.MaxMemSlotsReply(MAX_MEM_SLOTS))

    def _set_mem_table(self, message: vp.SetMemTable, fds: Fds) -> Outcome:
        pairs = [
            (_region(region), fd.fileno()) for region, fd in zip(message.regions, fds, strict=True)
        ]
        try:
            memory = GuestMemory.map(pairs, mapper=self._mapper)
        except GuestMemoryError as error:
            raise Refused("SET_MEM_TABLE", str(error)) from error
        self._use(memory)
        return None

    def _add_mem_reg(self, message: vp.AddMemReg, fds: Fds) -> Outcome:
        try:
            memory = self._memory.current.add(
                _region(message.region), fds[0].fileno() if fds else None, mapper=self._mapper
            )
        except GuestMemoryError as error:
            raise Refused("ADD_MEM_REG", str(error)) from error
        self._use(memory)
        return None

    def _rem_mem_reg(self, message: vp.RemMemReg, fds: Fds) -> Outcome:
        try:
            memory = self._memory.current.remove(_region(message.region))
        except GuestMemoryError as error:
            raise Refused("REM_MEM_REG", str(error)) from error
        self._use(memory)
        return None

    def _use(self, memory: GuestMemory) -> None:
        """One atomic swap; every queue resolves its ring anew before its next take."""
        self._memory.replace(memory)
        for index, vring in enumerate(self._vrings):
            with vring.get_mut() as state:
                state.set_memory(memory)
            self._scan(index)
        self._backend.update_memory(memory)

    # -- rings ----------------------------------------------------------------------------------

    def _vring(self, request: str, index: int) -> Vring:
        if index >= len(self._vrings):
            raise Refused(request, f"there is no vring {index}")
        return self._vrings[index]

    def _set_vring_num(self, message: vp.SetVringNum, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_NUM", message.index)
        size = message.num
        packed = self.features & VirtioFeature.RING_PACKED
        if not 0 < size <= self._backend.max_queue_size():
            raise Refused(
                "SET_VRING_NUM", f"{size} is not in 1 to {self._backend.max_queue_size()}"
            )
        if size & (size - 1) and not packed:
            raise Refused("SET_VRING_NUM", f"{size} is not a power of two")
        with vring.get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_NUM", f"vring {message.index} is started")
            state.set_queue_size(size)
        return None

    def _set_vring_addr(self, message: vp.SetVringAddr, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_ADDR", message.index)
        addresses = (message.descriptor, message.available, message.used)
        log_used = message.log if message.flags & vp.VringFlags.LOG else None
        with vring.get_mut() as state:
            moved = state.addresses != addresses
            state.log_used = log_used
            if not moved:
                return None
            state.set_queue_info(*addresses)
            if state.started:
                try:
                    state.config().check()
                except UsageError as error:
                    raise Refused("SET_VRING_ADDR", str(error)) from None
                self._restart(state)
        self._scan(message.index)
        return None

    def _restart(self, state: VringState) -> None:
        """A started ring was moved: go on at the same index in the new place."""
        enabled = state.enabled
        state.stop()
        state.enabled = enabled
        state.set_queue_ready(self._memory.current)

    def _set_vring_base(self, message: vp.SetVringBase, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_BASE", message.index)
        packed = self.features & VirtioFeature.RING_PACKED
        if message.base > 0xFFFF and not packed:
            raise Refused("SET_VRING_BASE", f"{message.base:#x} is no index of a split ring")
        with vring.get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_BASE", f"vring {message.index} is started")
            state.set_queue_next_avail(message.base)
        return None

    def _get_vring_base(self, message: vp.GetVringBase, fds: Fds) -> Outcome:
        vring = self._vring("GET_VRING_BASE", message.index)
        # From here on a late kick finds nobody, and no new chain is taken.
        self._unwatch(message.index)
        with vring.get_mut() as state:
            state.begin_drain(self._on_drained)
            drained = state.queue is None or not state.queue.in_flight
            state.set_kick(-1)
        return self.stopped(message.index) if drained else Draining(message.index)

    def _set_vring_kick(self, message: vp.SetVringKick, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_KICK", message.index)
        worker, position = self._places[message.index]
        with vring.get_ref() as state:
            if state.addresses is None:
                raise Refused("SET_VRING_KICK", f"vring {message.index} has no addresses yet")
            try:
                state.config().check()
            except UsageError as error:
                raise Refused("SET_VRING_KICK", str(error)) from None
        worker.unwatch(position)
        with vring.get_mut() as state:
            state.set_kick(fds[0].detach() if fds else -1)
            kick_fd = state.kick_fd
            if not state.started:
                state.set_queue_ready(self._memory.current)
        try:
            # The worker looks at the ring at once: what was made available before the kick
            # descriptor came is not announced again.
            worker.watch(position, kick_fd)
        except OSError as error:
            raise Refused("SET_VRING_KICK", f"cannot wait on the descriptor: {error}") from None
        return None

    def _set_vring_call(self, message: vp.SetVringCall, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_CALL", message.index)
        with vring.get_mut() as state:
            state.set_call(fds[0].detach() if fds else -1)
            if state.started:
                # What completed while there was no descriptor, or the old one, is announced here.
                state.signal_call()
        return None

    def _set_vring_err(self, message: vp.SetVringErr, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_ERR", message.index)
        with vring.get_mut() as state:
            state.set_err(fds[0].detach() if fds else -1)
        return None

    def _set_vring_enable(self, message: vp.SetVringEnable, fds: Fds) -> Outcome:
        vring = self._vring("SET_VRING_ENABLE", message.index)
        if not self.features & VirtioFeature.PROTOCOL_FEATURES:
            raise Refused("SET_VRING_ENABLE", "VHOST_USER_F_PROTOCOL_FEATURES is not negotiated")
        with vring.get_mut() as state:
            state.set_enabled(message.enable)
        self._scan(message.index)
        return None

    # -- in-flight tracking ---------------------------------------------------------------------

    def _get_inflight_fd(self, message: vp.GetInflightFd, fds: Fds) -> Outcome:
        each = self._inflight_size("GET_INFLIGHT_FD", message)
        size = message.num_queues * each
        # The front-end keeps this memory while we are away; it begins as zeroes, which every
        # queue takes for "never used".
        fd = allocate_memfd(size, "vhost-inflight")
        try:
            self._use_inflight(SharedMapping(fd, size), each, message.num_queues)
        except BaseException:
            os.close(fd)
            raise
        reply = vp.InflightReply(size, 0, message.num_queues, message.queue_size)
        return Answer(reply, (fd,), close=True)

    def _set_inflight_fd(self, message: vp.SetInflightFd, fds: Fds) -> Outcome:
        each = self._inflight_size("SET_INFLIGHT_FD", message)
        if message.mmap_size < message.num_queues * each:
            raise Refused(
                "SET_INFLIGHT_FD",
                f"{message.mmap_size} bytes do not hold {message.num_queues} queues of {each}",
            )
        try:
            mapping = SharedMapping(fds[0].fileno(), message.mmap_size, message.mmap_offset)
        except GuestMemoryError as error:
            raise Refused("SET_INFLIGHT_FD", str(error)) from error
        self._use_inflight(mapping, each, message.num_queues)
        return None

    def _inflight_size(self, request: str, message: vp.GetInflightFd | vp.SetInflightFd) -> int:
        packed = bool(self.features & VirtioFeature.RING_PACKED)
        if not 0 < message.num_queues <= len(self._vrings):
            raise Refused(request, f"there are no {message.num_queues} queues")
        if not 0 < message.queue_size <= self._backend.max_queue_size():
            raise Refused(request, f"no queue has {message.queue_size} descriptors")
        return inflight_size(message.queue_size, packed)

    def _use_inflight(self, mapping: SharedMapping, each: int, queues: int) -> None:
        for index, vring in enumerate(self._vrings[:queues]):
            with vring.get_mut() as state:
                if state.started:
                    raise Refused("SET_INFLIGHT_FD", f"vring {index} is started")
        for index, vring in enumerate(self._vrings[:queues]):
            with vring.get_mut() as state:
                state.inflight = InflightRegion(mapping.address + index * each, each, mapping)

    # -- configuration space --------------------------------------------------------------------

    def _get_config(self, message: vp.GetConfig, fds: Fds) -> Outcome:
        data = self._backend.get_config(message.offset, message.size)
        if len(data) != message.size:
            data = b""  # an answer without data is the protocol's "cannot"
        return Answer(vp.ConfigReply(message.offset, message.flags, data))

    def _set_config(self, message: vp.SetConfig, fds: Fds) -> Outcome:
        self._backend.set_config(message.offset, message.data)
        return None

    # -- workers --------------------------------------------------------------------------------

    def _scan(self, index: int) -> None:
        worker, position = self._places[index]
        worker.scan(position)

    def _unwatch(self, index: int) -> None:
        worker, position = self._places[index]
        worker.unwatch(position)


def _region(region: vp.MemoryRegion) -> Region:
    return Region(
        GuestAddress(region.guest_address),
        region.size,
        UserAddress(region.user_address),
        region.mmap_offset,
        int(region.flags),
        region.domid,
    )


def _places(
    backend: VhostUserBackend, vrings: Sequence[Vring], workers: Sequence[VringEpollHandler]
) -> list[tuple[VringEpollHandler, int]]:
    places: list[tuple[VringEpollHandler, int]] = []
    for vring in vrings:
        for worker in workers:
            if vring in worker.vrings:
                places.append((worker, worker.vrings.index(vring)))
                break
    return places
