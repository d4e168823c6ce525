"""Real guests for the tests: what they are made of, how they boot, who serves their disks."""

from .absent import in_ci, skip_or_fail
from .assets import (
    Assets,
    Missing,
    Qemu,
    cache_directory,
    provide,
    provide_program,
    provide_qemu,
    provide_suite,
)
from .back_ends import INFLIGHT, LOG, OURS, PACKED, STORAGE_DAEMON, BackEnd, able
from .bed import MIB, Bed, Disk, random_bytes
from .guest import (
    MEMORY_KIB,
    Command,
    CommandFailed,
    Guest,
    GuestError,
    GuestGone,
    GuestTimeout,
    Result,
    VhostUserDisk,
)
from .initramfs import MODULES, build_initramfs
from .qmp import Qmp, QmpError
from .workload import VerifyingWriters

__all__ = [
    "INFLIGHT",
    "LOG",
    "MEMORY_KIB",
    "MIB",
    "MODULES",
    "OURS",
    "PACKED",
    "STORAGE_DAEMON",
    "Assets",
    "BackEnd",
    "Bed",
    "Command",
    "CommandFailed",
    "Disk",
    "Guest",
    "GuestError",
    "GuestGone",
    "GuestTimeout",
    "Missing",
    "Qemu",
    "Qmp",
    "QmpError",
    "Result",
    "VerifyingWriters",
    "VhostUserDisk",
    "able",
    "build_initramfs",
    "cache_directory",
    "in_ci",
    "provide",
    "provide_program",
    "provide_qemu",
    "provide_suite",
    "random_bytes",
    "skip_or_fail",
]
