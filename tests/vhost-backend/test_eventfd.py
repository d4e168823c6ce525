"""Reading and writing other people's descriptors never waits, whatever they do meanwhile."""

import contextlib
import errno
import fcntl
import os
import select
import socket
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from vhost_backend.fds import eventfd
from vhost_backend.fds import eventfd_signal as aio_signal

FULL = (1 << 64) - 2
UNLIMITED = (1 << 64) - 1
#: What a call gets that must not wait at all.
PATIENCE = 60.0


class Hasty:
    """A poll(2) that finds everything ready: how it was before the front-end got in between."""

    def register(self, fd: int, events: int) -> None:
        self._found = (fd, events)

    def poll(self, timeout: float) -> list[tuple[int, int]]:
        return [self._found]


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventfd, "select", SimpleNamespace(**{**vars(select), "poll": Hasty}))


@pytest.fixture
def ends() -> Iterator[Callable[[str], tuple[int, int]]]:
    """Makes (reading, writing) ends of a kind, blocking."""
    opened: list[int] = []

    def make(kind: str) -> tuple[int, int]:
        if kind == "pipe":
            made = os.pipe()
        elif kind == "socket":
            ours, theirs = socket.socketpair()
            made = ours.detach(), theirs.detach()
        elif kind == "datagrams":
            ours, theirs = socket.socketpair(type=socket.SOCK_DGRAM)
            made = ours.detach(), theirs.detach()
        else:
            fd = os.eventfd(0, os.EFD_SEMAPHORE if kind == "semaphore" else 0)
            made = fd, os.dup(fd)
        for fd in made:
            os.set_blocking(fd, True)
            opened.append(fd)
        return made

    yield make
    for fd in opened:
        os.close(fd)


def at_once(call: Callable[[int], bool], fd: int, rescue: Callable[[], object]) -> bool:
    """What the call says; when it waits it is rescued, and that is a failure."""
    answers: list[bool] = []
    thread = threading.Thread(target=lambda: answers.append(call(fd)), daemon=True)
    thread.start()
    thread.join(PATIENCE)
    if thread.is_alive():
        rescue()
        thread.join(PATIENCE)
        pytest.fail("it waited")
    return answers[0]


KINDS = ["eventfd", "semaphore", "pipe", "socket", "datagrams"]


def fill(kind: str, writer: int) -> None:
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        if kind in ("eventfd", "semaphore"):
            os.eventfd_write(writer, FULL)
        while True:
            os.write(writer, (1).to_bytes(8, "little"))
    os.set_blocking(writer, True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("hasty")
def test_reading_what_somebody_else_has_read(
    ends: Callable[[str], tuple[int, int]], kind: str
) -> None:
    reader, writer = ends(kind)
    assert at_once(eventfd.drain, reader, lambda: os.write(writer, b"12345678"))
    os.write(writer, (1).to_bytes(8, "little"))
    assert eventfd.drain(reader)
    assert not select.select([reader], [], [], 0)[0], "the kick was taken"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("hasty")
def test_signalling_what_somebody_else_has_filled(
    ends: Callable[[str], tuple[int, int]], kind: str
) -> None:
    reader, writer = ends(kind)
    fill(kind, writer)
    for _ in range(3):
        assert at_once(eventfd.signal, writer, lambda: os.read(reader, 8))
    assert select.select([reader], [], [], 0)[0] == [reader]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("aio", [True, False], ids=["aio", "no aio"])
def test_signals_arrive(
    ends: Callable[[str], tuple[int, int]], kind: str, aio: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the kernel does not signal for us."""
    if not aio:
        monkeypatch.setattr(aio_signal, "add_one", lambda fd: errno.ENOSYS)
    reader, writer = ends(kind)
    for _ in range(3):
        assert eventfd.signal(writer)
        assert os.read(reader, 8) == (1).to_bytes(8, "little")
    fill(kind, writer)
    assert eventfd.signal(writer)


@pytest.mark.parametrize("kind", KINDS)
def test_kicks_are_taken_where_reads_cannot_be_told_not_to_wait(
    ends: Callable[[str], tuple[int, int]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pipes and sockets on Linux before 6.4, eventfds before 5.8."""

    def unknown(*arguments: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "preadv2")

    monkeypatch.setattr(os, "preadv", unknown)
    reader, writer = ends(kind)
    assert at_once(eventfd.drain, reader, lambda: os.write(writer, b"12345678"))
    for _ in range(2):
        os.write(writer, (1).to_bytes(8, "little"))
    assert eventfd.drain(reader)
    if kind != "eventfd":
        assert eventfd.drain(reader)
    assert not select.select([reader], [], [], 0)[0]


@pytest.mark.parametrize("kind", ["pipe", "socket"])
@pytest.mark.parametrize("reads", [True, False], ids=["preadv2", "otherwise"])
def test_the_end_of_the_other_side_is_noticed(
    kind: str, reads: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not reads:

        def unknown(*arguments: object) -> int:
            raise OSError(errno.EOPNOTSUPP, "preadv2")

        monkeypatch.setattr(os, "preadv", unknown)
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    os.close(writer)
    assert not eventfd.drain(reader)
    os.close(reader)
    assert not eventfd.drain(reader)
    assert not eventfd.signal(reader)


@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_nobody_listens(kind: str) -> None:
    if kind == "pipe":
        reader, writer = os.pipe()
    else:
        reader, writer = (end.detach() for end in socket.socketpair())
    os.close(reader)
    assert not eventfd.signal(writer)
    os.close(writer)


def test_what_is_none_of_them_is_left_alone() -> None:
    """A terminal stands for all that may make whoever touches it wait."""
    ours, theirs = os.openpty()
    memory = os.memfd_create("file")
    for fd in (ours, theirs, memory):
        assert not eventfd.can_kick(fd)
        assert not eventfd.signal(fd)
    assert not select.select([ours], [], [], 0)[0]
    assert os.fstat(memory).st_size == 0
    for fd in (ours, theirs, memory):
        os.close(fd)


@pytest.mark.parametrize("kind", KINDS)
def test_what_can_kick(ends: Callable[[str], tuple[int, int]], kind: str) -> None:
    reader, writer = ends(kind)
    os.write(writer, (1).to_bytes(8, "little"))
    assert eventfd.can_kick(reader)
    assert os.read(reader, 8) == (1).to_bytes(8, "little"), "nothing was taken"


def test_a_counter_stops_at_its_limit() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    os.eventfd_write(fd, FULL)
    for _ in range(3):
        assert aio_signal.add_one(fd) == 0
    assert os.eventfd_read(fd) == UNLIMITED
    os.close(fd)


def test_many_signals_from_many_threads() -> None:
    """Completions pile up in the kernel and are thrown away in time; no signal is."""
    fds = [os.eventfd(0, os.EFD_NONBLOCK) for _ in range(4)]

    def signal(fd: int) -> None:
        for _ in range(5000):
            assert aio_signal.add_one(fd) == 0

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(signal, fds * 2))
    for fd in fds:
        assert os.eventfd_read(fd) == 10_000
        os.close(fd)


def test_a_forked_child_signals_too() -> None:
    fd = os.eventfd(0, os.EFD_NONBLOCK)
    assert aio_signal.add_one(fd) == 0
    before = len(os.listdir("/proc/self/fd"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child takes no lock of others
        child = os.fork()
    if not child:
        done = aio_signal.add_one(fd) == 0
        os._exit(0 if done and len(os.listdir("/proc/self/fd")) == before else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert os.eventfd_read(fd) == 2
    os.close(fd)


def test_the_owner_of_a_descriptor_decides_its_flags() -> None:
    """What all of this is for: the flag that is set on arrival is not ours alone."""
    theirs = os.eventfd(0)
    ours = eventfd.adopt(os.dup(theirs))
    assert not os.get_blocking(theirs)
    fcntl.fcntl(theirs, fcntl.F_SETFL, 0)
    assert os.get_blocking(ours)
    os.close(theirs)
    os.close(ours)


def test_a_wake_up_never_reaches_a_number_that_was_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its number may be another file's by then, which would get eight bytes written into it."""
    wake = eventfd.WakeFd()
    fd = wake.fd
    write = os.write
    closer = threading.Thread(target=wake.close)
    open_at_write: list[bool] = []

    def slow(number: int, data: bytes) -> int:
        closer.start()
        closer.join(0.2)  # time to go wrong in
        open_at_write.append(os.path.exists(f"/proc/self/fd/{number}"))
        return write(number, data)

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", slow)
        wake.wake()
    closer.join()
    assert open_at_write == [True]
    assert wake.fd == -1
    wake.wake()
    wake.clear()
    wake.close()
    assert not os.path.exists(f"/proc/self/fd/{fd}")
