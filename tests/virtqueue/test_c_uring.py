"""io_uring as a transfer's executor: kernels that refuse or falter, threads, forks, descriptors."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import gc
import os
import platform
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from transfer_rig import BUILD, EVERYTHING, FAULTS, FAULTY, Pieces, build, ring_fds

from virtqueue import (
    EngineUnavailable,
    Operation,
    Transfer,
    TransferFlags,
    UringUnavailable,
    UsageError,
)
from virtqueue.c_library import Library
from virtqueue.native import transfer

needs_ring = pytest.mark.skipif(
    not Transfer.uring_available(), reason="the kernel gives no io_uring"
)

SINGLE_ISSUER, DEFER_TASKRUN, COOP_TASKRUN, SUBMIT_ALL = 1 << 12, 1 << 13, 1 << 8, 1 << 7


class Faults:
    """The knobs of c/uring_faults.c."""

    def __init__(self, library: Library) -> None:
        self._library = library.held

    def __getattr__(self, name: str) -> int:
        return ctypes.c_uint32.in_dll(self._library, f"fault_{name}").value

    def set(self, name: str, value: int) -> None:
        ctypes.c_uint32.in_dll(self._library, f"fault_{name}").value = value

    def plan(self, *actions: int) -> None:
        """What the next calls of io_uring_enter do: 0, -errno, or submit so many at most."""
        array = (ctypes.c_int32 * 256).in_dll(self._library, "fault_plan")
        array[: len(actions)] = list(actions)
        self.set("planned", len(actions))
        self.set("entered", 0)
        self.set("submitted", 0)
        self.set("durable", 0)


@pytest.fixture(scope="module")
def faulty_library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    if not BUILD.exists() or not FAULTS.exists():
        pytest.skip("the C sources are not there")
    path = tmp_path_factory.mktemp("engine") / "libvirtqueue.so"
    return build(path, EVERYTHING, *FAULTY)


@pytest.fixture
def faults(faulty_library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[Faults]:
    monkeypatch.setattr(transfer, "library", lambda: faulty_library)
    faults = Faults(faulty_library)
    faults.plan()
    yield faults
    for name in ("planned", "setup_flags", "features"):
        faults.set(name, 0)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[int]:
    fd = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


class Round:
    """Writes of random blocks, a sync, and reads of the same blocks; `check` compares."""

    def __init__(self, count: int, seed: int = 0, size: int = 512) -> None:
        self.count, self.size = count, size
        self.pieces = Pieces(2 * count * size)
        self.random = random.Random(seed)

    def run(self, mover: Transfer, fd: int) -> None:
        half = self.count * self.size
        self.pieces.memory[:] = self.random.randbytes(half) + bytes(half)
        for n in range(self.count):
            chain = self.pieces.chain([(n * self.size, self.size)], False)
            mover.add(Operation.WRITE, *chain, self.size, n * self.size)
        mover.add_sync()
        for n in range(self.count):
            at = half + n * self.size
            chain = self.pieces.chain([(at, 7), (at + 7, self.size - 7)], True)
            mover.add(Operation.READ, *chain, self.size, n * self.size)
        assert mover.run(fd) == 2 * self.count + 1, mover.results
        assert mover.results == [self.size] * self.count + [0] + [self.size] * self.count
        assert self.pieces.memory[half:] == self.pieces.memory[:half]


# ---- kernels that know less, and calls that fail ----


@needs_ring
@pytest.mark.parametrize(
    ("refused", "left"),
    [
        (0, SINGLE_ISSUER | DEFER_TASKRUN | SUBMIT_ALL),
        (DEFER_TASKRUN, COOP_TASKRUN | SUBMIT_ALL),
        (DEFER_TASKRUN | COOP_TASKRUN, 0),
    ],
)
def test_an_older_kernel_gets_a_plainer_ring(
    faults: Faults, disk: int, refused: int, left: int
) -> None:
    faults.set("setup_flags", refused)
    with Transfer(100, uring=True) as mover:
        # This kernel may refuse more than was asked of the pretended one.
        assert faults.last_flags & ~(1 << 6) in (left, COOP_TASKRUN | SUBMIT_ALL, 0)
        assert not faults.last_flags & refused
        Round(20).run(mover, disk)
    assert faults.submitted >= 40


@needs_ring
@pytest.mark.parametrize("feature", [0, 1, 2, 3])
def test_a_ring_that_lacks_what_is_needed_is_none(faults: Faults, feature: int) -> None:
    faults.set("features", 1 << feature)
    with pytest.raises(UringUnavailable) as caught:
        Transfer(8, uring=True)
    assert caught.value.errno == errno.ENOSYS
    assert not Transfer.uring_available()
    assert ring_fds() == []


@needs_ring
@pytest.mark.parametrize(
    "plan",
    [
        [-errno.EINTR] * 5,
        [-errno.EAGAIN],
        [-errno.EAGAIN, -errno.EAGAIN, -errno.EBUSY],
        [0, -errno.EBUSY, -errno.EAGAIN],
        [1] * 50,
        [1, -errno.EAGAIN, -errno.EAGAIN, 2, -errno.EINTR, 1],
        [-errno.EBADF],
        [-errno.EPERM],
        [1, -errno.ENOMEM, 1, -errno.EBADF, -errno.EBADF],
        [-errno.EEXIST],
        [-errno.EEXIST, -errno.EEXIST],
    ],
    ids=str,
)
def test_submission_that_fails_or_falters(faults: Faults, disk: int, plan: list[int]) -> None:
    with Transfer(100, uring=True) as mover:
        faults.plan(*plan)
        for turn in range(3):
            Round(30, turn).run(mover, disk)


@needs_ring
def test_random_failures_lose_nothing(faults: Faults, disk: int) -> None:
    random_ = random.Random(7)
    passing = [0, 0, 0, 1, 2, 5, -errno.EINTR, -errno.EAGAIN, -errno.EBUSY]
    with Transfer(61, uring=True) as mover:
        for turn in range(60):
            faults.plan(*random_.choices(passing, k=40))
            Round(30, turn).run(mover, disk)
            assert faults.submitted


@needs_ring
def test_a_ring_that_is_gone_for_good_leaves_plain_calls(faults: Faults, disk: int) -> None:
    with Transfer(100, uring=True) as mover:
        faults.plan(-errno.EINVAL)
        Round(30).run(mover, disk)
        assert ring_fds() == []
        faults.plan()
        Round(30).run(mover, disk)
        assert faults.entered == 0


@needs_ring
def test_only_durable_writes_are_submitted_as_such(faults: Faults, disk: int) -> None:
    pieces = Pieces(4096)
    with Transfer(12, uring=True) as mover:
        for n in range(12):
            operation = Operation.WRITE if n % 3 else Operation.READ
            flags = TransferFlags(n & 1)
            mover.add(operation, *pieces.chain([(0, 16)], n % 3 == 0), 16, n << 4, flags=flags)
        mover.run(disk)
    # Of the odd ones 1, 5, 7 and 11 are writes.
    assert (faults.submitted, faults.durable) == (12, 4)


# ---- a kernel that refuses, for real ----

FILTER = """
import ctypes, errno, platform, sys
PWRITEV2 = {"x86_64": 328, "aarch64": 287}[platform.machine()]
FDATASYNC = {"x86_64": 75, "aarch64": 83}[platform.machine()]
PREADV2 = {"x86_64": 327, "aarch64": 286}[platform.machine()]
SETUP, ENTER = 425, 426

class Instruction(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8),
                ("k", ctypes.c_uint32)]

class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_uint16), ("filter", ctypes.POINTER(Instruction))]

def refuse(answers):
    '''System call numbers, and the errno of each, from now on in this process.'''
    code = [Instruction(0x20, 0, 0, 0)]  # load the number
    for number, error in answers.items():
        code += [Instruction(0x15, 0, 1, number), Instruction(0x06, 0, 0, 0x50000 | error)]
    code.append(Instruction(0x06, 0, 0, 0x7FFF0000))
    array = (Instruction * len(code))(*code)
    program = Program(len(code), array)
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    zero = ctypes.c_ulong(0)
    assert prctl(38, ctypes.c_ulong(1), zero, zero, zero) == 0
    assert prctl(22, ctypes.c_ulong(2), ctypes.byref(program), zero, zero) == 0
"""


def in_a_process(tmp_path: Path, script: str) -> None:
    """Run a script after `FILTER`; the file "disk" and `Pieces` are there for it."""
    start = f"""
import os, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from transfer_rig import Pieces, ring_fds
from virtqueue import Operation, Transfer, TransferFlags, UringUnavailable
disk = os.open({str(tmp_path / "disk")!r}, os.O_RDWR | os.O_CREAT)
"""
    done = subprocess.run(
        [sys.executable, "-c", FILTER + start + script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr


filters = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "aarch64"), reason="its system call numbers are not here"
)


@filters
@pytest.mark.parametrize("answer", ["EPERM", "ENOSYS"])
def test_a_refusal_is_typed_and_says_why(tmp_path: Path, answer: str) -> None:
    in_a_process(
        tmp_path,
        f"""
refuse({{SETUP: errno.{answer}}})
assert Transfer.uring_available() is False
try:
    Transfer(4, uring=True)
except UringUnavailable as error:
    assert error.errno == errno.{answer}
    assert os.strerror(errno.{answer}) in str(error)
else:
    raise SystemExit("it was not refused")
Transfer(4)
""",
    )


@filters
@needs_ring
def test_a_refusal_that_comes_later_leaves_plain_calls(tmp_path: Path) -> None:
    in_a_process(
        tmp_path,
        """
mover = Transfer(8, uring=True)
refuse({ENTER: errno.EPERM, PREADV2: errno.EPERM})
pieces = Pieces(1 << 13)
pieces.memory[:4096] = b"x" * 4096
for n in range(8):
    chain = pieces.chain([(0, 512)], False)
    mover.add(Operation.WRITE, *chain, 512, 512 * n, flags=TransferFlags.DSYNC)
assert mover.run(disk) == 8, mover.results
os.posix_fadvise(disk, 0, 0, os.POSIX_FADV_DONTNEED)
for n in range(8):
    mover.add(Operation.READ, *pieces.chain([(4096 + 512 * n, 512)], True), 512, 512 * n)
assert mover.run(disk) == 8, mover.results
assert pieces.memory[4096:] == b"x" * 4096
""",
    )


@needs_ring
def test_no_descriptor_is_left_for_a_ring(tmp_path: Path) -> None:
    in_a_process(
        tmp_path,
        """
import resource
Transfer(1)  # the library is loaded before
resource.setrlimit(resource.RLIMIT_NOFILE, (disk + 1, disk + 1))
try:
    Transfer(4, uring=True)
except UringUnavailable as error:
    assert error.errno == errno.EMFILE
else:
    raise SystemExit("it was not refused")
""",
    )


@filters
@pytest.mark.parametrize("uring", [False, pytest.param(True, marks=needs_ring)])
def test_a_durable_write_is_one_by_its_call_or_by_a_sync(tmp_path: Path, uring: bool) -> None:
    """pwritev2 where there is one; otherwise the write is followed by fdatasync."""
    in_a_process(
        tmp_path,
        f"""
pieces = Pieces(4096)
chain = pieces.chain([(0, 512)], False)
mover = Transfer(2, uring={uring})
refuse({{PWRITEV2: errno.ENOSPC}})
mover.add(Operation.WRITE, *chain, 512, 0)
assert mover.run(disk) == 1
mover.add(Operation.WRITE, *chain, 512, 0, flags=TransferFlags.DSYNC)
mover.run(disk)
assert mover.results == [-errno.ENOSPC], mover.results
""",
    )
    in_a_process(
        tmp_path,
        f"""
pieces = Pieces(4096)
chain = pieces.chain([(0, 512)], False)
mover = Transfer(2, uring={uring})
refuse({{PWRITEV2: errno.ENOSYS, FDATASYNC: errno.EDQUOT}})
mover.add(Operation.WRITE, *chain, 512, 0, flags=TransferFlags.DSYNC)
mover.run(disk)
assert mover.results == [-errno.EDQUOT], mover.results
mover.add_sync()
mover.run(disk)
assert mover.results == [-errno.EDQUOT], mover.results
""",
    )


@filters
@pytest.mark.parametrize("error", ["EOPNOTSUPP", "ENOSYS", "EPERM"])
def test_reads_where_nothing_can_be_tried_first(tmp_path: Path, error: str) -> None:
    in_a_process(
        tmp_path,
        f"""
pieces = Pieces(1 << 14)
os.pwrite(disk, b"y" * (1 << 14), 0)
mover = Transfer(4)
refuse({{PREADV2: errno.{error}}})
for n in range(4):
    mover.add(Operation.READ, *pieces.chain([(n << 12, 4096)], True), 4096, n << 12)
assert mover.run(disk) == 4, mover.results
assert pieces.memory[:] == b"y" * (1 << 14)
""",
    )


# ---- threads, forks, descriptors ----


@needs_ring
def test_any_thread_may_run_it(faults: Faults, disk: int) -> None:
    with Transfer(100, uring=True) as mover:
        failures: list[BaseException] = []

        def run(turn: int) -> None:
            try:
                Round(30, turn).run(mover, disk)
            except BaseException as error:
                failures.append(error)

        for turn in range(4):
            if turn % 2:
                run(turn)
                continue
            thread = threading.Thread(target=run, args=(turn,))
            thread.start()
            thread.join()
        assert failures == []
        assert faults.submitted >= 4 * 60
        assert len(ring_fds()) == 1


@needs_ring
@pytest.mark.parametrize("used", [False, True])
def test_a_child_after_fork_gets_a_ring_of_its_own(
    faulty_library: Library, tmp_path: Path, used: bool
) -> None:
    in_a_process(
        tmp_path,
        f"""
from test_c_uring import Faults, Round, transfer
from virtqueue.c_library import Library
library = Library(__import__("pathlib").Path({str(faulty_library.path)!r}))
transfer.library = lambda: library
faults = Faults(library)
mover = Transfer(100, uring=True)
if {used}:
    Round(30).run(mover, disk)
child = os.fork()
before = faults.submitted
if not child:
    code = 1
    try:
        own = os.open({str(tmp_path / "other")!r}, os.O_RDWR | os.O_CREAT)
        for turn in range(3):
            Round(30, turn).run(mover, own)
        assert faults.submitted >= before + 180
        assert len(ring_fds()) == 1
        mover.close()
        code = 0
    finally:
        os._exit(code)
for turn in range(10):
    Round(30, turn).run(mover, disk)
assert os.waitpid(child, 0)[1] == 0
Round(30).run(mover, disk)
assert faults.submitted >= before + 660
""",
    )


@needs_ring
def test_rings_are_given_back_and_not_inherited(disk: int) -> None:
    assert ring_fds() == []
    mover = Transfer(4, uring=True)
    (ring,) = ring_fds()
    assert fcntl.fcntl(ring, fcntl.F_GETFD) & fcntl.FD_CLOEXEC
    mover.close()
    mover.close()
    assert ring_fds() == []
    with pytest.raises(UsageError, match="closed"):
        mover.run(disk)
    with Transfer(4, uring=True) as mover:
        assert len(ring_fds()) == 1
    assert ring_fds() == []
    mover = Transfer(4, uring=True)
    del mover
    gc.collect()
    assert ring_fds() == []
    assert Transfer.uring_available()
    assert ring_fds() == []


@needs_ring
def test_what_is_worth_no_ring_does_not_get_to_it(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page cache is reached by plain calls, and so is what is alone; durable writes are not."""
    if not BUILD.exists():
        pytest.skip("the C sources are not there")
    library = build(tmp_path_factory.mktemp("engine") / "libvirtqueue.so", *FAULTY)
    monkeypatch.setattr(transfer, "library", lambda: library)
    faults = Faults(library)
    disk = os.open(tmp_path / "disk", os.O_RDWR | os.O_CREAT)
    pieces = Pieces(1 << 13)
    with Transfer(100, uring=True) as mover:
        Round(30).run(mover, disk)
        for flags in (0, TransferFlags.DSYNC):
            chain = pieces.chain([(0, 4096)], False)
            mover.add(Operation.WRITE, *chain, 4096, 0, flags=TransferFlags(flags))
        assert mover.run(disk) == 2
        assert faults.entered == 0
        for n in range(2):
            chain = pieces.chain([(n << 12, 4096)], False)
            mover.add(Operation.WRITE, *chain, 4096, n << 12, flags=TransferFlags.DSYNC)
        assert mover.run(disk) == 2
        if filesystem_type(disk) != "tmpfs":
            assert (faults.submitted, faults.durable) == (2, 2)
    os.close(disk)
    memory = os.memfd_create("disk")
    os.ftruncate(memory, 1 << 13)
    with Transfer(4, uring=True) as mover:
        faults.plan()
        for n in range(2):
            chain = pieces.chain([(n << 12, 4096)], True)
            mover.add(Operation.READ, *chain, 4096, n << 12)
        assert mover.run(memory) == 2
        assert faults.entered == 0
    os.close(memory)


def filesystem_type(fd: int) -> str:
    device = os.fstat(fd).st_dev
    numbers = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == numbers:
            return fields[fields.index("-") + 1]
    return ""


def test_without_the_library_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Library:
        raise ImportError("not here")

    monkeypatch.setattr(transfer, "library", missing)
    assert Transfer.uring_available() is False
    with pytest.raises(EngineUnavailable, match="not here"):
        Transfer(1, uring=True)
