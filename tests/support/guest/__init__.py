"""Real guests for the tests: what they are made of, how they boot, who serves their disks."""

from .absent import in_ci, may_use_userfaultfd, skip_or_fail
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
from .back_ends import INFLIGHT, LOG, OURS, PACKED, POSTCOPY, STORAGE_DAEMON, BackEnd, Served, able
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
    VhostUserDevice,
    VhostUserDisk,
)
from .initramfs import MODULES, build_initramfs
from .migration import SLOW, Migration, MigrationError
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
    "POSTCOPY",
    "SLOW",
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
    "Migration",
    "MigrationError",
    "Missing",
    "Qemu",
    "Qmp",
    "QmpError",
    "Result",
    "Served",
    "VerifyingWriters",
    "VhostUserDevice",
    "VhostUserDisk",
    "able",
    "build_initramfs",
    "cache_directory",
    "in_ci",
    "may_use_userfaultfd",
    "provide",
    "provide_program",
    "provide_qemu",
    "provide_suite",
    "random_bytes",
    "skip_or_fail",
]
