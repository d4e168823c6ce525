"""What this process has mapped and open, by /proc."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

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
    # /dev/null is opened once a process, to signal eventfds with.
    held["files"] = {fd: what for fd, what in open_files().items() if what != "/dev/null"}
    return held


def open_files() -> dict[int, str]:
    """Descriptor to what it is open on, without the one that lists them."""
    found = {}
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the listing's own
            found[int(fd)] = os.readlink(f"/proc/self/fd/{fd}")
    return found


@contextmanager
def nothing_left() -> Iterator[None]:
    """Fail when mappings or open files remain that were not there before."""
    before = state()
    yield
    after = state()
    assert after == before, f"left behind: {after}, before: {before}"
