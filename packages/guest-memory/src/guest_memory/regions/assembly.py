"""Assembly: maps regions, into the flat window where that is possible, and makes entries."""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from operator import attrgetter
from typing import cast

from ..errors import GuestMemoryError, Overlap
from .entry import Entry
from .mapping import Mapper, WindowMapper, WindowMapping
from .mmap_mapper import MmapMapper
from .region import Region
from .window import Window, WindowFull

# The usual one first: isinstance with a protocol is slow, and imports `inspect` from Python 3.12.
_WINDOW_MAPPERS = (MmapMapper, WindowMapper)


def map_all(
    pairs: Sequence[tuple[Region, int | None]], mapper: Mapper
) -> tuple[list[Entry], Window | None]:
    """Map regions with their files; return entries sorted by guest address, and their window.

    After an error nothing stays mapped.
    """
    window = None
    if pairs and isinstance(mapper, _WINDOW_MAPPERS):
        window = Window.reserve(sum(_room(region) for region, _ in pairs))
    entries: list[Entry] = []
    try:
        for region, fd in pairs:
            try:
                entry = _map_one(mapper, region, fd, window)
            except WindowFull:  # its pages are so large that even ample room has no aligned place
                entry = _map_one(mapper, region, fd, None)
            entries.append(entry)
    except BaseException:
        for entry in entries:
            entry.release()
        raise
    entries.sort(key=attrgetter("guest"))
    return entries, window


def map_another(
    entries: list[Entry],
    region: Region,
    fd: int | None,
    mapper: Mapper,
    window: Window | None,
    *,
    fixed: bool,
) -> tuple[list[Entry], Entry, Window | None]:
    """Map one more region.

    Args:
        entries: the present entries.
        region: the region to add.
        fd: its file; borrowed.
        mapper: maps it.
        window: the window of the present entries.
        fixed: entries must not move into a larger window.

    Returns:
        The present entries (some may have been mapped anew), the added one, and their window.

    After an error nothing more is mapped than before.
    """
    fresh: list[Entry] = []
    try:
        if isinstance(mapper, _WINDOW_MAPPERS):
            if window is None:
                window = Window.reserve(_room(region))
            try:
                entry = _map_one(mapper, region, fd, window)
            except WindowFull:
                bigger = None if fixed else _bigger(window, _room(region))
                if bigger is not None:
                    entries = _move_over(entries, window, bigger, fresh)
                    window = bigger
                try:
                    entry = _map_one(mapper, region, fd, bigger)
                except WindowFull:
                    entry = _map_one(mapper, region, fd, None)
        else:
            entry = _map_one(mapper, region, fd, None)
    except BaseException:
        for other in fresh:
            other.release()
        raise
    return entries, entry, window


def check_neighbours(region: Region, others: Iterable[Entry], space: str) -> None:
    """Raise `Overlap` when a region shares addresses of a space ("guest", "user") with others."""
    for entry in others:
        other = entry.region
        if space == "guest":
            clash = (
                other.guest_address < region.guest_end and region.guest_address < other.guest_end
            )
        else:
            clash = other.user_address < region.user_end and region.user_address < other.user_end
        if clash:
            start = region.guest_address if space == "guest" else region.user_address
            raise Overlap(start, region.size, space)


def check_overlaps(regions: Sequence[Region]) -> None:
    """Raise `Overlap` when two regions share guest or user addresses."""
    by_guest = sorted(regions)
    for before, after in pairwise(by_guest):
        if before.guest_end > after.guest_address:
            raise Overlap(after.guest_address, after.size, "guest")
    by_user = sorted(regions, key=attrgetter("user_address"))
    for before, after in pairwise(by_user):
        if before.user_end > after.user_address:
            raise Overlap(after.user_address, after.size, "user")


def _room(region: Region) -> int:
    """The most bytes that a region takes of a window: its own, and alignment on both sides."""
    return region.size + (1 << 22)


def _map_one(mapper: Mapper, region: Region, fd: int | None, window: Window | None) -> Entry:
    """Map a region; ``window`` is None for mappers that know nothing of windows."""
    if window is None:
        return Entry.of(region, mapper.map(region, fd))
    return Entry.of(region, cast(WindowMapper, mapper).map_into(region, fd, window))


def _bigger(window: Window | None, room: int) -> Window | None:
    return Window.reserve(2 * (0 if window is None else window.taken) + room)


def _move_over(
    entries: list[Entry], window: Window | None, bigger: Window, fresh: list[Entry]
) -> list[Entry]:
    """Map entries a second time, in a larger window; present snapshots keep the old one.

    An entry that cannot be mapped twice stays where it is, outside of the new window.
    """
    result = []
    for entry in entries:
        if (
            window is not None
            and entry.host
            and window.contains(entry.host, entry.end - entry.guest)
            and isinstance(entry.mapping, WindowMapping)
        ):
            try:
                entry = Entry.of(entry.region, entry.mapping.duplicate(bigger))
                fresh.append(entry)
            except GuestMemoryError:
                pass
        result.append(entry)
    return result
