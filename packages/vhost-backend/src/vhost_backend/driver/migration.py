"""Moving a session from one back-end to another while requests run, as a VMM does it.

The back-end logs the pages that it writes, the session's own writes are logged beside them, and
pages are copied until little is left; then the rings are stopped, the rest and the device's state
are moved, and the other back-end goes on where the first one stood.
"""

from __future__ import annotations

import os
from types import TracebackType

import vhost_protocol as vp
from guest_memory import DirtyLog, GuestAddress, allocate_memfd

from ..features import VirtioFeature
from .session import DriverSession
from .vring import SessionError

_PAGE = 4096


class Migration:
    """Moves `session` to another back-end: any number of `copy`, then `finish`.

    A context manager: leaving it without `finish` stops the logging and keeps the session where it
    is. Raises `SessionError` when the back-end cannot log what it writes (LOG_ALL, LOG_SHMFD).
    """

    def __init__(self, session: DriverSession) -> None:
        if not (session.can_log and session.protocol_features & vp.ProtocolFeatures.LOG_SHMFD):
            raise SessionError("the back-end does not offer to log what it writes")
        self._session = session
        (region,) = session.memory.regions
        self._start, self._size = region.guest_address, region.size
        self._copy = allocate_memfd(self._size)
        self._log: DirtyLog | None = None
        self._log_fd = -1
        self._new_log()
        session.frontend.set_features(int(session.features | VirtioFeature.LOG_ALL))
        for index in range(len(session.vrings)):
            self._log_ring(index, log=True)
        for offset in range(0, self._size, 1 << 20):
            self._copy_range(offset, min(1 << 20, self._size - offset))

    def _new_log(self) -> tuple[DirtyLog | None, int]:
        """Log into new memory from now on; the log before, complete.

        The back-end has let go of the old one when it acknowledges the new one.
        """
        session = self._session
        before = self._log, self._log_fd
        size = -(-(self._start + self._size) // _PAGE // 8 // _PAGE) * _PAGE
        self._log_fd = allocate_memfd(size)
        session.frontend.set_log_base(size, 0, self._log_fd)
        self._log = DirtyLog(self._log_fd, size, 0, enabled=True)
        session.memory = session.memory.with_log(self._log)
        return before

    def _log_ring(self, index: int, *, log: bool) -> None:
        vring = self._session.vrings[index]
        config = vring.config
        # The part that the device writes: the used ring, or all of a packed ring.
        used = vring.descriptor_area if config.packed else vring.device_area
        if config.iommu:
            used = config.descriptor_address if config.packed else config.device_address
        self._session.frontend.set_vring_addr(
            index,
            descriptor=config.descriptor_address,
            used=config.device_address,
            available=config.driver_address,
            log=used if log else 0,
            flags=vp.VringFlags.LOG if log else vp.VringFlags(0),
        )

    def _copy_range(self, offset: int, length: int) -> None:
        data = self._session.memory.read(GuestAddress(self._start + offset), length)
        os.pwrite(self._copy, data, offset)

    def copy(self) -> int:
        """Copy the pages that were written since the last time; returns how many."""
        log, fd = self._new_log()
        assert log is not None
        pages = 0
        first = self._start // _PAGE
        bits = bytes(log.view[first // 8 :])
        for byte, value in enumerate(bits):
            if value:
                for bit in range(8):
                    offset = (byte * 8 + bit) * _PAGE
                    if value >> bit & 1 and offset < self._size:
                        self._copy_range(offset, _PAGE)
                        pages += 1
        log.close()
        os.close(fd)
        return pages

    def finish(self, frontend: vp.Frontend) -> None:
        """Stop, move the rest and the device's state, and go on with the back-end at `frontend`.

        Raises `vhost_protocol.RequestFailed` when the device could not save or load its state.
        """
        session = self._session
        bases = [session.stop_ring(vring.index) for vring in session.vrings]
        self.copy()
        # The driver writes its rings and tables past the log.
        for start, length in session.ring_memory:
            self._copy_range(start - self._start, length)
        state = self._save_state()
        self._forget_log()
        fd, self._copy = self._copy, -1
        session.move(frontend, fd)
        if state is not None:
            self._load_state(state)
        for index, base in enumerate(bases):
            session.start_ring(index, base)

    def _save_state(self) -> bytes | None:
        session = self._session
        if not session.protocol_features & vp.ProtocolFeatures.DEVICE_STATE:
            return None
        reader, writer = os.pipe()
        with open(reader, "rb") as file:
            try:
                own = session.frontend.set_device_state_fd(vp.TransferDirection.SAVE, writer)
            finally:
                os.close(writer)
            if own is not None:
                own.close()
                raise SessionError("the back-end wants a channel of its own for its state")
            state = file.read()
        session.frontend.check_device_state()
        return state

    def _load_state(self, state: bytes) -> None:
        frontend = self._session.frontend
        reader, writer = os.pipe()
        with open(writer, "wb") as file:
            try:
                own = frontend.set_device_state_fd(vp.TransferDirection.LOAD, reader)
            finally:
                os.close(reader)
            if own is not None:
                own.close()
                raise SessionError("the back-end wants a channel of its own for its state")
            file.write(state)
        frontend.check_device_state()

    def _forget_log(self) -> None:
        self._session.memory = self._session.memory.with_log(None)
        log, self._log = self._log, None
        if log is not None:
            log.close()
            os.close(self._log_fd)

    def __enter__(self) -> Migration:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._copy < 0:
            return  # finished
        os.close(self._copy)
        self._copy = -1
        self._forget_log()
        session = self._session
        if not session.frontend.closed:
            session.frontend.set_features(int(session.features))
            for index in range(len(session.vrings)):
                self._log_ring(index, log=False)
