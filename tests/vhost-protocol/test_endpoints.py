"""Real sockets, blocking: short reads and writes, signals, peers that vanish, descriptors lost."""

from __future__ import annotations

import array
import asyncio
import contextlib
import errno
import os
import resource
import signal
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import protocol_samples
import pytest
from protocol_samples import CURSOR, VECTORS, Vector

from vhost_protocol import (
    Ack,
    AnsweringEndpoint,
    AsymmetricSession,
    AsyncBackendConnection,
    AsyncFrontend,
    BackendChannel,
    BackendConnection,
    BadDescriptors,
    BadPayload,
    ConfigReply,
    ConnectionClosed,
    CryptoOpcode,
    CryptoSessionReply,
    DescriptorsLost,
    DeviceStateReply,
    EmptyReply,
    FeaturesReply,
    Frontend,
    FrontendChannel,
    GetConfig,
    GetFeatures,
    GpuBackendChannel,
    GpuCursorUpdate,
    GpuDisplay,
    GpuDisplayInfoReply,
    GpuDmabufScanout,
    GpuEdidReply,
    GpuFeaturesReply,
    GpuFrontendChannel,
    GpuGetDisplayInfo,
    GpuGetEdid,
    GpuGetProtocolFeatures,
    GpuProtocolFeatures,
    GpuUpdate,
    InflightReply,
    IotlbAccess,
    LocalProtocolError,
    MemoryRegion,
    MemRegReply,
    MemTableReply,
    OutOfResources,
    OwnedFd,
    ProtocolFeatures,
    ProtocolFeaturesReply,
    Received,
    RemoteProtocolError,
    Reply,
    RequestFailed,
    Session,
    SetFeatures,
    SetMemTable,
    SetOwner,
    SetVringKick,
    SharedObjectReply,
    ShmemConfigReply,
    SymmetricSession,
    Timeout,
    TransferDirection,
    UnexpectedReply,
    VringBaseReply,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")
ALL = protocol_samples.ALL & ~ProtocolFeatures.XEN_MMAP
REGION = MemoryRegion(0, 4096, 1 << 40)


def frame(code: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack("=III", code, flags, len(payload)) + payload


def opened(protocol: ProtocolFeatures = ALL) -> Session:
    session = Session()
    session.features = (1 << 64) - 1
    session.protocol_features = protocol
    session.owned = True
    return session


Handler = Callable[[Received], tuple[Reply | None, list[int]]]


@contextmanager
def serving(endpoint: AnsweringEndpoint, handler: Handler) -> Iterator[list[Received]]:
    """Answer everything on ``endpoint`` in a thread, until the peer closes."""
    seen: list[Received] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            while (received := endpoint.receive()) is not None:
                with received:
                    seen.append(received)
                    reply, fds = handler(received)
                    if reply is None:
                        endpoint.acknowledge(received, True)
                    else:
                        endpoint.reply(received, reply, fds)
        except BaseException as error:
            errors.append(error)
        finally:
            endpoint.close()

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield seen
    finally:
        thread.join(60)
        assert not thread.is_alive()
    assert not errors, errors


def test_every_request_of_the_front_end(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    fd = fds[0]
    replies: dict[str, tuple[Reply, list[int]]] = {
        "GET_INFLIGHT_FD": (InflightReply(4096, 0, 1, 2), [fd]),
        "POSTCOPY_ADVISE": (EmptyReply(), [fd]),
        "GET_SHARED_OBJECT": (SharedObjectReply(), [fd]),
        "SET_DEVICE_STATE_FD": (DeviceStateReply(0), [fd]),
        "GET_SHMEM_CONFIG": (ShmemConfigReply((4096,)), []),
        "GET_VRING_BASE": (VringBaseReply(0, 3), []),
        "GET_VRING_BASE_SKIP_DRAIN": (VringBaseReply(0, 4), []),
    }

    def handler(received: Received) -> tuple[Reply | None, list[int]]:
        name = received.request.name
        if name == "CREATE_CRYPTO_SESSION":
            message = received.message
            return CryptoSessionReply(message.op_code, message.session, 42), []  # type: ignore[attr-defined]
        if name == "SET_MEM_TABLE" and backend.session.postcopy and received.needs_reply:
            return MemTableReply((REGION,)), []
        if name == "ADD_MEM_REG" and backend.session.postcopy and received.needs_reply:
            return MemRegReply(REGION), []
        return replies.get(name, (None, []))

    backend = BackendConnection(theirs, session=opened(), timeout=60)
    with (
        serving(backend, handler) as seen,
        Frontend(ours, timeout=60, session=opened(), strict=False) as front,
    ):
        front.reset_owner()
        front.set_owner()
        assert front.get_vring_base(0) == 3
        assert front.get_vring_base_skip_drain(0) == 4
        front.set_vring_endian(0, True)
        front.vring_kick(0)
        front.send_rarp(b"123456")
        front.net_set_mtu(1500)
        front.iotlb_update(0, 4096, 1 << 40)
        front.iotlb_invalidate(0, 4096)
        assert front.create_crypto_session(0x402, AsymmetricSession(1, 1)) == 42
        front.close_crypto_session(42)
        assert front.get_shmem_config() == (4096,)
        for got in (
            front.get_shared_object(UUID(int=1)),
            front.set_device_state_fd(TransferDirection.SAVE, fd),
            front.postcopy_advise(),
            front.get_inflight_fd(1, 2)[1],
        ):
            assert got is not None
            got.close()
        front.check_device_state()
        front.postcopy_listen()
        assert front.set_mem_table([REGION], [fd]) == MemTableReply((REGION,))
        front.acknowledge_mem_table()
        assert front.add_mem_reg(REGION, fd) == MemRegReply(REGION)
        front.postcopy_end()
        assert front.set_mem_table([REGION], [fd]) is None
        front.set_vring_kick(0)
        front.set_vring_call(0)
        front.set_vring_err(0, fd)
        front.open_gpu_channel().close()
        front.open_backend_channel().close()
    assert len(seen) == 29


def test_failures_are_told(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()

    def handler(received: Received) -> tuple[Reply | None, list[int]]:
        match received.request.name:
            case "GET_CONFIG":
                return ConfigReply(0, 0, b""), []
            case "SET_DEVICE_STATE_FD":
                return DeviceStateReply(0x107), []
            case "CREATE_CRYPTO_SESSION":
                session = SymmetricSession(1, 1, 1, 1, 1, 1, 1, 1)
                return CryptoSessionReply(2, session, -1), []
            case "GET_VRING_BASE":
                return VringBaseReply(0, 0), []
        return Ack(1), []

    with (
        serving(BackendConnection(theirs, session=opened()), handler),
        Frontend(ours, 10, session=opened(), strict=False) as front,
    ):
        for call, value in (
            (lambda: front.get_config(0, 4), 0),
            (lambda: front.set_device_state_fd(TransferDirection.LOAD, fds[0]), 7),
            (
                lambda: front.create_crypto_session(
                    CryptoOpcode.CIPHER_CREATE_SESSION, SymmetricSession(1, 1, 1, 1, 1, 1, 1, 1)
                ),
                -1,
            ),
            (front.check_device_state, 1),
            (lambda: front.set_mem_table([REGION], fds[:1]), 1),
            (lambda: front.add_mem_reg(REGION, fds[0]), 1),
            (lambda: front.open_backend_channel(), 1),
            (lambda: front.open_gpu_channel(), 1),
            (front.postcopy_listen, 1),
        ):
            with pytest.raises(RequestFailed) as failed:
                call()
            assert failed.value.value == value
        # None of these has ended the connection.
        assert front.get_vring_base(0) == 0
        with pytest.raises(LocalProtocolError):
            front.ask(SetFeatures(0), [0])
        assert front.get_vring_base(0) == 0


def test_every_request_of_the_back_end(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    fd = fds[0]

    def handler(received: Received) -> tuple[Reply | None, list[int]]:
        if received.request.name == "SHARED_OBJECT_LOOKUP":
            found = received.message.uuid.int == 1  # type: ignore[attr-defined]
            return (Ack(0), [fd]) if found else (Ack(1), [])
        return None, []

    with (
        serving(FrontendChannel(ours, opened()), handler) as seen,
        BackendChannel.from_fd(OwnedFd(theirs.detach()), opened(), timeout=60) as channel,
    ):
        channel.iotlb_miss(4096, IotlbAccess.READ)
        channel.iotlb_access_fail(4096, IotlbAccess.WRITE, need_reply=False)
        channel.config_change()
        channel.vring_host_notifier(0, 4096, 0, fd)
        channel.vring_host_notifier(0)
        channel.vring_call(1)
        channel.vring_err(1)
        channel.shared_object_add(UUID(int=1))
        channel.shared_object_remove(UUID(int=1))
        found = channel.shared_object_lookup(UUID(int=1))
        assert found is not None
        found.close()
        assert channel.shared_object_lookup(UUID(int=2)) is None
        channel.shmem_map(0, fd, 0, 0, 4096)
        channel.shmem_unmap(0, 0, 4096)
    assert [int(r.request) for r in seen] == [1, 1, 2, 3, 3, 4, 5, 6, 7, 8, 8, 9, 10]


def test_the_front_end_answers_lookups(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with FrontendChannel(ours, opened()) as front, BackendChannel(theirs, opened()) as back:
        answers = iter([fds[0], None])

        def answer() -> None:
            for fd in answers:
                received = front.receive()
                assert received is not None
                front.answer_lookup(received, fd)

        thread = threading.Thread(target=answer)
        thread.start()
        found = back.shared_object_lookup(UUID(int=1))
        assert found is not None
        found.close()
        assert back.shared_object_lookup(UUID(int=1)) is None
        thread.join(60)


def test_a_miss_that_fails() -> None:
    ours, theirs = socket.socketpair()
    with (
        serving(FrontendChannel(ours, opened()), lambda received: (Ack(1), [])),
        BackendChannel(theirs, opened(), timeout=60) as back,
        pytest.raises(RequestFailed, match="IOTLB_MSG"),
    ):
        back.iotlb_miss(0, IotlbAccess.READ)


def test_the_gpu_protocol(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    display = GpuDisplay(0, 0, 640, 480)

    def handler(received: Received) -> tuple[Reply | None, list[int]]:
        match received.message:
            case GpuGetProtocolFeatures():
                return GpuFeaturesReply(GpuProtocolFeatures.EDID), []
            case GpuGetDisplayInfo():
                return GpuDisplayInfoReply((display,)), []
            case GpuGetEdid():
                return GpuEdidReply(b"edid"), []
            case _ if received.needs_reply:
                return EmptyReply(), []
        return None, []

    with (
        serving(GpuFrontendChannel(ours, timeout=60), handler) as seen,
        GpuBackendChannel.from_fd(OwnedFd(theirs.detach()), timeout=60) as gpu,
    ):
        gpu.set_protocol_features(gpu.get_protocol_features())
        assert gpu.get_display_info() == (display,)
        assert gpu.get_edid(0) == b"edid"
        gpu.cursor_pos(0, 1, 2)
        gpu.cursor_pos_hide(0, 1, 2)
        gpu.cursor_update(GpuCursorUpdate(0, 0, 0, 0, 0, CURSOR))
        gpu.scanout(0, 640, 480)
        # Far more than the socket holds: sent and read in many pieces.
        gpu.update(GpuUpdate(0, 0, 0, 1000, 500, b"pixl" * 500_000))
        gpu.dmabuf_scanout(GpuDmabufScanout(0, 0, 0, 1, 1, 1, 1, 4, 0, 0), fds[0])
        gpu.dmabuf_scanout(GpuDmabufScanout(*(0,) * 10))
        gpu.dmabuf_update(0, 0, 0, 1, 1)
    assert len(seen) == 12


def test_from_fd_refuses_what_is_no_socket(fds: list[int]) -> None:
    with pytest.raises(BadDescriptors, match="must be a socket"):
        BackendChannel.from_fd(OwnedFd(os.dup(fds[0])), opened())
    with pytest.raises(BadDescriptors, match="must be a socket"):
        GpuBackendChannel.from_fd(OwnedFd(os.dup(fds[0])))


def test_the_peer_vanishes_at_each_byte(fds: list[int]) -> None:
    whole = frame(5, struct.pack("=II4Q", 1, 0, 0, 4096, 1 << 40, 0))
    for cut in range(len(whole)):
        ours, theirs = socket.socketpair()
        with BackendConnection(ours, session=opened()) as back:
            if cut:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[:1]))]
                theirs.sendmsg([whole[:cut]], rights)
            theirs.close()
            if cut:
                with pytest.raises(ConnectionClosed) as closed:
                    back.receive()
                assert closed.value.partial == cut
                assert back.closed
            else:
                assert back.receive() is None


def test_the_back_end_vanishes_instead_of_answering() -> None:
    answer = frame(1, bytes(8), flags=5)
    for cut in range(len(answer)):
        ours, theirs = socket.socketpair()
        with Frontend(ours, timeout=60) as front:
            theirs.send(answer[:cut])
            theirs.shutdown(socket.SHUT_WR)
            with pytest.raises(ConnectionClosed) as closed:
                front.get_features()
            assert closed.value.request == "GET_FEATURES"
            assert closed.value.partial == cut
            assert front.closed
            with pytest.raises(LocalProtocolError, match="cannot be used"):
                front.get_features()
        theirs.close()


def test_sending_to_a_peer_that_left() -> None:
    ours, theirs = socket.socketpair()
    theirs.close()
    with Frontend(ours) as front, pytest.raises(ConnectionClosed):
        front.get_features()


def test_a_reset_while_reading() -> None:
    # Closing with unread data in the receive queue resets the connection.
    ours, theirs = socket.socketpair()
    with BackendConnection(ours) as back:
        ours.send(b"unread")
        theirs.close()
        with pytest.raises(ConnectionClosed, match="reset"):
            back.receive()


def test_timeouts() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Frontend(ours, timeout=0.05) as front:
        began = time.monotonic()
        with pytest.raises(Timeout) as late:
            front.get_features()
        assert time.monotonic() - began >= 0.05
        assert late.value.seconds == 0.05
        assert late.value.request == "GET_FEATURES"
        assert isinstance(late.value, TimeoutError)
        assert front.closed
        assert front.fileno() == -1
    ours, theirs = socket.socketpair()
    with theirs, BackendConnection(ours, timeout=0.05) as back:
        theirs.send(b"\1")
        with pytest.raises(Timeout):
            back.receive()
        assert back.closed


@pytest.mark.parametrize("blocking", [True, False])
def test_partial_writes_keep_descriptors_with_the_first_byte(
    fds: list[int], blocking: bool
) -> None:
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    ours.setblocking(blocking)
    done = threading.Event()

    def slow_reader() -> None:
        with BackendConnection(theirs, session=opened()) as back:
            for _ in range(40):
                received = back.receive()
                assert received is not None
                with received:
                    assert isinstance(received.message, SetMemTable)
                    assert len(received.fds) == 3
                    assert not any(os.get_inheritable(fd.fileno()) for fd in received.fds)
                time.sleep(0.001)
            done.set()

    thread = threading.Thread(target=slow_reader)
    thread.start()
    regions = [MemoryRegion(n << 20, 4096, 1 << 40) for n in range(3)]
    session = opened(ALL & ~ProtocolFeatures.REPLY_ACK)
    with Frontend(ours, timeout=60, session=session) as front:
        for _ in range(40):
            front.set_mem_table(regions, fds)
        thread.join(60)
    assert done.is_set()


def test_a_full_socket_times_out() -> None:
    ours, theirs = socket.socketpair()
    session = opened(ALL & ~ProtocolFeatures.REPLY_ACK)
    with theirs, Frontend(ours, timeout=0.05, session=session) as front:

        def flood() -> None:
            for _ in range(100_000):
                front.net_set_mtu(1500)

        with pytest.raises(Timeout):
            flood()
        assert front.closed


def test_signals_do_not_disturb() -> None:
    ours, theirs = socket.socketpair()
    hits: list[int] = []
    old = signal.signal(signal.SIGALRM, lambda *_: hits.append(1))
    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)

    def answer() -> None:
        with BackendConnection(theirs) as back:
            received = back.receive()
            assert received is not None
            time.sleep(0.1)
            back.reply(received, FeaturesReply(5))

    thread = threading.Thread(target=answer)
    thread.start()
    try:
        with Frontend(ours, timeout=60) as front:
            assert front.get_features() == 5
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)
        thread.join(60)
    assert hits


def test_descriptors_with_a_later_byte_are_refused(fds: list[int]) -> None:
    whole = frame(12, struct.pack("=Q", 0))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[:1]))]
    # The kernel merges bytes that were sent before with the first of these; from the payload on we
    # read apart.
    for cut in (12, 13, 19):
        ours, theirs = socket.socketpair()
        with theirs, BackendConnection(ours, session=opened()) as back:
            theirs.send(whole[:cut])
            theirs.sendmsg([whole[cut:]], rights)
            with pytest.raises(BadDescriptors, match="first bytes"):
                back.receive()
            assert back.closed


def test_descriptors_come_whole_when_the_header_is_split(fds: list[int]) -> None:
    whole = frame(12, struct.pack("=Q", 0))
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[:1]))]
    ours, theirs = socket.socketpair()
    with theirs, BackendConnection(ours, session=opened(), timeout=60) as back:
        theirs.send(frame(3))
        theirs.sendmsg([whole[:3]], rights)
        for at in range(3, len(whole)):
            theirs.send(whole[at : at + 1])
        theirs.send(frame(3))
        for kind, count in ((SetOwner, 0), (SetVringKick, 1), (SetOwner, 0)):
            received = back.receive()
            assert received is not None
            with received:
                assert type(received.message) is kind
                assert len(received.fds) == count


def test_too_many_descriptors_are_closed(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    many = array.array("i", [fds[0]] * 250)
    with theirs, BackendConnection(ours) as back:
        theirs.sendmsg([frame(1)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, many)])
        with pytest.raises(BadDescriptors, match="at most 32"):
            back.receive()


def test_descriptors_the_kernel_drops(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    passed = array.array("i", [fds[0]] * 8)
    with theirs, BackendConnection(ours, session=opened()) as back:
        payload = struct.pack("=II", 8, 0) + b"".join(
            struct.pack("=4Q", n << 20, 4096, n << 20, 0) for n in range(8)
        )
        theirs.sendmsg([frame(5, payload)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        used = max(int(fd) for fd in os.listdir("/proc/self/fd"))
        resource.setrlimit(resource.RLIMIT_NOFILE, (used + 4, hard))
        taken = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    taken.append(os.dup(0))
            # Room for some of the eight, but not for all.
            for _ in range(3):
                os.close(taken.pop())
            with pytest.raises(DescriptorsLost) as caught:
                back.receive()
        finally:
            for fd in taken:
                os.close(fd)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert back.closed
        assert isinstance(caught.value, OutOfResources)
        assert caught.value.errno == errno.EMFILE


class _Poor(socket.socket):
    """A socket of a machine that has run out of something."""

    number = 0

    def send(self, *arguments: Any) -> int:
        raise OSError(self.number, os.strerror(self.number))

    def sendmsg(self, *arguments: Any) -> int:
        return self.send()

    def recvmsg(self, *arguments: Any) -> Any:
        return self.send()


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOBUFS, OutOfResources),
        (errno.ENOMEM, OutOfResources),
        (errno.ETOOMANYREFS, OutOfResources),
        (errno.EPIPE, ConnectionClosed),
        (errno.ECONNRESET, ConnectionClosed),
        (errno.EBADF, OSError),
    ],
)
def test_errors_of_a_socket_are_sorted_by_whose_they_are(
    number: int, error: type[Exception]
) -> None:
    for use in (
        lambda sock: Frontend(sock).get_features(),
        lambda sock: BackendConnection(sock).receive(),
        lambda sock: asyncio.run(_asking(sock)),
        lambda sock: asyncio.run(_answering(sock)),
    ):
        ours, theirs = socket.socketpair()
        with theirs, _Poor(fileno=ours.detach()) as poor:
            poor.number = number
            with pytest.raises(error) as caught:
                use(poor)
            assert type(caught.value) is error
            if isinstance(caught.value, OutOfResources):
                assert caught.value.errno == number
            assert poor.fileno() == -1


async def _asking(sock: socket.socket) -> None:
    await AsyncFrontend(sock).get_features()


async def _answering(sock: socket.socket) -> None:
    await AsyncBackendConnection(sock).receive()


def test_wrong_answers_end_the_connection(fds: list[int]) -> None:
    for answer, error in (
        (frame(15, bytes(8), flags=5), UnexpectedReply),
        (frame(1, bytes(8), flags=1), RemoteProtocolError),
        (frame(1, bytes(8), flags=5), BadDescriptors),
    ):
        ours, theirs = socket.socketpair()
        with theirs, Frontend(ours, timeout=60) as front:
            passed = array.array("i", fds[:2]) if error is BadDescriptors else array.array("i")
            theirs.sendmsg([answer], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)])
            with pytest.raises(error):
                front.get_features()
            assert front.closed


def test_bad_requests_end_the_connection(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with Frontend(ours) as front, BackendConnection(theirs, session=opened()) as back:
        front.send_raw(frame(18, struct.pack("=II", 0, 9)), fds[:2])
        with pytest.raises(BadPayload):
            back.receive()
        assert back.closed
        with pytest.raises(LocalProtocolError):
            back.receive()


def test_raw_bytes_go_out_unchecked() -> None:
    ours, theirs = socket.socketpair()
    with theirs, Frontend(ours) as front:
        front.send_raw(b"anything", [ours])
        assert theirs.recv(100) == b"anything"


def test_answers_after_close_are_refused() -> None:
    ours, theirs = socket.socketpair()
    with theirs, BackendConnection(ours) as back:
        theirs.send(frame(1))
        received = back.receive()
        assert received is not None
        back.close()
        with pytest.raises(LocalProtocolError):
            back.reply(received, FeaturesReply(0))
        with pytest.raises(LocalProtocolError):
            back.acknowledge(received, True)


def test_answering_a_peer_that_left() -> None:
    ours, theirs = socket.socketpair()
    with BackendConnection(ours, session=opened()) as back:
        theirs.send(frame(3, flags=9))
        received = back.receive()
        assert received is not None
        theirs.close()
        with pytest.raises(ConnectionClosed):
            back.acknowledge(received, True)
        assert back.closed


def test_connecting(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with pytest.raises(FileNotFoundError):
        Frontend.connect(path)
    with pytest.raises(Timeout):
        Frontend.connect(path, timeout=0.05)
    with pytest.raises(OSError, match="too long"):
        Frontend.connect("x" * 200)
    listener = socket.socket(socket.AF_UNIX)
    with listener:

        def late() -> None:
            time.sleep(0.05)
            listener.bind(path)
            listener.listen()

        thread = threading.Thread(target=late)
        thread.start()
        with Frontend.connect(path, timeout=60) as front:
            assert front.fileno() >= 0
            assert front.timeout == 60
        thread.join(60)


@pytest.mark.timeout(90)
def test_a_full_queue_of_connections_is_waited_for_until_the_timeout(
    full_listener: socket.socket,
) -> None:
    path = full_listener.getsockname()
    with pytest.raises(Timeout):
        Frontend.connect(path, timeout=0.05)
    with pytest.raises(BlockingIOError):
        Frontend.connect(path, timeout=0)

    def make_room() -> None:
        full_listener.accept()[0].close()

    for timeout in (60, None):
        timer = threading.Timer(0.05, make_room)
        timer.start()
        with Frontend.connect(path, timeout=timeout) as front:
            assert front.fileno() >= 0
        timer.join(60)


def test_a_socket_with_a_timeout_of_its_own_is_taken() -> None:
    ours, theirs = socket.socketpair()
    ours.settimeout(3)
    with theirs, BackendConnection(ours) as back:
        theirs.send(frame(1))
        received = back.receive()
        assert received is not None
        assert isinstance(received.message, GetFeatures)
        assert "GetFeatures" in repr(received)


def test_owned_descriptors(fds: list[int]) -> None:
    fd = OwnedFd(os.dup(fds[0]))
    assert repr(fd) == f"OwnedFd({fd.fileno()})"
    number = fd.detach()
    assert fd.closed
    assert repr(fd) == "OwnedFd(closed)"
    fd.close()
    os.fstat(number)
    os.close(number)
    with pytest.raises(ValueError, match="closed or detached"):
        fd.detach()
    with OwnedFd(os.dup(fds[0])) as fd:
        number = fd.fileno()
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(number)
    lost = OwnedFd(os.dup(fds[0]))
    with pytest.warns(ResourceWarning, match="unclosed OwnedFd"):
        del lost


def test_received_descriptors_can_be_taken(fds: list[int]) -> None:
    ours, theirs = socket.socketpair()
    session = opened(ALL & ~ProtocolFeatures.REPLY_ACK)
    with Frontend(ours, session=session) as front, BackendConnection(theirs, session=opened()) as b:
        front.set_mem_table([REGION, MemoryRegion(1 << 20, 4096, 1 << 41)], fds[:2])
        received = b.receive()
        assert received is not None
        with received:
            first = received.take_fd()
            rest = received.take_fds()
            assert received.take_fd() is None
        assert first is not None
        assert len(rest) == 1
        for fd in (first, *rest):
            fd.close()


def test_a_region_of_another_package_is_taken() -> None:
    class Region:
        guest_address = 0
        size = 4096
        user_address = 1 << 40
        mmap_offset = 8192
        flags = 0
        domid = 0

    ours, theirs = socket.socketpair()
    session = opened(ALL & ~ProtocolFeatures.REPLY_ACK)
    with Frontend(ours, session=session) as front, BackendConnection(theirs, session=opened()) as b:
        front.rem_mem_reg(Region())
        received = b.receive()
        assert received is not None
        assert received.message.region == MemoryRegion(0, 4096, 1 << 40, 8192)  # type: ignore[attr-defined]


def test_replies_survive_a_pipelined_front_end() -> None:
    """Requests that arrive together are answered one by one, in order."""
    ours, theirs = socket.socketpair()
    with ours, BackendConnection(theirs, session=opened()) as back:
        ours.send(frame(1) + frame(24, struct.pack("=III", 0, 4, 0) + bytes(4)) + frame(15))
        for kind, reply in (
            (GetFeatures, FeaturesReply(1 << 30)),
            (GetConfig, ConfigReply(0, 0, b"1234")),
        ):
            received = back.receive()
            assert received is not None
            assert type(received.message) is kind
            back.reply(received, reply)
        received = back.receive()
        assert received is not None
        back.reply(received, ProtocolFeaturesReply(ProtocolFeatures.MQ))
        assert back.session.offered_protocol_features == ProtocolFeatures.MQ


@pytest.mark.parametrize("vector", [v for v in VECTORS if v.table == "front-end" and not v.reply])
def test_no_request_can_make_the_back_end_leak(vector: Vector, fds: list[int]) -> None:
    """Every request with three descriptors too many, whatever it thinks of them."""
    import sys

    ours, theirs = socket.socketpair()
    with ours, BackendConnection(theirs, session=opened()) as back:
        passed = array.array("i", fds)
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, passed)]
        ours.sendmsg([vector.frame(sys.byteorder)], rights)
        with pytest.raises(RemoteProtocolError):
            back.receive()


def test_shutdown_wakes_the_thread_that_waits() -> None:
    ours, theirs = socket.socketpair()
    with theirs, BackendConnection(ours) as back:
        got: list[object] = []
        thread = threading.Thread(target=lambda: got.append(back.receive()))
        thread.start()
        time.sleep(0.05)
        back.shutdown()
        thread.join(60)
        assert got == [None]
        back.shutdown()


def test_closing_ends_an_exchange_of_another_thread_first() -> None:
    """Until then the socket's number must not go to another file."""
    ours, theirs = socket.socketpair()
    frontend = Frontend(ours)
    number = frontend.fileno()
    ended: list[tuple[type[BaseException], bool]] = []

    def ask() -> None:
        try:
            frontend.get_features()
        except ConnectionClosed as error:
            ended.append((type(error), os.path.exists(f"/proc/self/fd/{number}")))

    thread = threading.Thread(target=ask)
    thread.start()
    assert theirs.recv(64)  # it has asked and waits
    frontend.close()
    assert not os.path.exists(f"/proc/self/fd/{number}")
    thread.join()
    assert [kind for kind, _ in ended] == [ConnectionClosed]
    theirs.close()
