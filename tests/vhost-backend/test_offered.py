"""What is offered is what works on this machine, for this user."""

import ctypes
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import GuestMemoryError, Userfault
from vhost_backend import BlockDevice, DeviceBackend, VhostUserDaemon
from vhost_backend.control import inflight

NOBODY = 65534


def offered(image: Path, *, memory_slots: bool = False) -> vp.ProtocolFeatures:
    ours, theirs = socket.socketpair()
    device = BlockDevice(image)
    with VhostUserDaemon("disk", DeviceBackend(device), memory_slots=memory_slots) as daemon:
        daemon.start_connection(theirs)
        with vp.Frontend(ours, timeout=60) as frontend:
            frontend.get_features()
            features = frontend.get_protocol_features()
    device.close()
    return features


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
    """In a process of its own, which imports as root and then gives its rights up."""
    image.chmod(0o666)
    done = subprocess.run(
        [sys.executable, __file__, str(image)], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stderr) == (0, "")
    offers, has = done.stdout.split()
    assert offers == has


def as_nobody(image: str) -> None:
    """Print whether postcopy is offered, and whether it works."""
    fd = os.open(image, os.O_RDWR)
    offered(Path(image))  # imports what it takes, also from folders that are root's alone
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    # Whatever folders lead to the image may be root's alone.
    features = offered(Path(f"/proc/self/fd/{fd}"))
    print(bool(features & vp.ProtocolFeatures.PAGEFAULT), works())


def test_a_kernel_that_says_no(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sysctl, a seccomp filter: whatever it is, it shows when it is tried."""
    from guest_memory.linux import syscalls

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


if __name__ == "__main__":
    as_nobody(sys.argv[1])
