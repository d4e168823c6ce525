"""Logging the device's writes to guest memory, for live migration ("Migration").

Buffers are logged while LOG_ALL is negotiated, and a used ring after its addresses were set with
VHOST_VRING_F_LOG. Both may change at any time, and neither touches an index. The rings mark pages
in the log; this section only sets and drops it.
"""

from __future__ import annotations

import os
from collections.abc import Callable

import vhost_protocol as vp
from guest_memory import DirtyLog, GuestMemoryError

from ..errors import Refused
from ..fds import eventfd
from ..features import VirtioFeature
from .context import Context
from .outcome import Descriptors, Outcome


class Logging:
    """SET_LOG_BASE, SET_LOG_FD, and switching LOG_ALL."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._fd = -1
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.SetLogBase: self._set_base,
            vp.SetLogFd: self._set_fd,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """LOG_SHMFD: the front-end shares the log by a descriptor."""
        return vp.ProtocolFeatures.LOG_SHMFD

    def disconnect(self) -> None:
        """Close the log and its descriptor; the rings have let go of both already."""
        self._replace_fd(-1)
        log, self._context.log = self._context.log, None
        if log is not None:
            log.close()

    def features_changed(self) -> None:
        """Switch the log on or off with LOG_ALL."""
        log, wanted = self._context.log, bool(self._context.features & VirtioFeature.LOG_ALL)
        if log is None or log.enabled == wanted:
            return
        log.enabled = wanted
        for vring in self._context.vrings:
            with vring.get_mut():
                # Entering makes a worker in C look anew: there may be a log descriptor to signal.
                pass

    def _set_base(self, message: vp.SetLogBase, fds: Descriptors) -> Outcome:
        context = self._context
        if not fds:
            raise Refused("SET_LOG_BASE", "a log without a descriptor cannot be shared")
        enabled = bool(context.features & VirtioFeature.LOG_ALL)
        try:
            log = DirtyLog(
                fds[0].fileno(),
                message.mmap_size,
                message.mmap_offset,
                enabled=enabled,
                guarded=context.guard.active,
            )
        except GuestMemoryError as error:
            raise Refused("SET_LOG_BASE", str(error)) from error
        if not log.covers(context.memory.current):
            log.close()
            raise Refused("SET_LOG_BASE", f"{message.mmap_size} bytes do not cover all memory")
        context.guard.watch_mapping(log.mapping)
        before, context.log = context.log, log
        for vring in context.vrings:
            with vring.get_mut() as state:
                state.set_log(log, state.settings.log_used)
        context.use_memory(context.memory.current)
        if before is not None:
            before.close()
        return None

    def _set_fd(self, message: vp.SetLogFd, fds: Descriptors) -> Outcome:
        self._replace_fd(eventfd.adopt(fds[0].detach()))
        return None

    def _replace_fd(self, fd: int) -> None:
        """Replace the descriptor; there is one for all rings, and they borrow it."""
        before, self._fd = self._fd, fd
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                state.signals.log_fd = fd
        if before >= 0:
            os.close(before)
