"""Rings: size, place, position, descriptors, started, enabled ("Ring states")."""

from __future__ import annotations

import logging
from collections.abc import Callable

import vhost_protocol as vp
from virtqueue import UsageError

from .. import eventfd
from ..errors import Refused
from ..features import VirtioFeature
from ..vring import VringState
from ..vring_locks import Vring
from .context import MAX_RING_SIZE, Context
from .outcome import Answer, Descriptors, Outcome, Wait

log: logging.Logger = logging.getLogger("vhost_backend")


class Rings:
    """Everything that names a vring."""

    def __init__(self, context: Context) -> None:
        self._context = context
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

    def begin_drain(self) -> list[int]:
        """Take no new chains; returns the rings that still have requests in flight."""
        context = self._context
        busy = []
        for index, vring in enumerate(context.vrings):
            context.unwatch(index)
            with vring.get_mut() as state:
                state.begin_drain(context.wake)
                if state.in_flight:
                    busy.append(index)
        return busy

    def disconnect(self) -> None:
        """Rings as new, descriptors closed."""
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                state.reset()
        self._context.device_stopped()

    def reset(self, then: Callable[[], None]) -> Outcome:
        """Rings stopped and disabled ("RESET_DEVICE"), and `then`; what was negotiated stays.

        So does where each ring stood: QEMU 7.2 resets the status whenever its guest pauses, asks
        for the base after, and lets the guest go on there, perhaps elsewhere. What is in flight is
        therefore finished first; its requests are counted in the base and would be lost.
        """
        return self._when_drained(lambda: self._reset(then), "a reset waits for them")

    def _reset(self, then: Callable[[], None]) -> None:
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                features, log, base = state.features, state.log, state.stop()
                state.reset()
                state.features, state.log, state.base = features, log, base
        self._context.device_stopped()
        then()

    def stop(self, then: Callable[[], None]) -> Outcome:
        """Rings stopped, as by GET_VRING_BASE for each, and `then`."""
        return self._when_drained(lambda: self._stop_all(then), "all rings stop")

    def _stop_all(self, then: Callable[[], None]) -> None:
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                state.stop()
                state.set_kick(-1)
        self._context.device_stopped()
        then()

    def _when_drained(self, finish: Callable[[], None], what: str) -> Outcome:
        """No new chains; `finish` once no request is in flight."""
        if not self.begin_drain():
            finish()
            return None
        return Wait(
            lambda: not any(self._in_flight(index) for index in range(len(self._context.vrings))),
            finish,
            what,
        )

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
            moves = state.started and state.addresses != addresses
            if moves:
                descriptor, driver, device = addresses
                config = state.config()._replace(
                    descriptor_address=descriptor, driver_address=driver, device_address=device
                )
                try:
                    config.check()
                except UsageError as error:
                    raise Refused("SET_VRING_ADDR", str(error)) from None
                # What is in flight completes where it was taken.
                state.begin_drain(context.wake)
            else:
                state.addresses = addresses
                state.set_log(state.log, log_used)
        if moves:
            return Wait(
                lambda: not self._in_flight(index),
                lambda: self._move(index, addresses, log_used),
                f"vring {index} moves",
            )
        context.scan(index)
        return None

    def _move(self, index: int, addresses: tuple[int, int, int], log_used: int | None) -> None:
        """A started ring goes on at the same index in a new place."""
        context = self._context
        with context.vrings[index].get_mut() as state:
            state.stop()
            state.addresses = addresses
            state.set_log(state.log, log_used)
            state.set_queue_ready(context.memory.current)
        context.scan(index)

    def _set_base(self, message: vp.SetVringBase, fds: Descriptors) -> Outcome:
        context = self._context
        vring = context.vring("SET_VRING_BASE", message.index)
        base = message.base
        if context.features & VirtioFeature.RING_PACKED:
            if 0 < base <= 0xFFFF:
                # DPDK's virtio-user gives the driver's half alone, of a ring that is drained.
                base |= base << 16
        elif base > 0xFFFF:
            raise Refused("SET_VRING_BASE", f"{base:#x} is no index of a split ring")
        with vring.get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_BASE", f"vring {message.index} is started")
            state.set_queue_next_avail(base)
        return None

    def _set_endian(self, message: vp.SetVringEndian, fds: Descriptors) -> Outcome:
        with self._context.vring("SET_VRING_ENDIAN", message.index).get_mut() as state:
            if state.started:
                raise Refused("SET_VRING_ENDIAN", f"vring {message.index} is started")
            if message.big_endian and state.features & VirtioFeature.VERSION_1:
                raise Refused("SET_VRING_ENDIAN", "a VERSION_1 device is little-endian")
            state.big_endian = message.big_endian
        return None

    # -- start and stop -------------------------------------------------------------------------

    def _set_kick(self, message: vp.SetVringKick, fds: Descriptors) -> Outcome:
        context = self._context
        vring = context.vring("SET_VRING_KICK", message.index)
        if fds and not eventfd.can_kick(fds[0].fileno()):
            raise Refused("SET_VRING_KICK", "not an eventfd, a pipe or a socket")
        with vring.get_ref() as state:
            self._check_startable("SET_VRING_KICK", state)
        worker, position = context.place(message.index)
        worker.unwatch(position)
        in_band = context.has(vp.ProtocolFeatures.INBAND_NOTIFICATIONS)
        with vring.get_mut() as state:
            state.set_kick(fds[0].detach() if fds else -1)
            kick_fd, enabled = state.kick_fd, state.enabled
            if not state.started:
                self._start(state)
        if kick_fd < 0 and in_band:
            context.scan(message.index)
            return None
        try:
            # The worker looks at the ring at once, or when it is enabled: what was made available
            # before the kick descriptor came is not announced again.
            worker.watch(position, kick_fd, scan=enabled)
        except OSError as error:
            raise Refused("SET_VRING_KICK", f"cannot wait on the descriptor: {error}") from None
        return None

    def _kick(self, message: vp.VringKick, fds: Descriptors) -> Outcome:
        context = self._context
        with context.vring("VRING_KICK", message.index).get_mut() as state:
            if not state.started:
                self._check_startable("VRING_KICK", state)
                self._start(state)
        context.scan(message.index)
        return None

    def _check_startable(self, request: str, state: VringState) -> None:
        if state.addresses is None:
            raise Refused(request, f"vring {state.index} has no addresses yet")
        try:
            state.config().check()
        except UsageError as error:
            raise Refused(request, str(error)) from None

    def _start(self, state: VringState) -> None:
        context = self._context
        context.device_started()
        if context.has(vp.ProtocolFeatures.INBAND_NOTIFICATIONS):
            state.channel = context.channel
        try:
            state.set_queue_ready(context.memory.current)
        except UsageError as error:
            raise Refused("SET_VRING_KICK", str(error)) from None
        context.unshared.ring_started()
        log.debug(
            "%s: queue %d starts: %d descriptors, %s, from %#x, kicks by %s, calls by %s",
            *(context.name, state.index, state.size),
            "packed" if state.features & VirtioFeature.RING_PACKED else "split",
            state.base,
            "descriptor" if state.kick_fd >= 0 else "message or polling",
            "descriptor" if state.call_fd >= 0 else "message or none",
        )
        # A back-end before us may have died between showing the driver what it completed and
        # signalling it. The driver may wait for that and for nothing else; one time too many is
        # harmless.
        if state.has_news:
            state.signal_call()

    def _get_base(self, message: vp.GetVringBase, fds: Descriptors) -> Outcome:
        context = self._context
        if context.has(vp.ProtocolFeatures.GET_VRING_BASE_INFLIGHT) and not context.has(
            vp.ProtocolFeatures.GET_VRING_BASE_SKIP_DRAIN
        ):
            # Before it got a message of its own, bit 20 alone meant not to drain.
            return self._suspend(message.index)
        vring = context.vring("GET_VRING_BASE", message.index)
        # From here on a late kick finds nobody, and no new chain is taken.
        context.unwatch(message.index)
        with vring.get_mut() as state:
            state.begin_drain(context.wake)
        return Wait(
            lambda: not self._in_flight(message.index),
            lambda: self._stop(message.index),
            f"vring {message.index} drains",
        )

    def _get_base_skip_drain(self, message: vp.GetVringBaseSkipDrain, fds: Descriptors) -> Outcome:
        return self._suspend(message.index)

    def _suspend(self, index: int) -> Outcome:
        """Stop a ring without waiting for its requests; whoever has the in-flight region goes on.

        What a device cannot let go of is waited for all the same: it would touch the device's
        medium when the guest has long got another answer elsewhere.
        """
        context = self._context
        vring = context.vring("GET_VRING_BASE", index)
        suspend = context.hook("suspend_queue")
        if suspend is None:
            return self._stop(index)
        context.unwatch(index)
        with vring.get_mut() as state:
            state.begin_drain(context.wake)
        suspended = suspend(index, context.wake)
        return Wait(
            lambda: suspended() or not self._in_flight(index),
            lambda: self._stop(index),
            f"vring {index} is suspended",
        )

    def _stop(self, index: int) -> Answer:
        """Stop a ring now. What is in flight stays in the in-flight region, if there is one."""
        vring = self._context.vring("GET_VRING_BASE", index)
        self._context.unwatch(index)
        with vring.get_mut() as state:
            base = state.stop()
            state.set_kick(-1)
        log.debug("%s: queue %d stops at %#x", self._context.name, index, base)
        if not any(self._started(vring) for vring in self._context.vrings):
            self._context.device_stopped()
        return Answer(vp.VringBaseReply(index, base))

    def _started(self, vring: Vring) -> bool:
        with vring.get_ref() as state:
            return state.started

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
                # What completed while there was no descriptor, or the old one, is announced here.
                state.signal_call()
        return None

    def _set_err(self, message: vp.SetVringErr, fds: Descriptors) -> Outcome:
        with self._context.vring("SET_VRING_ERR", message.index).get_mut() as state:
            state.set_err(fds[0].detach() if fds else -1)
        return None
