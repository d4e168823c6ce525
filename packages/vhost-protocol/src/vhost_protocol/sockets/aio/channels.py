"""Sockets beside the main one: requests of the back-end, and the GPU protocol."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from ...errors import RequestFailed
from ...fds import FdLike, OwnedFd
from ...messages import backend_requests as b
from ...messages import gpu as g
from ...messages.constants import GpuProtocolFeatures, IotlbAccess, IotlbType, ShmemMapFlags
from ...messages.replies import Ack
from ...rules.core import Received
from ...rules.session import Session
from ...rules.table import BACKEND_TABLE, GPU_TABLE
from ..raw import socket_from
from .endpoint import AsyncAnsweringEndpoint, AsyncRequestingEndpoint

if TYPE_CHECKING:
    from uuid import UUID


class AsyncBackendChannel(AsyncRequestingEndpoint):
    """The back-end's end of the channel of SET_BACKEND_REQ_FD: a method for each request.

    Methods raise as those of ``Frontend`` do.  When REPLY_ACK is negotiated each asks for an Ack
    and raises RequestFailed when it is not zero; do not wait for one while the front-end waits for
    an answer of this thread.

    Args:
        sock: the socket that SET_BACKEND_REQ_FD passed; owned from here on.
        session: of the connection it belongs to.
        timeout: seconds one exchange may take, or None for no limit.
    """

    def __init__(
        self, sock: socket.socket, session: Session, *, timeout: float | None = None
    ) -> None:
        super().__init__(sock, BACKEND_TABLE, session, timeout=timeout)

    @classmethod
    def from_fd(
        cls, fd: OwnedFd, session: Session, *, timeout: float | None = None
    ) -> AsyncBackendChannel:
        """Take the descriptor that came with SET_BACKEND_REQ_FD.

        Raises:
            BadDescriptors: it is not a socket; it has been closed.
        """
        return cls(socket_from(fd), session, timeout=timeout)

    async def __aenter__(self) -> AsyncBackendChannel:
        return self

    async def iotlb_miss(
        self, iova: int, access: IotlbAccess, *, need_reply: bool | None = None
    ) -> None:
        """Ask for an IOTLB entry; it comes as an IOTLB_MSG on the main socket."""
        await self._iotlb(iova, access, IotlbType.MISS, need_reply)

    async def iotlb_access_fail(
        self, iova: int, access: IotlbAccess, *, need_reply: bool | None = None
    ) -> None:
        """Report an access that the IOTLB does not permit."""
        await self._iotlb(iova, access, IotlbType.ACCESS_FAIL, need_reply)

    async def _iotlb(
        self, iova: int, access: IotlbAccess, kind: IotlbType, need_reply: bool | None
    ) -> None:
        message = b.BackendIotlbMsg(iova, 0, 0, access, kind)
        answer = await self.request(message, need_reply=need_reply)
        if answer is not None and isinstance(answer.message, Ack) and answer.message.value:
            raise RequestFailed("IOTLB_MSG", answer.message.value)

    async def config_change(self) -> None:
        """Tell that the configuration space has changed."""
        await self.call(b.BackendConfigChange())

    async def vring_host_notifier(
        self, index: int, size: int = 0, offset: int = 0, fd: FdLike | None = None
    ) -> None:
        """Set a ring's host notifier (bytes in ``fd``), or remove it when ``fd`` is None."""
        message = b.BackendVringHostNotifier(index, size, offset, fd is None)
        await self.call(message, [] if fd is None else [fd])

    async def vring_call(self, index: int) -> None:
        """Tell in-band that buffers were used."""
        await self.call(b.BackendVringCall(index))

    async def vring_err(self, index: int) -> None:
        """Tell in-band that a ring has an error."""
        await self.call(b.BackendVringErr(index))

    async def shared_object_add(self, uuid: UUID) -> None:
        """Announce a shared object."""
        await self.call(b.BackendSharedObjectAdd(uuid))

    async def shared_object_remove(self, uuid: UUID) -> None:
        """Withdraw a shared object."""
        await self.call(b.BackendSharedObjectRemove(uuid))

    async def shared_object_lookup(self, uuid: UUID) -> OwnedFd | None:
        """Return the dma-buf of another device's shared object, or None when there is none."""
        answer = await self.ask_fds(b.BackendSharedObjectLookup(uuid))
        return answer.take_fd()

    async def shmem_map(
        self,
        shmid: int,
        fd: FdLike,
        fd_offset: int,
        shm_offset: int,
        length: int,
        flags: ShmemMapFlags = ShmemMapFlags.READ_ONLY,
    ) -> None:
        """Map part of ``fd`` into a shared memory region (offsets and length in bytes)."""
        await self.call(b.BackendShmemMap(shmid, fd_offset, shm_offset, length, flags), [fd])

    async def shmem_unmap(self, shmid: int, shm_offset: int, length: int) -> None:
        """Unmap part of a shared memory region (bytes)."""
        await self.call(b.BackendShmemUnmap(shmid, 0, shm_offset, length))


class AsyncFrontendChannel(AsyncAnsweringEndpoint):
    """The front-end's end of that channel: requests of the back-end arrive here.

    Args:
        sock: our end of the socket pair; owned from here on.
        session: of the connection it belongs to.
        timeout: seconds a message may take once it has begun, or None.
    """

    def __init__(
        self, sock: socket.socket, session: Session, *, timeout: float | None = None
    ) -> None:
        super().__init__(sock, BACKEND_TABLE, session, timeout=timeout)

    async def __aenter__(self) -> AsyncFrontendChannel:
        return self

    async def answer_lookup(self, received: Received, fd: FdLike | None) -> None:
        """Answer SHARED_OBJECT_LOOKUP with a dma-buf, or with failure when ``fd`` is None."""
        if fd is None:
            await self.reply(received, Ack(1))
        else:
            await self.reply(received, Ack(0), [fd])


class AsyncGpuBackendChannel(AsyncRequestingEndpoint):
    """The back-end's end of the GPU socket: a method for each request.

    Args:
        sock: the socket that GPU_SET_SOCKET passed; owned from here on.
        timeout: seconds one exchange may take, or None for no limit.
    """

    def __init__(self, sock: socket.socket, *, timeout: float | None = None) -> None:
        super().__init__(sock, GPU_TABLE, timeout=timeout)

    @classmethod
    def from_fd(cls, fd: OwnedFd, *, timeout: float | None = None) -> AsyncGpuBackendChannel:
        """Take the descriptor that came with GPU_SET_SOCKET.

        Raises:
            BadDescriptors: it is not a socket; it has been closed.
        """
        return cls(socket_from(fd), timeout=timeout)

    async def __aenter__(self) -> AsyncGpuBackendChannel:
        return self

    async def get_protocol_features(self) -> GpuProtocolFeatures:
        """Return the GPU protocol features the front-end offers."""
        return (await self.ask(g.GpuGetProtocolFeatures())).features

    async def set_protocol_features(self, features: GpuProtocolFeatures) -> None:
        """Set the negotiated GPU protocol features."""
        await self.call(g.GpuSetProtocolFeatures(features))

    async def get_display_info(self) -> tuple[g.GpuDisplay, ...]:
        """Return the preferred displays."""
        return (await self.ask(g.GpuGetDisplayInfo())).displays

    async def get_edid(self, scanout_id: int) -> bytes:
        """Return the EDID of a scanout."""
        return (await self.ask(g.GpuGetEdid(scanout_id))).edid

    async def cursor_pos(self, scanout_id: int, x: int, y: int) -> None:
        """Show the cursor at a position, in pixels."""
        await self.call(g.GpuCursorPos(scanout_id, x, y))

    async def cursor_pos_hide(self, scanout_id: int, x: int, y: int) -> None:
        """Hide the cursor."""
        await self.call(g.GpuCursorPosHide(scanout_id, x, y))

    async def cursor_update(self, update: g.GpuCursorUpdate) -> None:
        """Set the cursor's shape."""
        await self.call(update)

    async def scanout(self, scanout_id: int, width: int, height: int) -> None:
        """Set a scanout's size in pixels; 0 x 0 disables it."""
        await self.call(g.GpuScanout(scanout_id, width, height))

    async def update(self, update: g.GpuUpdate) -> None:
        """Replace a rectangle of a scanout."""
        await self.call(update)

    async def dmabuf_scanout(
        self, scanout: g.GpuDmabufScanout | g.GpuDmabufScanout2, fd: FdLike | None = None
    ) -> None:
        """Set a scanout to a dma-buf; without one (and 0 x 0) disable it."""
        await self.call(scanout, [] if fd is None else [fd])

    async def dmabuf_update(self, scanout_id: int, x: int, y: int, width: int, height: int) -> None:
        """Present a rectangle of a dma-buf scanout and wait until it was."""
        await self.call(g.GpuDmabufUpdate(scanout_id, x, y, width, height))


class AsyncGpuFrontendChannel(AsyncAnsweringEndpoint):
    """The front-end's end of the GPU socket: requests of the back-end arrive here.

    Args:
        sock: our end of the socket pair; owned from here on.
        timeout: seconds a message may take once it has begun, or None.
    """

    def __init__(self, sock: socket.socket, *, timeout: float | None = None) -> None:
        super().__init__(sock, GPU_TABLE, timeout=timeout)

    async def __aenter__(self) -> AsyncGpuFrontendChannel:
        return self
