# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""A front-end shrinks the file that it has shared.

Each way to touch the memory, in a process of its own, ends in an error and not in SIGBUS. Other
regions and other connections go on.
"""

import fcntl
import os
import signal

import pytest
from guest_memory_support import memfd, region, run

from guest_memory import MmapMapper, SharedMapping
from guest_memory.linux import syscalls

SETUP = """
import errno, fcntl, os, sys
from guest_memory import *
from guest_memory_support import memfd, region
PAGE = 4096
fd = os.memfd_create("victim")
os.ftruncate(fd, 4 * PAGE)
# Shrunk after mapping to one page; a second, sound region follows it in guest memory.
other, other_fd = None, os.memfd_create("sound")
os.ftruncate(other_fd, 4 * PAGE)
memory = GuestMemory.map([(region(0, 4 * PAGE), fd), (region(4 * PAGE, 4 * PAGE), other_fd)])
bystander = GuestMemory.map([(region(0, 4 * PAGE), other_fd)])
memory.write(PAGE, b"there")
assert not memory.poisoned
os.ftruncate(fd, PAGE)
def fails(call, address, length):
    try:
        call()
    except Poisoned as error:
        assert (error.address, error.length) == (address, length), error
    else:
        raise AssertionError("no error")
    assert memory.poisoned
    assert not bystander.poisoned
"""

FINISH = """
# The region stays out of use, the rest works.
fails(lambda: memory.read(0, 1), 0, 1)
memory.write(5 * PAGE, b"goes on")
assert memory.read(5 * PAGE, 7) == b"goes on"
assert bystander.read(PAGE, 7) == b"goes on"
print("survived")
"""

PATHS = {
    "read": "fails(lambda: memory.read(PAGE, 5), PAGE, 5)",
    "read the tail": "fails(lambda: memory.read(4 * PAGE - 1, 1), 4 * PAGE - 1, 1)",
    "read over the edge": "fails(lambda: memory.read(PAGE - 8, 16), PAGE - 8, 16)",
    "read into": "fails(lambda: memory.read_into(PAGE, bytearray(5)), PAGE, 5)",
    "write": "fails(lambda: memory.write(PAGE, b'12345'), PAGE, 5)",
    "write over the edge": "fails(lambda: memory.write(PAGE - 8, bytes(16)), PAGE - 8, 16)",
    "write two regions": "fails(lambda: memory.write(4 * PAGE - 2, b'four'), 4 * PAGE - 2, 2)",
    "load": """
for size in (1, 2, 4, 8):
    fails(lambda: memory.load(PAGE, size), PAGE, size)
""",
    "store 1": "fails(lambda: memory.store(PAGE, 1, 1), PAGE, 1)",
    "store 2": "fails(lambda: memory.store(PAGE, 2, 1), PAGE, 2)",
    "store 2, upper half": "fails(lambda: memory.store(PAGE + 2, 2, 1), PAGE + 2, 2)",
    "store 4": "fails(lambda: memory.store(PAGE, 4, 1), PAGE, 4)",
    "store 8": "fails(lambda: memory.store(PAGE, 8, 1), PAGE, 8)",
    "from a file": """
fails(lambda: memory.copy_from_fd(PAGE, other_fd, 16, 0), PAGE, 16)
""",
    "from a file, two regions": """
fails(lambda: memory.copy_from_fd(4 * PAGE - 8, other_fd, 16, 0), 4 * PAGE - 8, 16)
""",
    "from a file, second region": """
import itertools
from guest_memory import GuestMemory
os.ftruncate(fd, 4 * PAGE)
os.ftruncate(other_fd, 0)
done = memory.copy_from_fd(4 * PAGE - 8, os.open("/dev/zero", os.O_RDONLY), 16)
assert done == 8, done
fails(lambda: memory.copy_from_fd(4 * PAGE, os.open("/dev/zero", os.O_RDONLY), 8), 4 * PAGE, 8)
memory.write(0, b"the first region is sound")
bystander = None
print("survived")
sys.exit()
""",
    "to a file": "fails(lambda: memory.copy_to_fd(PAGE, other_fd, 16, 0), PAGE, 16)",
    "to a pipe": """
reader, writer = os.pipe()
fails(lambda: memory.copy_to_fd(PAGE, writer, 16), PAGE, 16)
""",
    "a view": """
try:
    memory.view(PAGE, 5)
except Unguarded as error:
    assert (error.address, error.length) == (PAGE, 5)
else:
    raise AssertionError("a view without a guard")
assert memory.window is None
memory.read(0, 1)
fails(lambda: memory.read(PAGE, 5), PAGE, 5)
""",
    "postcopy": """
late = memory.with_postcopy(True)
fails(lambda: late.read(PAGE, 5), PAGE, 5)
""",
    "without process_vm_readv": """
from guest_memory.linux import copies
copies._without_process_vm = True
assert memory.write(5 * PAGE, bytes(range(256)) * 20) == 5120
assert memory.read(5 * PAGE, 5120) == bytes(range(256)) * 20
fails(lambda: memory.read(PAGE - 8, 16), PAGE - 8, 16)
""",
    "without process_vm_writev": """
from guest_memory.linux import copies
copies._without_process_vm = True
fails(lambda: memory.write(PAGE - 8, bytes(16)), PAGE - 8, 16)
""",
}


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_each_access_path(path: str) -> None:
    result = run(SETUP + path + FINISH)
    assert (result.returncode, result.stdout) == (0, "survived\n"), result.stderr


def test_without_all_this_it_would_be_sigbus() -> None:
    """The control: a program that insists on a view without a guard is ended by the kernel."""
    result = run(
        SETUP
        + """
memory = GuestMemory.map([(region(0, PAGE), other_fd)], MmapMapper(guarded=True))
view = memory.view(0, 4)
assert bytes(view) == bytes(4)
os.ftruncate(other_fd, 0)
bytes(view)
print("survived")
"""
    )
    assert (result.returncode, result.stdout) == (-signal.SIGBUS, "")


def test_a_guard_reports_through_the_poison_word() -> None:
    """What a guard does, done by hand: pages in place of the missing ones, and the word set."""
    result = run(
        SETUP
        + """
from guest_memory import abi
from guest_memory.linux import syscalls
memory = GuestMemory.map([(region(0, 4 * PAGE), other_fd)], MmapMapper(guarded=True))
array = memory.view(0, 4 * PAGE)
os.ftruncate(other_fd, 0)
row = abi.GmRegion.from_address(memory.table.regions)
syscalls.map_memory(row.host_address, 4 * PAGE, 3, 0x32, -1, 0)
assert bytes(array[:4]) == bytes(4), "views go on, over zeroes"
memory.read(0, 4)
import ctypes
ctypes.c_uint32.from_address(row.poison).value = 1
bystander = GuestMemory()
for call in (lambda: memory.read(0, 4), lambda: memory.write(0, b"four"),
             lambda: memory.load(0, 4), lambda: memory.store(0, 4, 4),
             lambda: memory.view(0, 4), lambda: memory.copy_to_fd(0, fd, 4, 0)):
    fails(call, 0, 4)
print("survived")
"""
    )
    assert (result.returncode, result.stdout) == (0, "survived\n"), result.stderr


def test_sealed_files_cannot_be_shrunk() -> None:
    result = run(
        """
import os
from guest_memory import *
memory, fd = GuestMemory.allocate(8192)
view = memory.view(4096, 4)
for size in (0, 4096, 1 << 20):
    try:
        os.ftruncate(fd, size)
    except PermissionError:
        pass
    else:
        raise AssertionError("it is not sealed")
assert bytes(view) == bytes(4)
print("survived")
"""
    )
    assert (result.returncode, result.stdout) == (0, "survived\n"), result.stderr


@pytest.mark.parametrize("kind", ["region", "shared"])
def test_a_file_that_is_cut_and_sealed_while_it_is_looked_at_is_not_taken_for_sealed(
    monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Its size was asked before; what is beyond the present end can be no safe memory."""
    original = syscalls.file_system

    def cut_and_seal(fd: int) -> tuple[int, int]:
        os.ftruncate(fd, 0)
        fcntl.fcntl(fd, 1033, 2)
        return original(fd)

    monkeypatch.setattr(syscalls, "file_system", cut_and_seal)
    with memfd(1 << 20) as fd:
        if kind == "shared":
            with SharedMapping(fd, 1 << 20) as shared:
                assert not shared.sealed
                assert not shared.direct
        else:
            mapping = MmapMapper().map(region(0, 1 << 20), fd)
            assert not mapping.sealed
            mapping.close()
