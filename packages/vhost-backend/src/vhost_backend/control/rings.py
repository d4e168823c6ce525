"""Rings: size, addresses, position, descriptors, started, enabled ("Ring states")."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Final

import vhost_protocol as vp
from virtqueue import UsageError

from ..backend import VhostUserBackendBase, provided
from ..errors import Refused
from ..fds import eventfd
from ..features import VirtioFeature
from ..vring.locks import Vring
from ..vring.state import VringState
from .context import MAX_RING_SIZE, Context
from .device_start import once_started
from .outcome import Answer, Descriptors, Outcome, Wait

log: logging.Logger = logging.getLogger("vhost_backend")

#: A packed ring's wrap counter, in both halves of its base.
_WRAP: Final = 0x8000
#: Where a packed ring begins (virtio 2.8.1): both indices 0, both wrap counters 1.
_PACKED_BEGIN: Final = _WRAP << 16 | _WRAP


class Rings:
    """The messages that name a vring."""

    def __init__(self, context: Context) -> None:
        self._context = context
        #: For each ring with requests of a front-end that has gone: tells whether they have ended.
        self._remains: dict[int, Callable[[], bool]] = {}
        #: Rings whose position the front-end has set, or that have run.
        self._placed: set[int] = set()
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.SetVringNum: self._set_num,
            vp.SetVringAddr: self._set_addr,
            vp.SetVringBase: self._set_base,
            vp.GetVringBase: self._get_base,
            vp.GetVringBaseSkipDrain: self._get_base_skip_drain,
            vp.SetVringKick: self._set_kick,
            vp.SetVringCall: self._set_call,
            vp.SetVringErr: self._set_err,
            vp.SetVringEnable: self._set_enable,
            vp.SetVringEndian: self._set_endian,
            vp.VringKick: self._kick,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """Legacy byte order, notifications as messages, and stopping without a drain."""
        return (
            vp.ProtocolFeatures.CROSS_ENDIAN
            | vp.ProtocolFeatures.INBAND_NOTIFICATIONS
            | vp.ProtocolFeatures.GET_VRING_BASE_INFLIGHT
            | vp.ProtocolFeatures.GET_VRING_BASE_SKIP_DRAIN
        )

    def end(self) -> Callable[[], bool]:
        """Take no new chains; returns a function that tells whether all requests have ended."""
        ready = [self._end(index) for index in range(len(self._context.vrings))]
        return lambda: all(each() for each in ready)

    def disconnect(self) -> None:
        """Make the rings as new, and close their descriptors.

        Requests that the device still works on keep their memory mapped, and the device is not
        stopped until they end; see `settle`.
        """
        context = self._context
        self._placed.clear()
        for index, vring in enumerate(context.vrings):
            context.unwatch(index)
            with vring.get_mut() as state:
                left = state.leave(context.wake)
            if left and index not in self._remains:
                self._remains[index] = self._ended(index)
        if not self._remains:
            context.device_stopped()

    @property
    def remains(self) -> Sequence[int]:
        """Rings on which the device still works for a front-end that has gone."""
        return tuple(self._remains)

    def settle(self) -> None:
        """Once all requests of the last front-end have ended, start the rings that waited."""
        context = self._context
        if not self._remains:
            return
        for index, ready in list(self._remains.items()):
            if ready():
                with context.vrings[index].get_mut() as state:
                    state.left()
                del self._remains[index]
        if self._remains:
            return
        waited = []
        for index, vring in enumerate(context.vrings):
            with vring.get_mut() as state:
                if state.deferred and self._start_late(state):
                    waited.append(index)
        if waited:
            log.warning(
                "%s: requests of the last front-end have ended: vrings %s start",
                *(context.name, waited),
            )
        elif not self._any_started():
            context.device_stopped()
        for index in waited:
            context.scan(index)

    def reset(self, then: Callable[[], None]) -> Outcome:
        """Stop and disable all rings ("RESET_DEVICE"), and call `then`.

        The negotiated features and each ring's base stay. QEMU 7.2 resets the status whenever its
        guest pauses, asks for the base afterwards, and continues the guest from there, perhaps on
        another host. The base counts requests in flight, so they are finished first; otherwise they
        would be lost.
        """
        return self._when_ended(lambda: self._reset(then))

    def _reset(self, then: Callable[[], None]) -> None:
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                base, settings = state.stop(), state.settings
                state.reset()
                state.settings.features, state.settings.log = settings.features, settings.log
                state.set_queue_next_avail(base)
        self._device_stopped()
        then()

    def recall(self) -> Callable[[], None]:
        """Call back requests that only wait, so that they let go of memory.

        The returned function lets the rings go on; they take those requests again, with the present
        snapshot of memory.
        """
        context = self._context
        recalled = []
        if provided(context.backend, VhostUserBackendBase.suspend_queue) is not None:
            for index, vring in enumerate(context.vrings):
                with vring.get_ref() as state:
                    unsettled = not state.settled
                if unsettled:
                    self._quiesce(index, keep=False)
                    recalled.append(index)

        def resume() -> None:
            for index in recalled:
                with context.vrings[index].get_mut() as state:
                    state.draining = False
                context.scan(index)

        return resume

    def _end(self, index: int) -> Callable[[], bool]:
        """`_quiesce`, and stop watching the kick descriptor: a late kick has no effect."""
        self._context.unwatch(index)
        return self._quiesce(index)

    def _quiesce(self, index: int, *, keep: bool = True) -> Callable[[], bool]:
        """Take no new chains; returns a function that tells whether all requests have ended.

        The hook `suspend_queue` calls back requests that only wait, where a device has them. With
        `keep` a request that cannot be given back stays in the in-flight region.
        """
        context = self._context
        with context.vrings[index].get_mut() as state:
            state.begin_drain(context.wake)
        if index in self._remains:
            return lambda: True  # its ring waits, and has taken nothing
        return self._ended(index, keep=keep)

    def _ended(self, index: int, *, keep: bool = True) -> Callable[[], bool]:
        context = self._context
        suspend = provided(context.backend, VhostUserBackendBase.suspend_queue)
        if suspend is None:
            return lambda: not self._in_flight(index)
        return suspend(index, context.wake, keep)

    def _device_stopped(self) -> None:
        if not self._remains:
            self._context.device_stopped()

    def _any_started(self) -> bool:
        for vring in self._context.vrings:
            with vring.get_ref() as state:
                if state.started:
                    return True
        return False

    def stop(self, then: Callable[[], None]) -> Outcome:
        """Stop all rings, as by GET_VRING_BASE for each, and call `then`."""
        return self._when_ended(lambda: self._stop_all(then))

    def _stop_all(self, then: Callable[[], None]) -> None:
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                state.stop()
                state.set_kick(-1)
        self._device_stopped()
        then()

    def _when_ended(self, finish: Callable[[], None]) -> Outcome:
        """Take no new chains, and call `finish` once all requests have ended."""
        ended = self.end()
        if ended():
            finish()
            return None
        return Wait(ended, finish, range(len(self._context.vrings)))

    # -- configuration --------------------------------------------------------------------------

    def _set_num(self, message: vp.SetVringNum, fds: Descriptors) -> Outcome:
        context = self._context
        vring = context.vring("SET_VRING_NUM", message.index)
        size = message.num
        if not 0 < size <= MAX_RING_SIZE:
            raise Refused("SET_VRING_NUM", f"{size} is not in 1 to {MAX_RING_SIZE}")
        if size & (size - 1) and not context.features & VirtioFeature.RING_PACKED:
            raise Refused("SET_VRING_NUM", f"{size} is not a power of two")
        with vring.get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_NUM", f"vring {message.index} is started")
            state.set_queue_size(size)
        return None

    def _set_addr(self, message: vp.SetVringAddr, fds: Descriptors) -> Outcome:
        context = self._context
        index = message.index
        addresses = (message.descriptor, message.available, message.used)
        log_used = message.log if message.flags & vp.VringFlags.LOG else None
        with context.vring("SET_VRING_ADDR", index).get_mut() as state:
            moves = state.started and state.settings.addresses != addresses
            if moves:
                descriptor, driver, device = addresses
                config = state.config()._replace(
                    descriptor_address=descriptor, driver_address=driver, device_address=device
                )
                try:
                    config.check()
                except UsageError as error:
                    raise Refused("SET_VRING_ADDR", str(error)) from None
                # Requests in flight complete in the old place first: see the `Wait` below.
            else:
                state.settings.addresses = addresses
                state.set_log(state.settings.log, log_used)
        if moves:
            ready = self._quiesce(index)
            return Wait(
                ready,
                lambda: self._move(index, addresses, log_used),
                (index,),
                f"vring {index}",
            )
        context.scan(index)
        return None

    def _move(self, index: int, addresses: tuple[int, int, int], log_used: int | None) -> None:
        """Continue a started ring at the same index in a new place."""
        context = self._context
        with context.vrings[index].get_mut() as state:
            state.stop()
            state.settings.addresses = addresses
            state.set_log(state.settings.log, log_used)
            self._make_queue(state)
        context.scan(index)

    def _set_base(self, message: vp.SetVringBase, fds: Descriptors) -> Outcome:
        context = self._context
        vring = context.vring("SET_VRING_BASE", message.index)
        base = message.base
        if context.features & VirtioFeature.RING_PACKED:
            base = self._whole_base(vring, base)
        elif base > 0xFFFF:
            raise Refused("SET_VRING_BASE", f"{base:#x} is no index of a split ring")
        with vring.get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_BASE", f"vring {message.index} is started")
            state.set_queue_next_avail(base)
        self._placed.add(message.index)
        return None

    def _whole_base(self, vring: Vring, base: int) -> int:
        """Complete a packed base of which the front-end gave only the driver's half.

        DPDK's virtio-user gives only that half, of a drained ring. But a used half of 0 is meant
        where there is an in-flight region and the driver's wrap counter is 0: the device then
        stands at 0 with a wrap counter of 0, and its requests are in the region.
        """
        with vring.get_ref() as state:
            recorded = state.settings.inflight is not None
        meant = recorded and not base & _WRAP
        return base if not 0 < base <= 0xFFFF or meant else base | base << 16

    def _set_endian(self, message: vp.SetVringEndian, fds: Descriptors) -> Outcome:
        with self._context.vring("SET_VRING_ENDIAN", message.index).get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_ENDIAN", f"vring {message.index} is started")
            if message.big_endian and state.settings.features & VirtioFeature.VERSION_1:
                raise Refused("SET_VRING_ENDIAN", "a VERSION_1 device is little-endian")
            state.settings.big_endian = message.big_endian
        return None

    # -- start and stop -------------------------------------------------------------------------

    def _set_kick(self, message: vp.SetVringKick, fds: Descriptors) -> Outcome:
        context = self._context
        vring = context.vring("SET_VRING_KICK", message.index)
        if fds and not eventfd.can_kick(fds[0].fileno()):
            raise Refused("SET_VRING_KICK", "not an eventfd, a pipe or a socket")
        with vring.get_ref() as state:
            self._check_startable("SET_VRING_KICK", state)
        return once_started(context, lambda: self._watch_kick(message, fds))

    def _watch_kick(self, message: vp.SetVringKick, fds: Descriptors) -> None:
        context = self._context
        vring = context.vrings[message.index]
        worker, position = context.place(message.index)
        worker.unwatch(position)
        in_band = context.has(vp.ProtocolFeatures.INBAND_NOTIFICATIONS)
        with vring.get_mut() as state:
            state.set_kick(fds[0].detach() if fds else -1)
            kick_fd, enabled = state.kick_fd, state.enabled
            if not state.started:
                self._start("SET_VRING_KICK", state)
        if kick_fd < 0 and in_band:
            context.scan(message.index)
            return
        try:
            # The worker looks at the ring at once, or when it is enabled: the driver does not kick
            # again for chains that it made available before the descriptor came.
            worker.watch(position, kick_fd, scan=enabled)
        except OSError as error:
            raise Refused("SET_VRING_KICK", f"cannot wait on the descriptor: {error}") from error

    def _kick(self, message: vp.VringKick, fds: Descriptors) -> Outcome:
        context = self._context
        with context.vring("VRING_KICK", message.index).get_ref() as state:
            if not state.started:
                self._check_startable("VRING_KICK", state)
        return once_started(self._context, lambda: self._start_kicked(message.index))

    def _start_kicked(self, index: int) -> None:
        with self._context.vrings[index].get_mut() as state:
            if not state.started:
                self._start("VRING_KICK", state)
        self._context.scan(index)

    def _check_startable(self, request: str, state: VringState) -> None:
        if state.settings.addresses is None:
            raise Refused(request, f"vring {state.index} has no addresses yet")
        try:
            state.config().check()
        except UsageError as error:
            raise Refused(request, str(error)) from None

    def _start(self, request: str, state: VringState) -> None:
        context = self._context
        if self._at_packed_begin(state):
            state.set_queue_next_avail(_PACKED_BEGIN)
        self._placed.add(state.index)
        if context.has(vp.ProtocolFeatures.INBAND_NOTIFICATIONS):
            state.signals.channel = context.channel
        try:
            self._make_queue(state)
        except UsageError as error:
            raise Refused(request, str(error)) from None
        context.unshared.ring_started()
        log.debug(
            "%s: queue %d starts: %d descriptors, %s, from %#x, kicks by %s, calls by %s",
            *(context.name, state.index, state.settings.size),
            "packed" if state.settings.features & VirtioFeature.RING_PACKED else "split",
            state.settings.base,
            "descriptor" if state.kick_fd >= 0 else "message or polling",
            "descriptor" if state.call_fd >= 0 else "message or none",
        )
        if state.deferred:
            return
        # An earlier back-end may have died between publishing a completion and signalling it, and
        # the driver may wait for just that signal. One signal too many is harmless.
        if state.has_news:
            state.signal_call()

    def _at_packed_begin(self, state: VringState) -> bool:
        """Whether it is a packed ring that has no position yet."""
        packed = state.settings.features & VirtioFeature.RING_PACKED
        return bool(packed) and state.index not in self._placed

    def _make_queue(self, state: VringState) -> None:
        """Start the ring now, or once all requests of the last front-end have ended."""
        if self._remains:
            state.started = state.deferred = True
            log.warning(
                "%s: vring %d waits: the device still works for the last front-end (vrings %s)",
                self._context.name,
                state.index,
                list(self._remains),
            )
            return
        state.set_queue_ready(self._context.memory.current)

    def _start_late(self, state: VringState) -> bool:
        """Start a ring that has waited; False where a later SET_FEATURES allows no such ring.

        SET_VRING_KICK is acknowledged already, so a failure is told by the error descriptor.
        """
        try:
            self._make_queue(state)
        except UsageError as error:
            log.warning(
                "%s: queue %d cannot start: %s; the driver has to set it up anew",
                *(self._context.name, state.index, error),
            )
            state.stop()
            state.signals.error()
            return False
        state.signal_call()
        return True

    def _get_base(self, message: vp.GetVringBase, fds: Descriptors) -> Outcome:
        # Older front-ends ask to skip the drain by this message with GET_VRING_BASE_INFLIGHT (bit
        # 20) alone. Both messages get the same stop here, so the bit changes nothing.
        return self._drain("GET_VRING_BASE", message.index)

    def _get_base_skip_drain(self, message: vp.GetVringBaseSkipDrain, fds: Descriptors) -> Outcome:
        return self._drain("GET_VRING_BASE_SKIP_DRAIN", message.index)

    def _drain(self, request: str, index: int) -> Outcome:
        self._context.vring(request, index)
        return Wait(
            self._end(index),
            lambda: self._stop(index),
            (index,),
            f"vring {index}",
        )

    def _stop(self, index: int) -> Answer:
        """Stop a ring now; requests in flight stay in the in-flight region, if there is one."""
        vring = self._context.vrings[index]
        self._context.unwatch(index)
        with vring.get_mut() as state:
            base = state.stop()
            if self._at_packed_begin(state):
                base = _PACKED_BEGIN
            state.set_kick(-1)
        log.debug("%s: queue %d stops at %#x", self._context.name, index, base)
        if not self._any_started():
            self._device_stopped()
        return Answer(vp.VringBaseReply(index, base))

    def _in_flight(self, index: int) -> int:
        with self._context.vrings[index].get_ref() as state:
            return state.in_flight

    def _set_enable(self, message: vp.SetVringEnable, fds: Descriptors) -> Outcome:
        context = self._context
        vring = context.vring("SET_VRING_ENABLE", message.index)
        with vring.get_mut() as state:
            state.set_enabled(message.enable)
        context.scan(message.index)
        return None

    # -- descriptors ----------------------------------------------------------------------------

    def _set_call(self, message: vp.SetVringCall, fds: Descriptors) -> Outcome:
        with self._context.vring("SET_VRING_CALL", message.index).get_mut() as state:
            state.set_call(fds[0].detach() if fds else -1)
            if state.started and state.call_fd >= 0 and state.has_news:
                # Signal completions that came while there was no descriptor, or the old one.
                state.signal_call()
        return None

    def _set_err(self, message: vp.SetVringErr, fds: Descriptors) -> Outcome:
        with self._context.vring("SET_VRING_ERR", message.index).get_mut() as state:
            state.set_err(fds[0].detach() if fds else -1)
        return None
