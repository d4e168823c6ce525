"""Pins: parts of on-demand regions that are mapped as long as a snapshot lives."""

from collections.abc import Iterable
from operator import attrgetter

from .entry import Entry

_Range = tuple[Entry, int, int, int]  # the region's entry, guest-physical start and end, access


def pinned_rows(
    regions: list[Entry], present: list[Entry], asked: Iterable[tuple[Entry, int, int, int]]
) -> list[Entry]:
    """Split regions into rows of which some are pinned.

    Args:
        regions: entries of whole regions, sorted by guest address.
        present: rows of the present snapshot; its pins are kept.
        asked: the parts to pin, as (entry of the region, guest-physical address, length, access).

    Raises:
        GuestMemoryError: the mapper could not map a part; nothing more is pinned than before.
    """
    kept = [entry for entry in present if entry.parent is not None and entry.host]
    missing = _missing(_merged(_wanted(asked, kept)), kept)
    pinned: list[Entry] = []
    try:
        for entry, start, end, access in missing:
            pinned.append(entry.pinned(start, end - start, access))
    except BaseException:
        for entry in pinned:
            entry.release()
        raise
    return _woven(regions, sorted([*kept, *pinned], key=attrgetter("guest")))


def _wanted(asked: Iterable[tuple[Entry, int, int, int]], kept: list[Entry]) -> list[_Range]:
    """Round to pages. A kept part that lacks a wanted access is pinned anew with both accesses."""
    wanted: list[_Range] = []
    for entry, guest, size, access in asked:
        if entry.host:
            continue
        page = entry.page_size
        start = max(guest & -page, entry.guest)
        end = min(-(-(guest + size) & -page), entry.end)
        for old in kept[:]:
            if old.guest < end and start < old.end and access & ~old.access:
                kept.remove(old)
                wanted.append((entry, old.guest, old.end, access | old.access))
        wanted.append((entry, start, end, access))
    return wanted


def _merged(wanted: list[_Range]) -> list[_Range]:
    """Join ranges that overlap, and neighbours with the same access."""
    merged: list[_Range] = []
    for entry, start, end, access in sorted(wanted, key=lambda item: item[1:]):
        if merged and merged[-1][0] is entry and start <= merged[-1][2]:
            _, first, last, before = merged[-1]
            if start < last or access == before:
                merged[-1] = (entry, first, max(last, end), before | access)
                continue
        merged.append((entry, start, end, access))
    return merged


def _missing(merged: list[_Range], kept: list[Entry]) -> list[_Range]:
    """Leave out parts that are pinned already."""
    missing: list[_Range] = []
    for entry, start, end, access in merged:
        for old in kept:
            if old.guest < end and start < old.end:
                if start < old.guest:
                    missing.append((entry, start, old.guest, access))
                start = old.end
        if start < end:
            missing.append((entry, start, end, access))
    return missing


def _woven(regions: list[Entry], pinned: list[Entry]) -> list[Entry]:
    """Put pinned parts in their places, and the rest of the regions between them."""
    rows: list[Entry] = []
    parts = iter(pinned)
    part = next(parts, None)
    for entry in regions:
        position = entry.guest
        while part is not None and part.parent is entry:
            if position < part.guest:
                rows.append(_rest(entry, position, part.guest))
            rows.append(part)
            position = part.end
            part = next(parts, None)
        if position == entry.guest:
            rows.append(entry)
        elif position < entry.end:
            rows.append(_rest(entry, position, entry.end))
    return rows


def _rest(entry: Entry, start: int, end: int) -> Entry:
    """The part of an on-demand region between pinned ones; the region's entry keeps the mapping."""
    return Entry(
        entry.region,
        entry.mapping,
        lambda: None,
        parent=entry,
        start=start - entry.region.guest_address,
        size=end - start,
    )
