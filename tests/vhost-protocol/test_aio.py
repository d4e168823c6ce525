"""The asyncio endpoints: the same methods, the same rules, cancellation and closing besides."""

from __future__ import annotations

import array
import asyncio
import inspect
import os
import re
import socket
import struct
from collections.abc import Awaitable, Callable
from pathlib import Path

import protocol_samples
import pytest

import vhost_protocol
from vhost_protocol import (
    Ack,
    AsyncBackendChannel,
    AsyncBackendConnection,
    AsyncFrontend,
    AsyncFrontendChannel,
    AsyncGpuBackendChannel,
    AsyncGpuFrontendChannel,
    BackendChannel,
    BackendConnection,
    ConnectionClosed,
    FeaturesReply,
    Frontend,
    FrontendChannel,
    GpuBackendChannel,
    GpuFeaturesReply,
    GpuFrontendChannel,
    GpuProtocolFeatures,
    InflightReply,
    LocalProtocolError,
    MemoryRegion,
    OwnedFd,
    ProtocolFeatures,
    RemoteProtocolError,
    RequestFailed,
    Session,
    Timeout,
    UnexpectedReply,
)

pytestmark = pytest.mark.usefixtures("no_fd_leak")
ALL = protocol_samples.ALL & ~ProtocolFeatures.XEN_MMAP
REGION = MemoryRegion(0, 4096, 1 << 40)


def opened() -> Session:
    session = Session()
    session.features = (1 << 64) - 1
    session.protocol_features = ALL
    session.owned = True
    return session


def frame(code: int, payload: bytes = b"", flags: int = 1) -> bytes:
    return struct.pack("=III", code, flags, len(payload)) + payload


PAIRS = [
    (Frontend, AsyncFrontend),
    (BackendConnection, AsyncBackendConnection),
    (BackendChannel, AsyncBackendChannel),
    (FrontendChannel, AsyncFrontendChannel),
    (GpuBackendChannel, AsyncGpuBackendChannel),
    (GpuFrontendChannel, AsyncGpuFrontendChannel),
]


@pytest.mark.parametrize(("plain", "asynchronous"), PAIRS, ids=lambda c: c.__name__)
def test_the_methods_are_the_same(plain: type, asynchronous: type) -> None:
    def public(kind: type) -> set[str]:
        return {name for name in dir(kind) if not name.startswith("_")}

    missing = public(plain) - public(asynchronous)
    # Raw bytes are for tests of peers, which need no event loop.
    assert missing <= {"send_raw"}
    for name in sorted(public(plain) - missing):
        one, other = getattr(plain, name), getattr(asynchronous, name)
        if not callable(one):
            continue
        first = re.sub(r"Async(?=[A-Z])", "", str(inspect.signature(other)))
        assert first == str(inspect.signature(one)), name
        waits = name not in {"close", "fileno", "from_fd", "shutdown"}
        assert inspect.iscoroutinefunction(other) is waits, name


def run(test: Callable[[], Awaitable[None]]) -> None:
    async def limited() -> None:
        async with asyncio.timeout(30):
            await test()

    asyncio.run(limited())


def test_a_conversation(fds: list[int], tmp_path: Path) -> None:
    async def serve(back: AsyncBackendConnection) -> list[str]:
        seen = []
        async with back:
            while (received := await back.receive()) is not None:
                with received:
                    seen.append(received.request.name)
                    match received.request.name:
                        case "GET_FEATURES":
                            await back.reply(received, FeaturesReply(7))
                        case "GET_INFLIGHT_FD":
                            await back.reply(received, InflightReply(1, 0, 1, 1), fds[:1])
                        case "SET_VRING_NUM":
                            await back.acknowledge(received, False)
                        case _:
                            await back.acknowledge(received, True)
        return seen

    async def test() -> None:
        path = str(tmp_path / "s")
        with socket.socket(socket.AF_UNIX) as listener:
            with pytest.raises(Timeout):
                await AsyncFrontend.connect(path, timeout=0.03)
            with pytest.raises(FileNotFoundError):
                await AsyncFrontend.connect(path)
            listener.bind(path)
            listener.listen()
            front = await AsyncFrontend.connect(path, timeout=60)
            accepted, _ = listener.accept()
        back = AsyncBackendConnection(accepted, session=opened(), timeout=60)
        task = asyncio.create_task(serve(back))
        async with front:
            for name in ("features", "protocol_features", "owned"):
                setattr(front.session, name, getattr(opened(), name))
            assert await front.get_features() == 7
            await front.set_mem_table([REGION], fds[:1])
            reply, fd = await front.get_inflight_fd(1, 1)
            assert fd is not None
            fd.close()
            assert reply.mmap_size == 1
            with pytest.raises(RequestFailed):
                await front.set_vring_num(0, 1)
            channel = await front.open_backend_channel()
            channel.close()
            # Tasks take turns on one connection.
            answers = await asyncio.gather(*(front.get_features() for _ in range(20)))
            assert answers == [7] * 20
            with pytest.raises(LocalProtocolError):
                await front.ask(vhost_protocol.SetFeatures(0), [0])
        assert len(await task) == 25

    run(test)


def test_channels(fds: list[int]) -> None:
    from uuid import UUID

    async def test() -> None:
        ours, theirs = socket.socketpair()
        async with (
            AsyncFrontendChannel(ours, opened()) as front,
            AsyncBackendChannel.from_fd(OwnedFd(theirs.detach()), opened()) as back,
        ):

            async def answer() -> None:
                for fd in (fds[0], None):
                    received = await front.receive()
                    assert received is not None
                    await front.answer_lookup(received, fd)

            task = asyncio.create_task(answer())
            found = await back.shared_object_lookup(UUID(int=1))
            assert found is not None
            found.close()
            assert await back.shared_object_lookup(UUID(int=1)) is None
            await task
        ours, theirs = socket.socketpair()
        async with (
            AsyncGpuFrontendChannel(ours) as display,
            AsyncGpuBackendChannel.from_fd(OwnedFd(theirs.detach())) as gpu,
        ):

            async def features() -> None:
                received = await display.receive()
                assert received is not None
                await display.reply(received, GpuFeaturesReply(GpuProtocolFeatures.EDID))

            task = asyncio.create_task(features())
            assert await gpu.get_protocol_features() == GpuProtocolFeatures.EDID
            await task
            size = 700
            update = vhost_protocol.GpuUpdate(0, 0, 0, size, size, b"pixl" * (size * size))

            async def picture() -> object:
                received = await display.receive()
                assert received is not None
                return received.message

            task_2 = asyncio.create_task(picture())
            await gpu.update(update)
            assert await task_2 == update

    run(test)


def test_cancelling_between_messages_loses_nothing(fds: list[int]) -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        whole = frame(12, struct.pack("=Q", 3))
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds[:1]))]
        with theirs:
            async with AsyncBackendConnection(ours, session=opened()) as back:
                theirs.sendmsg([whole[:5]], rights)
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.02):
                        await back.receive()
                assert not back.closed
                theirs.send(whole[5:])
                received = await back.receive()
                assert received is not None
                with received:
                    assert len(received.fds) == 1

    run(test)


def test_cancelling_a_request_closes_the_connection() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncFrontend(ours) as front:
                task = asyncio.create_task(front.get_features())
                await asyncio.sleep(0.01)
                task.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await task
                assert front.closed
                with pytest.raises(LocalProtocolError):
                    await front.get_features()

    run(test)


def test_timeouts() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncFrontend(ours, timeout=0.02) as front:
                with pytest.raises(Timeout, match="GET_FEATURES"):
                    await front.get_features()
                assert front.closed
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncBackendConnection(ours, timeout=0.02) as back:
                theirs.send(b"\1")
                with pytest.raises(Timeout):
                    await back.receive()
                assert back.closed
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncBackendConnection(ours, timeout=0.02, session=opened()) as back:
                theirs.send(frame(3, flags=9) * 3000)

                async def drown() -> None:
                    while (received := await back.receive()) is not None:
                        await back.acknowledge(received, True)

                with pytest.raises(Timeout):
                    await drown()
                assert back.closed

    run(test)


def test_peers_that_leave() -> None:
    async def test() -> None:
        for data, clean in ((b"", True), (b"\1", False)):
            ours, theirs = socket.socketpair()
            async with AsyncBackendConnection(ours) as back:
                theirs.send(data)
                theirs.close()
                if clean:
                    assert await back.receive() is None
                else:
                    with pytest.raises(ConnectionClosed):
                        await back.receive()
        ours, theirs = socket.socketpair()
        async with AsyncFrontend(ours) as front:
            theirs.close()
            with pytest.raises(ConnectionClosed) as closed:
                await front.get_features()
            assert closed.value.request == "GET_FEATURES"
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncFrontend(ours) as front:
                theirs.shutdown(socket.SHUT_WR)
                with pytest.raises(ConnectionClosed):
                    await front.get_features()
        ours, theirs = socket.socketpair()
        async with AsyncBackendConnection(ours, session=opened()) as back:
            theirs.send(frame(3, flags=9))
            received = await back.receive()
            assert received is not None
            ours_unread = theirs
            ours_unread.close()
            with pytest.raises(ConnectionClosed):
                await back.acknowledge(received, True)
        ours, theirs = socket.socketpair()
        async with AsyncBackendConnection(ours) as back:
            ours.send(b"unread")
            theirs.close()
            with pytest.raises(ConnectionClosed, match="reset"):
                await back.receive()

    run(test)


def test_errors_end_the_connection(fds: list[int]) -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncFrontend(ours) as front:
                rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
                theirs.sendmsg([frame(15, bytes(8), flags=5)], rights)
                with pytest.raises(UnexpectedReply):
                    await front.get_features()
                assert front.closed
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncBackendConnection(ours) as back:
                theirs.send(frame(99))
                with pytest.raises(RemoteProtocolError):
                    await back.receive()
                assert back.closed
                with pytest.raises(LocalProtocolError):
                    await back.receive()

    run(test)


def test_closing_wakes_the_task_that_waits() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            back = AsyncBackendConnection(ours)
            task = asyncio.create_task(back.receive())
            await asyncio.sleep(0.01)
            fd = back.fileno()
            back.close()
            back.close()
            # Somebody else's descriptor with the same number must be left alone.
            again = os.dup(theirs.fileno())
            try:
                with pytest.raises(ConnectionClosed, match="closed here"):
                    await task
                assert again == fd
            finally:
                os.close(again)

    run(test)


def test_an_ack_is_not_sent_unasked() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncBackendConnection(ours) as back:
                theirs.send(frame(3))
                received = await back.receive()
                assert received is not None
                assert await back.acknowledge(received, True) is False
                with pytest.raises(LocalProtocolError):
                    await back.reply(received, Ack(0))

    run(test)


def test_shutdown_wakes_the_task_that_waits() -> None:
    async def test() -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            async with AsyncBackendConnection(ours) as back:
                task = asyncio.create_task(back.receive())
                await asyncio.sleep(0.01)
                back.shutdown()
                assert await task is None

    run(test)


def test_a_full_queue_of_connections_is_no_connection(full_listener: socket.socket) -> None:
    path = full_listener.getsockname()

    async def test() -> None:
        with pytest.raises(Timeout):
            await AsyncFrontend.connect(path, timeout=0.05)
        with pytest.raises(BlockingIOError):
            await AsyncFrontend.connect(path, timeout=0)
        for timeout in (60, None):
            connecting = asyncio.create_task(AsyncFrontend.connect(path, timeout=timeout))
            await asyncio.sleep(0.05)
            assert not connecting.done()
            full_listener.accept()[0].close()
            (await connecting).close()

    asyncio.run(asyncio.wait_for(test(), 60))
