"""The stream that carries a device's own state to another host.

The stream is a header {char[8] magic, le32 format, le32 device id, le32 device version, le32 name
length, le64 payload length}, the class name of the device, the payload that
`VirtioDevice.save_state` returned, and le32 CRC-32 of everything before. A stream that is cut
short, damaged, of another device or of a newer version is refused, and the device keeps its state.
"""

from __future__ import annotations

import logging
import os
import select
import struct
import threading
import zlib
from collections.abc import Callable
from typing import Final

from ..errors import VhostBackendError
from ..fds.eventfd import WakeFd
from .base import VirtioDevice, name_of

log: logging.Logger = logging.getLogger("vhost_backend")

MAGIC: Final = b"VDEVSTAT"
FORMAT: Final = 1
#: The most bytes of state that are accepted: more is a mistake or an attack.
MAX_STATE: Final = 1 << 30
#: Seconds without progress after which a transfer is given up.
PATIENCE: Final = 30.0

_HEADER: Final = struct.Struct("<8sIIIIQ")
_CHECKSUM: Final = struct.Struct("<I")


class StateError(VhostBackendError):
    """A state stream cannot be loaded; the message says why."""


def encode(device: VirtioDevice) -> bytes:
    """The device's state as a stream."""
    name, payload = type(device).__name__.encode(), device.save_state()
    header = _HEADER.pack(
        MAGIC, FORMAT, device.device_id, device.state_version, len(name), len(payload)
    )
    body = header + name + payload
    return body + _CHECKSUM.pack(zlib.crc32(body))


def decode(device: VirtioDevice, stream: bytes) -> tuple[int, bytes]:
    """(version, payload) of a stream for this device. Raises `StateError` for any other."""
    if len(stream) < _HEADER.size + _CHECKSUM.size:
        raise StateError(f"the stream ends after {len(stream)} bytes")
    magic, form, device_id, version, name_length, length = _HEADER.unpack_from(stream)
    if magic != MAGIC or form != FORMAT:
        raise StateError("this is not the state of a device")
    if len(stream) != _HEADER.size + name_length + length + _CHECKSUM.size:
        raise StateError(f"the stream has {len(stream)} bytes, which is not what its header says")
    body = stream[: -_CHECKSUM.size]
    if _CHECKSUM.unpack(stream[-_CHECKSUM.size :])[0] != zlib.crc32(body):
        raise StateError("the checksum is wrong")
    name = body[_HEADER.size : _HEADER.size + name_length]
    if device_id != device.device_id or name != type(device).__name__.encode():
        raise StateError(f"this is the state of a {name.decode(errors='replace')}")
    if version > device.state_version:
        raise StateError(f"state version {version} is newer than {device.state_version}")
    return version, body[_HEADER.size + name_length :]


class StateTransfers:
    """The state transfer hooks of `VhostUserBackend` for a device, one transfer at a time."""

    def __init__(self, device: VirtioDevice) -> None:
        self._device = device
        self._last: StateTransfer | None = None

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        """Save (0) or load (1) the device's state on a thread of its own."""
        self.abandon_device_state()
        transfer = StateTransfer(self._device, fd, load=direction == 1)
        transfer.start()
        self._last = transfer
        return None

    def abandon_device_state(self) -> None:
        """Load no more state of the present front-end."""
        transfer, self._last = self._last, None
        if transfer is not None:
            transfer.abandon()

    def check_device_state(self) -> bool:
        """Whether the last transfer succeeded; False without one."""
        transfer, self._last = self._last, None
        return transfer is not None and transfer.succeeded()


class StateTransfer:
    """One transfer over a descriptor, which it takes over, on a thread of its own."""

    def __init__(self, device: VirtioDevice, fd: int, *, load: bool) -> None:
        self._device = device
        self._fd = fd
        self._done = False
        #: Held while the device loads; once the transfer is abandoned, the device does not load.
        self._loading = threading.Lock()
        self._abandoned = False
        wake: WakeFd | None = None
        try:
            self._wake = wake = WakeFd()
            os.set_blocking(fd, False)
            # Save the state now, while the device is suspended: the thread may start late.
            data = b"" if load else encode(device)
            target = self._load if load else lambda: self._save(data)
            self._thread = threading.Thread(
                target=self._run, args=(target,), name="state-transfer", daemon=True
            )
        except BaseException:
            os.close(fd)
            if wake is not None:
                wake.close()
            raise

    def start(self) -> None:
        """Transfer, on a thread. When there can be none, the descriptors are closed."""
        try:
            self._thread.start()
        except BaseException:
            os.close(self._fd)
            self._wake.close()
            raise

    def abandon(self) -> None:
        """Load no more state; returns when the device is not loading.

        A transfer that saves goes on: it has taken the state from the device at its start.
        """
        with self._loading:
            self._abandoned = True
        self._wake.wake()

    def succeeded(self) -> bool:
        """Whether the whole state has been moved; waits for a transfer under way."""
        self._thread.join(PATIENCE)
        if not self._done:
            self.abandon()  # the front-end is told of a failure: nothing must load later
        return self._done

    def _run(self, target: Callable[[], None]) -> None:
        try:
            target()
            self._done = True
        except (StateError, OSError) as error:
            log.warning("%s: its state was not moved: %s", name_of(self._device), error)
        except BaseException:
            log.exception("%s failed to load its state", name_of(self._device))
        finally:
            os.close(self._fd)
            self._wake.close()

    def _wait(self, event: int) -> None:
        poller = select.poll()
        poller.register(self._fd, event)
        if event == select.POLLIN:
            poller.register(self._wake.fd, select.POLLIN)
        if not poller.poll(PATIENCE * 1000):
            raise StateError(f"nothing moved for {PATIENCE:g} s")

    def _save(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            try:
                view = view[os.write(self._fd, view) :]
            except BlockingIOError:
                self._wait(select.POLLOUT)

    def _load(self) -> None:
        stream = bytearray()
        while True:
            try:
                piece = os.read(self._fd, 1 << 16)
            except BlockingIOError:
                self._wait(select.POLLIN)
                self._check_wanted()
                continue
            if not piece:
                break
            stream += piece
            if len(stream) > MAX_STATE:
                raise StateError(f"the stream has more than {MAX_STATE} bytes")
            self._check_wanted()
        version, payload = decode(self._device, bytes(stream))
        with self._loading:
            self._check_wanted()
            self._device.load_state(version, payload)

    def _check_wanted(self) -> None:
        if self._abandoned:
            raise StateError("its front-end has gone, or has begun another transfer")
