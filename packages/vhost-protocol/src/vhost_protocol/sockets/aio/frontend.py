"""The front-end's end of the main socket: a method for each request."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from ...errors import RequestFailed
from ...fds import FdLike, OwnedFd
from ...messages import requests as r
from ...messages.constants import (
    ConfigFlags,
    IotlbAccess,
    IotlbType,
    MigrationPhase,
    ProtocolFeatures,
    TransferDirection,
    VringFlags,
)
from ...messages.message import Reply, Request
from ...messages.replies import Ack, ConfigReply, InflightReply, MemRegReply, MemTableReply
from ...messages.values import AsymmetricSession, SymmetricSession
from ...rules.core import Answered
from ...rules.session import Session
from ...rules.table import FRONTEND_TABLE
from ..regions import RegionLike, as_region
from .channels import AsyncFrontendChannel, AsyncGpuFrontendChannel
from .endpoint import AsyncRequestingEndpoint
from .transport import connect_socket

if TYPE_CHECKING:
    from uuid import UUID


class AsyncFrontend(AsyncRequestingEndpoint):
    """A front-end: asks a back-end over a socket, as a VMM does.

    Every method sends one request and returns what it is answered with.  Once REPLY_ACK is
    negotiated, requests without an answer of their own ask for an Ack and raise RequestFailed when
    it is not zero.  Descriptors passed in stay the caller's.

    All methods raise LocalProtocolError when the request is not legal now (nothing is sent), and
    RemoteProtocolError, ConnectionClosed, Timeout or OutOfResources when the exchange fails (the
    connection is closed).

    Args:
        sock: a connected Unix stream socket; owned from here on.
        timeout: seconds one exchange may take, or None for no limit.
        session: shared state; a new one by default.
        strict: refuse to send what deployed peers are forgiven for.
    """

    def __init__(
        self,
        sock: socket.socket,
        timeout: float | None = None,
        *,
        session: Session | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(sock, FRONTEND_TABLE, session, timeout=timeout, strict=strict)

    @classmethod
    async def connect(cls, path: str, timeout: float | None = None) -> AsyncFrontend:
        """Connect to a back-end that listens on ``path``.

        Args:
            path: of the Unix socket.
            timeout: seconds to wait for it to listen, and that any later exchange may take.

        Raises:
            Timeout: the back-end does not listen by then.
            OSError: it cannot be connected to, and waiting would not help.
        """
        return cls(await connect_socket(path, timeout), timeout)

    async def __aenter__(self) -> AsyncFrontend:
        return self

    # Negotiation

    async def get_features(self) -> int:
        """Return the VIRTIO feature bits the back-end offers."""
        return (await self.ask(r.GetFeatures())).features

    async def set_features(self, features: int) -> None:
        """Set the negotiated VIRTIO feature bits."""
        await self.call(r.SetFeatures(features))

    async def get_protocol_features(self) -> ProtocolFeatures:
        """Return the protocol features the back-end offers."""
        return (await self.ask(r.GetProtocolFeatures())).features

    async def set_protocol_features(self, features: int) -> None:
        """Set the negotiated protocol features."""
        await self.call(r.SetProtocolFeatures(ProtocolFeatures(features)))

    async def set_owner(self) -> None:
        """Start a session."""
        await self.call(r.SetOwner())

    async def reset_owner(self) -> None:
        """Send the deprecated RESET_OWNER."""
        await self.call(r.ResetOwner())

    async def get_queue_num(self) -> int:
        """Return how many queues the back-end can have."""
        return (await self.ask(r.GetQueueNum())).num

    # Memory

    async def set_mem_table(
        self, regions: Iterable[RegionLike], fds: Sequence[FdLike]
    ) -> MemTableReply | None:
        """Replace the memory table; a descriptor for each region.

        Returns:
            None; in postcopy, the regions with the back-end's addresses.
        """
        message = r.SetMemTable(tuple([as_region(region) for region in regions]))
        answer = self._close_fds(await self.request(message, fds))
        if isinstance(answer, MemTableReply):
            return answer
        self._no_error(message, answer)
        return None

    async def acknowledge_mem_table(self) -> None:
        """Tell the back-end that its postcopy addresses have been taken; faults may come."""
        await self.request(r.MemTableAck(), need_reply=False)

    async def add_mem_reg(self, region: RegionLike, fd: FdLike) -> MemRegReply | None:
        """Add a memory region.

        Returns:
            None; in postcopy, the region with the back-end's address.
        """
        message = r.AddMemReg(as_region(region))
        answer = self._close_fds(await self.request(message, [fd]))
        if isinstance(answer, MemRegReply):
            return answer
        self._no_error(message, answer)
        return None

    async def rem_mem_reg(self, region: RegionLike) -> None:
        """Remove the memory region of these addresses and this size."""
        await self.call(r.RemMemReg(as_region(region)))

    async def get_max_mem_slots(self) -> int:
        """Return how many memory regions the back-end can have."""
        return (await self.ask(r.GetMaxMemSlots())).slots

    async def set_log_base(
        self, mmap_size: int, mmap_offset: int, fd: FdLike | None = None
    ) -> None:
        """Set the dirty log (bytes); with LOG_SHMFD the descriptor it lies in comes along."""
        message = r.SetLogBase(mmap_size, mmap_offset)
        await self.call(message, [] if fd is None else [fd])

    async def set_log_fd(self, fd: FdLike) -> None:
        """Set the descriptor that is signalled when the log was written."""
        await self.call(r.SetLogFd(), [fd])

    async def iotlb_update(
        self, iova: int, size: int, user_address: int, access: IotlbAccess = IotlbAccess.READ_WRITE
    ) -> None:
        """Add an IOTLB entry (bytes)."""
        await self.call(r.IotlbMsg(iova, size, user_address, access, IotlbType.UPDATE))

    async def iotlb_invalidate(self, iova: int, size: int) -> None:
        """Remove IOTLB entries of a range (bytes)."""
        await self.call(r.IotlbMsg(iova, size, 0, IotlbAccess.NONE, IotlbType.INVALIDATE))

    # Rings

    async def set_vring_num(self, index: int, num: int) -> None:
        """Set the size of a ring, in descriptors."""
        await self.call(r.SetVringNum(index, num))

    async def set_vring_addr(
        self,
        index: int,
        descriptor: int,
        used: int,
        available: int,
        log: int = 0,
        flags: VringFlags | None = None,
    ) -> None:
        """Set where a ring lies; see SetVringAddr."""
        await self.call(
            r.SetVringAddr(index, flags or VringFlags(0), descriptor, used, available, log)
        )

    async def set_vring_base(self, index: int, base: int) -> None:
        """Set where a ring starts; see VringBaseReply."""
        await self.call(r.SetVringBase(index, base))

    async def get_vring_base(self, index: int) -> int:
        """Stop a ring and return where it stands; see VringBaseReply."""
        return (await self.ask(r.GetVringBase(index))).base

    async def get_vring_base_skip_drain(self, index: int) -> int:
        """Stop a ring without waiting for its requests and return where it stands."""
        return (await self.ask(r.GetVringBaseSkipDrain(index))).base

    async def set_vring_kick(self, index: int, fd: FdLike | None = None) -> None:
        """Start a ring, with the descriptor to kick or None for polling."""
        await self.call(r.SetVringKick(index, fd is None), [] if fd is None else [fd])

    async def set_vring_call(self, index: int, fd: FdLike | None = None) -> None:
        """Set the descriptor for used buffers, or None for polling."""
        await self.call(r.SetVringCall(index, fd is None), [] if fd is None else [fd])

    async def set_vring_err(self, index: int, fd: FdLike | None = None) -> None:
        """Set the descriptor for errors, or None for none."""
        await self.call(r.SetVringErr(index, fd is None), [] if fd is None else [fd])

    async def set_vring_enable(self, index: int, enable: bool = True) -> None:
        """Enable or disable a ring."""
        await self.call(r.SetVringEnable(index, enable))

    async def set_vring_endian(self, index: int, big_endian: bool) -> None:
        """Set the byte order of a legacy device's ring."""
        await self.call(r.SetVringEndian(index, big_endian))

    async def vring_kick(self, index: int) -> None:
        """Kick a ring in-band."""
        await self.call(r.VringKick(index))

    async def get_inflight_fd(
        self, num_queues: int, queue_size: int
    ) -> tuple[InflightReply, OwnedFd | None]:
        """Ask for an area to track in-flight requests in.

        Returns:
            its description and its descriptor, which the caller owns (None when its size is 0).
        """
        answer = await self.ask_fds(r.GetInflightFd(0, 0, num_queues, queue_size))
        return answer.message, answer.take_fd()

    async def set_inflight_fd(
        self, mmap_size: int, mmap_offset: int, num_queues: int, queue_size: int, fd: FdLike
    ) -> None:
        """Give an in-flight area back (sizes and offsets in bytes)."""
        await self.call(r.SetInflightFd(mmap_size, mmap_offset, num_queues, queue_size), [fd])

    # Device

    async def get_config(
        self, offset: int, size: int, flags: ConfigFlags = ConfigFlags.WRITABLE
    ) -> bytes:
        """Read ``size`` bytes at ``offset`` of the configuration space.

        Raises:
            RequestFailed: the back-end cannot, or gave another number of bytes.
        """
        return self._config(size, await self.ask(r.GetConfig(offset, size, flags)))

    async def set_config(
        self, offset: int, data: bytes, flags: ConfigFlags = ConfigFlags.WRITABLE
    ) -> None:
        """Write to the configuration space."""
        await self.call(r.SetConfig(offset, data, flags))

    async def get_status(self) -> int:
        """Return the VIRTIO device status byte."""
        return (await self.ask(r.GetStatus())).status

    async def set_status(self, status: int) -> None:
        """Set the VIRTIO device status byte."""
        await self.call(r.SetStatus(status))

    async def reset_device(self) -> None:
        """Disable all rings and reset the device."""
        await self.call(r.ResetDevice())

    async def send_rarp(self, mac: bytes) -> None:
        """Announce a migrated guest's MAC address (6 bytes)."""
        await self.call(r.SendRarp(mac))

    async def net_set_mtu(self, mtu: int) -> None:
        """Tell the host's MTU, in bytes."""
        await self.call(r.NetSetMtu(mtu))

    async def create_crypto_session(
        self, op_code: int, session: SymmetricSession | AsymmetricSession
    ) -> int:
        """Create a crypto session and return its id.

        Raises:
            RequestFailed: the id is negative.
        """
        reply = await self.ask(r.CreateCryptoSession(op_code, session))
        if reply.session_id < 0:
            raise RequestFailed("CREATE_CRYPTO_SESSION", reply.session_id)
        return reply.session_id

    async def close_crypto_session(self, session_id: int) -> None:
        """Close a crypto session."""
        await self.call(r.CloseCryptoSession(session_id))

    async def get_shared_object(self, uuid: UUID) -> OwnedFd | None:
        """Return the dma-buf of a shared object, or None when there is no such object."""
        return (await self.ask_fds(r.GetSharedObject(uuid))).take_fd()

    async def get_shmem_config(self) -> tuple[int, ...]:
        """Return the sizes of the device's shared memory regions, by id (bytes; 0 is unused)."""
        return (await self.ask(r.GetShmemConfig())).sizes

    # Migration

    async def postcopy_advise(self) -> OwnedFd | None:
        """Announce postcopy; return the back-end's userfaultfd."""
        return (await self.ask_fds(r.PostcopyAdvise())).take_fd()

    async def postcopy_listen(self) -> None:
        """Start postcopy."""
        message = r.PostcopyListen()
        # Waited for even without REPLY_ACK: the memory table must not change under the back-end.
        self._no_error(message, self._close_fds(await self.request(message, need_reply=True)))

    async def postcopy_end(self) -> None:
        """End postcopy."""
        await self.call(r.PostcopyEnd())

    async def set_device_state_fd(
        self,
        direction: TransferDirection,
        fd: FdLike,
        phase: MigrationPhase = MigrationPhase.STOPPED,
    ) -> OwnedFd | None:
        """Pass a channel for the device's state.

        Returns:
            the channel the back-end prefers, or None: then ``fd``'s is used.

        Raises:
            RequestFailed: the back-end refuses.
        """
        answer = await self.ask_fds(r.SetDeviceStateFd(direction, phase), [fd])
        if answer.message.error:
            answer.close()
            raise RequestFailed("SET_DEVICE_STATE_FD", answer.message.error)
        return answer.take_fd()

    async def check_device_state(self) -> None:
        """Ask whether the state was transferred.

        Raises:
            RequestFailed: it was not.
        """
        await self.call(r.CheckDeviceState())

    # Further channels

    async def set_backend_req_fd(self, fd: FdLike) -> None:
        """Pass a socket for requests of the back-end."""
        await self.call(r.SetBackendReqFd(), [fd])

    async def open_backend_channel(self, *, timeout: float | None = None) -> AsyncFrontendChannel:
        """Make a socket pair for requests of the back-end, pass one end, return the other.

        Args:
            timeout: seconds a message may take on it once it has begun.
        """
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            with theirs:
                await self.set_backend_req_fd(theirs)
            stack.pop_all()
        return AsyncFrontendChannel(ours, self.session, timeout=timeout)

    async def gpu_set_socket(self, fd: FdLike) -> None:
        """Pass a socket for the GPU protocol."""
        await self.call(r.GpuSetSocket(), [fd])

    async def open_gpu_channel(self, *, timeout: float | None = None) -> AsyncGpuFrontendChannel:
        """Make a socket pair for the GPU protocol, pass one end, return the other.

        Args:
            timeout: seconds a message may take on it once it has begun.
        """
        ours, theirs = socket.socketpair()
        with contextlib.ExitStack() as stack:
            stack.callback(ours.close)
            with theirs:
                await self.gpu_set_socket(theirs)
            stack.pop_all()
        return AsyncGpuFrontendChannel(ours, timeout=timeout)

    @staticmethod
    def _close_fds(answer: Answered[Reply] | Answered[Ack] | None) -> Reply | None:
        if answer is None:
            return None
        answer.close()
        return answer.message

    def _no_error(self, message: Request[Any], answer: Reply | None) -> None:
        if isinstance(answer, Ack) and answer.value:
            raise RequestFailed(self._core.name_of(message), answer.value)

    @staticmethod
    def _config(size: int, reply: ConfigReply) -> bytes:
        if len(reply.data) != size:
            raise RequestFailed("GET_CONFIG", len(reply.data))
        return reply.data
