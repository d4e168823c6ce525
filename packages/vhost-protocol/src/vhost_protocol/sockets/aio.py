"""The endpoints for asyncio, over the same core as the blocking ones.

``asyncio`` streams lose descriptors, so these read with ``recvmsg`` themselves when the loop says
that the socket is readable.  The named methods mirror those of the blocking classes; a test holds
the two together.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import (
    ConnectionClosed,
    LocalProtocolError,
    ProtocolError,
    RequestFailed,
    Timeout,
)
from ..fds import FdLike, OwnedFd
from ..messages import gpu as g
from ..messages import requests as r
from ..messages.constants import (
    ConfigFlags,
    GpuProtocolFeatures,
    IotlbAccess,
    IotlbType,
    MigrationPhase,
    ProtocolFeatures,
    ShmemMapFlags,
    TransferDirection,
    VringFlags,
)
from ..messages.message import Reply, Request
from ..messages.replies import Ack, ConfigReply, InflightReply, MemRegReply, MemTableReply
from ..messages.values import AsymmetricSession, SymmetricSession
from ..rules.core import Answered, Outgoing, Received, Requester, Responder
from ..rules.rules import BACKEND_TABLE, FRONTEND_TABLE, GPU_TABLE, Table
from ..rules.session import Session
from .channels import socket_from
from .frontend import RegionLike, as_region
from .transport import try_receive, try_send, whose

if TYPE_CHECKING:
    from uuid import UUID

ReplyT = TypeVar("ReplyT", bound=Reply)


class _AsyncEndpoint:
    """A socket in an event loop.

    Attributes:
        timeout: seconds one exchange may take, or None for no limit.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._closed = False
        self._waiters: set[asyncio.Future[None]] = set()
        self.timeout: float | None = timeout

    def fileno(self) -> int:
        """Return the socket's descriptor; -1 after ``close()``."""
        return self._sock.fileno()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called or an error has ended the connection."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("connection", "closed", "cannot be used any more")

    async def _wait(self, add: Callable[..., object], remove: Callable[[int], object]) -> None:
        fd = self._sock.fileno()
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters.add(waiter)
        add(fd, _wake, waiter)
        try:
            await waiter
        finally:
            self._waiters.discard(waiter)
            # After close() the number may be somebody else's already, and close() has removed it.
            if not self._closed:
                remove(fd)

    async def _send(self, outgoing: Outgoing) -> None:
        loop = asyncio.get_running_loop()
        left = memoryview(outgoing.data)
        fds = outgoing.fds
        while left:
            try:
                sent = try_send(self._sock, left, fds)
            except BlockingIOError:
                await self._wait(loop.add_writer, loop.remove_writer)
                continue
            except OSError as error:
                raise whose(error) from error
            left = left[sent:]
            fds = ()

    async def _read(self, size: int, partial: int) -> tuple[bytes, list[int]]:
        loop = asyncio.get_running_loop()
        while True:
            try:
                return try_receive(self._sock, size)
            except BlockingIOError:
                await self._wait(loop.add_reader, loop.remove_reader)
            except OSError as error:
                raise whose(error, partial) from error

    def shutdown(self) -> None:
        """End the connection; see ``RequestingEndpoint.shutdown``.  For tasks ``close()`` does."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took.  Can be called again.

        Tasks that wait on this endpoint get ConnectionClosed.
        """
        if self._closed:
            return
        self._closed = True
        fd = self._sock.fileno()
        for waiter in self._waiters:
            loop = waiter.get_loop()
            if not loop.is_closed():
                loop.remove_reader(fd)
                loop.remove_writer(fd)
            if not waiter.done():
                waiter.set_exception(ConnectionClosed("the connection was closed here"))
        self._sock.close()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _wake(waiter: asyncio.Future[None]) -> None:
    if not waiter.done():
        waiter.set_result(None)


class AsyncRequestingEndpoint(_AsyncEndpoint):
    """A socket on which we ask; tasks take turns.

    Args:
        sock: a connected Unix stream socket; owned from here on.
        table: the rows of the socket.
        session: shared state; a new one by default.
        timeout: seconds one exchange may take, or None for no limit.
        strict: refuse to send what deployed peers are forgiven for.
    """

    def __init__(
        self,
        sock: socket.socket,
        table: Table,
        session: Session | None = None,
        *,
        timeout: float | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(sock, timeout)
        self._core = Requester(table, session, strict=strict)
        self._lock = asyncio.Lock()

    @property
    def session(self) -> Session:
        """What is negotiated."""
        return self._core.session

    async def request(
        self,
        message: Request[ReplyT],
        fds: Sequence[FdLike] = (),
        *,
        need_reply: bool | None = None,
    ) -> Answered[ReplyT] | Answered[Ack] | None:
        """Send a request and wait for its answer, if it has one.

        A task that is cancelled in the middle closes the connection: its answer would be taken for
        another's.

        Returns, Raises: as ``RequestingEndpoint.request``.
        """
        async with self._lock:
            self._check_open()
            name = self._core.name_of(message)
            outgoing, answered = self._core.request(message, fds, need_reply=need_reply)
            try:
                async with asyncio.timeout(self.timeout):
                    await self._send(outgoing)
                    return await self._await() if answered else None
            except TimeoutError:
                self.close()
                raise Timeout(self.timeout or 0, request=name) from None
            except BaseException as error:
                if isinstance(error, ProtocolError) and error.request is None:
                    error.request = name
                self.close()
                raise

    async def _await(self) -> Answered[Any]:
        core = self._core
        while True:
            answer = core.next()
            if answer is not None:
                return answer
            data, fds = await self._read(core.wanted, core.partial)
            if not data:
                raise ConnectionClosed(
                    "the peer closed the connection instead of answering", partial=core.partial
                )
            core.receive(data, fds)

    async def call(self, message: Request[Any], fds: Sequence[FdLike] = ()) -> None:
        """Send a request that is answered with an Ack or not at all.

        Raises:
            RequestFailed: the Ack is not zero.
            ProtocolError: as ``request``.
        """
        answer = await self.request(message, fds)
        if answer is not None:
            with answer:
                reply = answer.message
                if isinstance(reply, Ack) and reply.value:
                    raise RequestFailed(self._core.name_of(message), reply.value)

    async def ask(self, message: Request[ReplyT], fds: Sequence[FdLike] = ()) -> ReplyT:
        """Send a request and return its answer's value; descriptors it brings are closed.

        Raises:
            ProtocolError: as ``request``.
        """
        with await self.ask_fds(message, fds) as answer:
            return answer.message

    async def ask_fds(
        self, message: Request[ReplyT], fds: Sequence[FdLike] = ()
    ) -> Answered[ReplyT]:
        """Send a request and return its answer with the descriptors it brings.

        Raises:
            LocalProtocolError: this request has no answer now.
            ProtocolError: as ``request``.
        """
        answer = await self.request(message, fds)
        if answer is None:
            raise LocalProtocolError("reply", None, "this request is not answered in this state")
        return answer  # type: ignore[return-value]

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took.  Can be called again."""
        super().close()
        self._core.close()


class AsyncAnsweringEndpoint(_AsyncEndpoint):
    """A socket on which requests arrive; one task receives.

    Args:
        sock: a connected Unix stream socket; owned from here on.
        table: the rows of the socket.
        session: shared state; a new one by default.
        timeout: seconds a message may take once it has begun, and an answer to be taken, or None.
        strict: treat violations that are usually tolerated as errors.
    """

    def __init__(
        self,
        sock: socket.socket,
        table: Table,
        session: Session | None = None,
        *,
        timeout: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(sock, timeout)
        self._core = Responder(table, session, strict=strict)
        self._lock = asyncio.Lock()

    @property
    def session(self) -> Session:
        """What is negotiated."""
        return self._core.session

    async def receive(self) -> Received | None:
        """Wait for a request; may be cancelled between and inside messages without loss.

        Returns, Raises: as ``AnsweringEndpoint.receive``.
        """
        self._check_open()
        core = self._core
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                while True:
                    received = core.next()
                    if received is not None:
                        return received
                    partial = core.partial
                    if partial and self.timeout is not None and limit.when() is None:
                        limit.reschedule(loop.time() + self.timeout)
                    data, fds = await self._read(core.wanted, partial)
                    if not data:
                        if partial:
                            raise ConnectionClosed(
                                "the peer closed the connection inside a message", partial=partial
                            )
                        return None
                    core.receive(data, fds)
        except TimeoutError:
            self.close()
            raise Timeout(self.timeout or 0) from None
        except (ProtocolError, OSError):
            self.close()
            raise

    async def reply(self, received: Received, message: Reply, fds: Sequence[FdLike] = ()) -> None:
        """Answer a request.

        Raises: as ``AnsweringEndpoint.reply``.
        """
        async with self._lock:
            self._check_open()
            await self._finish(self._core.reply(received, message, fds))

    async def acknowledge(self, received: Received, ok: bool) -> bool:
        """Answer with an Ack if one is due; do nothing otherwise.

        Returns, Raises: as ``AnsweringEndpoint.acknowledge``.
        """
        async with self._lock:
            self._check_open()
            outgoing = self._core.acknowledge(received, ok)
            if outgoing is None:
                return False
            await self._finish(outgoing)
            return True

    async def _finish(self, outgoing: Outgoing) -> None:
        try:
            async with asyncio.timeout(self.timeout):
                await self._send(outgoing)
        except TimeoutError:
            self.close()
            raise Timeout(self.timeout or 0) from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took.  Can be called again."""
        super().close()
        self._core.close()


class AsyncBackendConnection(AsyncAnsweringEndpoint):
    """A back-end's connection; see ``BackendConnection``."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        timeout: float | None = None,
        session: Session | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(sock, FRONTEND_TABLE, session, timeout=timeout, strict=strict)

    async def __aenter__(self) -> AsyncBackendConnection:
        return self


class AsyncFrontendChannel(AsyncAnsweringEndpoint):
    """The front-end's end of the back-end's channel; see ``FrontendChannel``."""

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


class AsyncGpuFrontendChannel(AsyncAnsweringEndpoint):
    """The front-end's end of the GPU socket; see ``GpuFrontendChannel``."""

    def __init__(self, sock: socket.socket, *, timeout: float | None = None) -> None:
        super().__init__(sock, GPU_TABLE, timeout=timeout)

    async def __aenter__(self) -> AsyncGpuFrontendChannel:
        return self


class AsyncFrontend(AsyncRequestingEndpoint):
    """A front-end: asks a back-end over a socket, as a VMM does.

    Every method sends one request and returns what it is answered with.  Once REPLY_ACK is
    negotiated, requests without an answer of their own ask for an Ack and raise RequestFailed when
    it is not zero.  Descriptors passed in stay the caller's.

    All methods raise LocalProtocolError when the request is not legal now (nothing is sent), and
    RemoteProtocolError, ConnectionClosed, Timeout or DescriptorsLost when the exchange fails (the
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
            Timeout: it does not listen by then.
            OSError: it cannot be connected to, and waiting would not help.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + (timeout or 0)
        while True:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                await loop.sock_connect(sock, path)
                return cls(sock, timeout)
            except (FileNotFoundError, ConnectionRefusedError, BlockingIOError):
                sock.close()
                if loop.time() >= end:
                    if timeout:
                        raise Timeout(timeout) from None
                    raise
            except BaseException:
                sock.close()
                raise
            await asyncio.sleep(0.01)

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
        return answer if isinstance(answer, MemTableReply) else self._no_error(message, answer)

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
        return answer if isinstance(answer, MemRegReply) else self._no_error(message, answer)

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

    @staticmethod
    def _no_error(message: object, answer: Reply | None) -> None:
        if isinstance(answer, Ack) and answer.value:
            raise RequestFailed(type(message).__name__, answer.value)

    @staticmethod
    def _config(size: int, reply: ConfigReply) -> bytes:
        if len(reply.data) != size:
            raise RequestFailed("GET_CONFIG", len(reply.data))
        return reply.data


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
        message = r.BackendIotlbMsg(iova, 0, 0, access, kind)
        answer = await self.request(message, need_reply=need_reply)
        if answer is not None and isinstance(answer.message, Ack) and answer.message.value:
            raise RequestFailed("IOTLB_MSG", answer.message.value)

    async def config_change(self) -> None:
        """Tell that the configuration space has changed."""
        await self.call(r.BackendConfigChange())

    async def vring_host_notifier(
        self, index: int, size: int = 0, offset: int = 0, fd: FdLike | None = None
    ) -> None:
        """Set a ring's host notifier (bytes in ``fd``), or remove it when ``fd`` is None."""
        message = r.BackendVringHostNotifier(index, size, offset, fd is None)
        await self.call(message, [] if fd is None else [fd])

    async def vring_call(self, index: int) -> None:
        """Tell in-band that buffers were used."""
        await self.call(r.BackendVringCall(index))

    async def vring_err(self, index: int) -> None:
        """Tell in-band that a ring has an error."""
        await self.call(r.BackendVringErr(index))

    async def shared_object_add(self, uuid: UUID) -> None:
        """Announce a shared object."""
        await self.call(r.BackendSharedObjectAdd(uuid))

    async def shared_object_remove(self, uuid: UUID) -> None:
        """Withdraw a shared object."""
        await self.call(r.BackendSharedObjectRemove(uuid))

    async def shared_object_lookup(self, uuid: UUID) -> OwnedFd | None:
        """Return the dma-buf of another device's shared object, or None when there is none."""
        answer = await self.ask_fds(r.BackendSharedObjectLookup(uuid))
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
        await self.call(r.BackendShmemMap(shmid, fd_offset, shm_offset, length, flags), [fd])

    async def shmem_unmap(self, shmid: int, shm_offset: int, length: int) -> None:
        """Unmap part of a shared memory region (bytes)."""
        await self.call(r.BackendShmemUnmap(shmid, 0, shm_offset, length))


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
