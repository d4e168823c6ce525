"""Messages for the device itself: configuration space, status, reset, and its type's messages.

The back-end's hooks decide which features are offered: see `device.hooks`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import vhost_protocol as vp

from ..backend import (
    BY_REQUEST,
    CRYPTO_SESSIONS,
    GPU_SOCKET,
    MTU,
    OF_A_TYPE,
    RARP,
    HookGroup,
)
from ..errors import DeviceRefused
from ..rate_limited_log import RateLimited
from .context import Context
from .outcome import Answer, Descriptors, Outcome

log: logging.Logger = logging.getLogger("vhost_backend")

H = TypeVar("H")


class Device:
    """Messages that are passed on to the back-end."""

    def __init__(
        self, context: Context, reset_rings: Callable[[Callable[[], None]], Outcome]
    ) -> None:
        self._context = context
        self._reset_rings = reset_rings
        self._faults = RateLimited(log)
        self._status = 0
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.GetConfig: self._get_config,
            vp.SetConfig: self._set_config,
            vp.GetStatus: self._get_status,
            vp.SetStatus: self._set_status,
            vp.ResetDevice: self._reset_device,
            vp.SendRarp: self._send_rarp,
            vp.NetSetMtu: self._net_set_mtu,
            vp.CreateCryptoSession: self._create_crypto_session,
            vp.CloseCryptoSession: self._close_crypto_session,
            vp.GetSharedObject: self._get_shared_object,
            vp.GetShmemConfig: self._get_shmem_config,
            vp.GpuSetSocket: self._gpu_set_socket,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """RESET_DEVICE and STATUS for every device; others where it has the hooks."""
        backend = self._context.backend
        asked = backend.protocol_features()
        features = vp.ProtocolFeatures.RESET_DEVICE | vp.ProtocolFeatures.STATUS
        features |= asked & BY_REQUEST
        for group in OF_A_TYPE:
            features |= group.offers(backend, asked)
        return features

    def disconnect(self) -> None:
        """Forget the driver's status; the device keeps its own state."""
        self._status = 0

    def _get_config(self, message: vp.GetConfig, fds: Descriptors) -> Outcome:
        data = self._context.backend.get_config(message.offset, message.size)
        if len(data) != message.size:
            if data:  # a back-end without a configuration space returns no data
                self._faults.error(
                    "%s.get_config returned %d bytes of %d at %d",
                    self._context.device_name,
                    len(data),
                    message.size,
                    message.offset,
                )
            data = b""  # in the protocol, an answer without data means failure
        return Answer(vp.ConfigReply(message.offset, message.flags, data))

    def _set_config(self, message: vp.SetConfig, fds: Descriptors) -> Outcome:
        self._context.backend.set_config(message.offset, message.data)
        return None

    def _get_status(self, message: vp.GetStatus, fds: Descriptors) -> Outcome:
        return Answer(vp.StatusReply(self._status))

    def _set_status(self, message: vp.SetStatus, fds: Descriptors) -> Outcome:
        before, self._status = self._status, message.status
        return self._reset() if before and not message.status else None

    def _reset_device(self, message: vp.ResetDevice, fds: Descriptors) -> Outcome:
        self._status = 0
        return self._reset()

    def _reset(self) -> Outcome:
        return self._reset_rings(self._context.backend.reset_device)

    # -- by device type -------------------------------------------------------------------------

    def _has(self, group: HookGroup[H]) -> H:
        """The back-end, which must have those hooks.

        Raises `DeviceRefused` where it lacks them: a front-end may ask although it was not offered.
        """
        device = group.of(self._context.backend)
        if device is None:
            raise DeviceRefused(f"{self._context.device_name} has no {' and '.join(group.hooks)}")
        return device

    def _send_rarp(self, message: vp.SendRarp, fds: Descriptors) -> Outcome:
        self._has(RARP).send_rarp(message.mac)
        return None

    def _net_set_mtu(self, message: vp.NetSetMtu, fds: Descriptors) -> Outcome:
        self._has(MTU).net_set_mtu(message.mtu)
        return None

    def _create_crypto_session(self, message: vp.CreateCryptoSession, fds: Descriptors) -> Outcome:
        device = self._has(CRYPTO_SESSIONS)
        session_id = device.create_crypto_session(message.op_code, message.session)
        return Answer(vp.CryptoSessionReply(message.op_code, message.session, session_id))

    def _close_crypto_session(self, message: vp.CloseCryptoSession, fds: Descriptors) -> Outcome:
        self._has(CRYPTO_SESSIONS).close_crypto_session(message.session_id)
        return None

    def _get_shared_object(self, message: vp.GetSharedObject, fds: Descriptors) -> Outcome:
        fd = self._context.backend.get_shared_object(message.uuid.bytes)
        return Answer(vp.SharedObjectReply(), () if fd is None else (fd,))

    def _get_shmem_config(self, message: vp.GetShmemConfig, fds: Descriptors) -> Outcome:
        return Answer(vp.ShmemConfigReply(tuple(self._context.backend.get_shmem_config())))

    def _gpu_set_socket(self, message: vp.GpuSetSocket, fds: Descriptors) -> Outcome:
        device = self._has(GPU_SOCKET)
        device.set_gpu_socket(vp.GpuBackendChannel.from_fd(fds.pop(), timeout=5.0))
        return None
