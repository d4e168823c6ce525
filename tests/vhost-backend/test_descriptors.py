"""Kick and call descriptors that are blocking, full, or no eventfd: nobody waits for them."""

import contextlib
import fcntl
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

import vhost_protocol as vp
from guest_memory import GuestAddress
from vhost_backend import QueueInfo, Request, VirtioDevice
from vhost_backend.testing import DriverSession, attached
from virtqueue import EngineName

pytestmark = pytest.mark.usefixtures("every_flavour")

FULL = (1 << 64) - 2


class Echo(VirtioDevice):
    device_id = 40
    num_queues = 2

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())

    def queues_per_thread(self) -> list[int]:
        return [3]  # both on one worker: what blocks one stops the other


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def session(engine: EngineName, request: pytest.FixtureRequest) -> Iterator[DriverSession]:
    with attached(
        Echo(), engine=engine, num_queues=2, packed=bool(request.param), timeout=60
    ) as opened:
        yield opened


def submit(session: DriverSession, index: int) -> int:
    source, target = session.allocate(4), session.allocate(4)
    session.memory.write(source, b"ping")
    return session.vrings[index].submit([(source, 4)], [(target, 4)])


def works(session: DriverSession, index: int) -> None:
    """The ring serves a request; its call descriptor is not looked at."""
    identity = submit(session, index)
    vring = session.vrings[index]
    vring.queue.publish()
    os.eventfd_write(vring.kick_fd, 1)
    deadline = time.monotonic() + 60
    while not (done := vring.queue.collect()):
        assert time.monotonic() < deadline, f"vring {index} is stuck"
        time.sleep(0.001)
    assert [head for head, _ in done] == [identity]
    vring.queue.enable_notification()


def full_pipe() -> tuple[int, list[int]]:
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    return writer, [reader]


def full_socket() -> tuple[int, list[int]]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            theirs.send(bytes(4096))
    theirs.setblocking(True)
    return theirs.detach(), [ours.detach()]


def full_eventfd() -> tuple[int, list[int]]:
    fd = os.eventfd(0)
    os.eventfd_write(fd, FULL)
    return fd, []


def regular_file() -> tuple[int, list[int]]:
    return os.memfd_create("call"), []


def read_only() -> tuple[int, list[int]]:
    return os.open("/dev/null", os.O_RDONLY), []


def pipe_without_reader() -> tuple[int, list[int]]:
    reader, writer = os.pipe()
    os.close(reader)
    return writer, []


Make = Callable[[], tuple[int, list[int]]]
CALLS: list[Make] = [
    full_pipe,
    full_socket,
    full_eventfd,
    regular_file,
    read_only,
    pipe_without_reader,
]


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_a_call_descriptor_blocks_nobody(session: DriverSession, make: Make) -> None:
    fd, others = make()
    try:
        session.frontend.set_vring_call(0, fd)
        for _ in range(3):
            works(session, 0)
            works(session, 1)
        assert session.frontend.get_queue_num() == 2
        assert session.stop_ring(1) is not None
        # A good one brings the signals back.
        session.frontend.set_vring_call(0, session.vrings[0].call_fd)
        submit(session, 0)
        session.vrings[0].kick()
        assert session.vrings[0].completions(60)
    finally:
        for each in (fd, *others):
            os.close(each)


@pytest.mark.parametrize("make", CALLS, ids=lambda make: make.__name__)
def test_an_error_descriptor_blocks_nobody(session: DriverSession, make: Make) -> None:
    fd, others = make()
    try:
        session.frontend.set_vring_err(0, fd)
        vring = session.vrings[0]
        submit(session, 0)
        session.memory.write(GuestAddress(vring.descriptor_area), b"\xee" * 8)
        vring.kick()
        works(session, 1)
        assert session.frontend.get_queue_num() == 2
        session.stop_ring(0)
    finally:
        for each in (fd, *others):
            os.close(each)


@pytest.mark.parametrize("kind", ["pipe", "socket", "blocking eventfd", "semaphore"])
def test_a_kick_descriptor_of_another_kind_kicks(session: DriverSession, kind: str) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    elif kind == "socket":
        reader, writer = (end.detach() for end in socket.socketpair())
    else:
        flags = os.EFD_SEMAPHORE if kind == "semaphore" else 0
        reader = os.eventfd(0, flags)
        writer = os.dup(reader)
    session.stop_ring(0)
    vring = session.vrings[0]
    good, vring.kick_fd = vring.kick_fd, reader
    session.start_ring(0, 0x8000_8000 if vring.config.packed else 0)
    vring.kick_fd = good
    try:
        for _ in range(3):
            submit(session, 0)
            vring.queue.publish()
            os.write(writer, (1).to_bytes(8, "little"))
            assert vring.completions(60)
            works(session, 1)
    finally:
        os.close(reader)
        os.close(writer)


def test_a_kick_descriptor_full_of_kicks_does_not_spin_for_ever(session: DriverSession) -> None:
    """A semaphore of very many kicks is readable for long: other rings have their turn."""
    event = os.eventfd(0, os.EFD_SEMAPHORE)
    os.eventfd_write(event, 1 << 40)
    session.frontend.set_vring_kick(0, event)
    for _ in range(5):
        works(session, 1)
    assert session.frontend.get_queue_num() == 2
    session.stop_ring(0)
    os.close(event)


@pytest.mark.parametrize("make", [regular_file, read_only], ids=["file", "/dev/null"])
def test_a_kick_descriptor_that_cannot_be_waited_on_is_refused(
    session: DriverSession, make: Make
) -> None:
    fd, _ = make()
    with pytest.raises(vp.RequestFailed):
        session.frontend.set_vring_kick(0, fd)
    os.close(fd)
    works(session, 1)


def test_the_front_end_may_make_its_copy_blocking_again(session: DriverSession) -> None:
    """The status flags are shared: a front-end can undo what the back-end set on arrival."""
    event = os.eventfd(0, os.EFD_NONBLOCK)
    session.frontend.set_vring_call(0, event)
    with contextlib.suppress(BlockingIOError):
        os.eventfd_read(event)  # the signal of SET_VRING_CALL, if there is one
    flags = fcntl.fcntl(event, fcntl.F_GETFL)
    fcntl.fcntl(event, fcntl.F_SETFL, flags & ~os.O_NONBLOCK)
    os.eventfd_write(event, FULL)
    try:
        works(session, 0)
        works(session, 1)
        assert session.frontend.get_queue_num() == 2
    finally:
        os.eventfd_read(event)  # or the worker is left behind
        os.close(event)


def test_signals_as_messages_wait_for_nobody(engine: EngineName) -> None:
    """A front-end that never acknowledges a VRING_CALL holds up neither worker nor connection."""
    silent = threading.Event()

    def ignore(message: vp.Message) -> bool:
        silent.wait()
        return True

    with attached(
        Echo(),
        engine=engine,
        num_queues=2,
        protocol_features=vp.ProtocolFeatures.INBAND_NOTIFICATIONS,
        handlers={vp.BackendVringCall: ignore},
        timeout=60,
    ) as session:
        session.stop_ring(0)
        session.frontend.set_vring_call(0, None)
        session.start_ring(0, 0)
        session.frontend.set_vring_call(0, None)
        try:
            for _ in range(3):
                works(session, 0)
                works(session, 1)
            session.stop_ring(0)
        finally:
            silent.set()


def test_many_call_descriptors_leave_nothing(session: DriverSession) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(200):
        fd = os.eventfd(0)
        session.frontend.set_vring_call(0, fd)
        os.close(fd)
    assert len(os.listdir("/proc/self/fd")) <= before + 1
