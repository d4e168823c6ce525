"""What this process has mapped and open, by /proc."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

DEVICES = ("/dev/xen/gntdev", "/dev/xen/privcmd", "/dev/xen/gntalloc")


def mapped(device: str) -> list[tuple[int, int, str]]:
    """The mappings of a Xen device: (start, end, permissions)."""
    found = []
    with open("/proc/self/maps") as maps:
        for line in maps:
            fields = line.split()
            if len(fields) > 5 and fields[5] == device:
                start, end = (int(part, 16) for part in fields[0].split("-"))
                found.append((start, end, fields[1]))
    return found


def state() -> dict[str, object]:
    """All that a check has to leave as it found it."""
    held: dict[str, object] = {device: mapped(device) for device in DEVICES}
    held["files"] = sorted(fd for fd in os.listdir("/proc/self/fd") if not _is_null(fd))
    return held


def _is_null(fd: str) -> bool:
    """Whether it is /dev/null, which a process opens once to signal eventfds with."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}") == "/dev/null"
    except FileNotFoundError:  # the folder's own
        return False


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail when mappings or open files remain that were not there before."""
    before = state()
    yield
    after = state()
    assert after == before, f"left behind: {after}, before: {before}"
