"""Moving the device's own state ("Migrating back-end state").

The front-end passes a channel. The back-end saves its state into the channel, or loads it from
there, on a thread of its own. CHECK_DEVICE_STATE then asks whether the transfer succeeded, once the
channel's other end is closed.
"""

from __future__ import annotations

from collections.abc import Callable

import vhost_protocol as vp

from ..backend import STATE_TRANSFER, VhostUserBackendBase, provided
from ..errors import Refused
from .context import Context
from .outcome import Answer, Descriptors, Outcome


class DeviceState:
    """SET_DEVICE_STATE_FD and CHECK_DEVICE_STATE."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.SetDeviceStateFd: self._set_fd,
            vp.CheckDeviceState: self._check,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """DEVICE_STATE, for a back-end that has the hooks."""
        backend = self._context.backend
        return STATE_TRANSFER.offers(backend, backend.protocol_features())

    def disconnect(self) -> None:
        """Abandon a transfer: this front-end's state must not reach the device under the next one.

        A back-end without the method handles its own transfers.
        """
        abandon = provided(self._context.backend, VhostUserBackendBase.abandon_device_state)
        if abandon is not None:
            abandon()

    def _set_fd(self, message: vp.SetDeviceStateFd, fds: Descriptors) -> Outcome:
        context = self._context
        for index, vring in enumerate(context.vrings):
            with vring.get_ref() as state:
                if state.started:
                    raise Refused("SET_DEVICE_STATE_FD", f"vring {index} is started")
        own = context.backend.set_device_state_fd(
            int(message.direction), int(message.phase), fds[0].detach()
        )
        if own is None:
            return Answer(vp.DeviceStateReply())
        return Answer(vp.DeviceStateReply(0), (own,), close=True)

    def _check(self, message: vp.CheckDeviceState, fds: Descriptors) -> Outcome:
        return Answer(vp.Ack(0 if self._context.backend.check_device_state() else 1))
