"""What is offered is what works on this machine, for this user."""

import ctypes
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import GuestMemoryError, Userfault
from vhost_backend import BlockDevice, DeviceBackend, VhostUserDaemon
from vhost_backend.control import inflight

PR_CAPBSET_DROP = 24
CAP_SYS_PTRACE = 19
NOBODY = 65534


def offered(image: Path, *, memory_slots: bool = False) -> vp.ProtocolFeatures:
    ours, theirs = socket.socketpair()
    device = BlockDevice(image)
    with VhostUserDaemon("disk", DeviceBackend(device), memory_slots=memory_slots) as daemon:
        daemon.start_connection(theirs)
        with vp.Frontend(ours, timeout=30) as frontend:
            frontend.get_features()
            features = frontend.get_protocol_features()
    device.close()
    return features


def in_a_child(work: Callable[[], bool]) -> bool:
    """Whether `work` returns true in a process of its own, which may give things up."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if work() else 1)
        except BaseException:
            import traceback

            traceback.print_exc()
            os._exit(2)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 1)
    return status == 0


def works() -> bool:
    """Whether a userfaultfd can be had here, asked of the kernel."""
    try:
        Userfault().close()
    except GuestMemoryError:
        return False
    return True


def test_postcopy_is_offered_exactly_where_it_works(image: Path) -> None:
    assert bool(offered(image) & vp.ProtocolFeatures.PAGEFAULT) == works()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become nobody")
def test_for_an_unprivileged_user_too(image: Path) -> None:
    image.chmod(0o666)
    fd = os.open(image, os.O_RDWR)

    def agrees() -> bool:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
        # Whatever folders lead to it may be root's alone.
        features = offered(Path(f"/proc/self/fd/{fd}"))
        return bool(features & vp.ProtocolFeatures.PAGEFAULT) == works()

    try:
        assert in_a_child(agrees)
    finally:
        os.close(fd)


def test_a_kernel_that_says_no(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sysctl, a seccomp filter: whatever it is, it shows when it is tried."""
    import guest_memory.syscalls as syscalls

    real = syscalls.syscall

    def refuse(number: int, *arguments: object) -> int:
        if number == syscalls.USERFAULTFD:
            ctypes.set_errno(errno.ENOSYS)
            return -1
        answer: int = real(number, *arguments)
        return answer

    monkeypatch.setattr(syscalls, "syscall", refuse)
    assert not offered(image) & vp.ProtocolFeatures.PAGEFAULT


def test_a_kernel_that_has_no_anonymous_memory_to_share(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from guest_memory import MappingFailed

    assert offered(image) & vp.ProtocolFeatures.INFLIGHT_SHMFD

    def refuse(size: int, name: str) -> int:
        raise MappingFailed(errno.ENOSYS, "memfd_create")

    monkeypatch.setattr(inflight, "allocate_memfd", refuse)
    assert not offered(image) & vp.ProtocolFeatures.INFLIGHT_SHMFD


def test_slots_or_postcopy_never_both(image: Path) -> None:
    features = offered(image, memory_slots=True)
    assert features & vp.ProtocolFeatures.CONFIGURE_MEM_SLOTS
    assert not features & vp.ProtocolFeatures.PAGEFAULT
