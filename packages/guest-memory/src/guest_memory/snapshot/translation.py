"""Translation of the driver's and the front-end's addresses into addresses of this process."""

from bisect import bisect_right
from typing import NamedTuple

from ..addresses import READ, WRITE, Access, BusAddress, GuestAddress, UserAddress
from ..errors import (
    AccessDenied,
    AccessError,
    NotContiguous,
    NotMapped,
    OutOfBounds,
    UsageError,
)
from ..regions.entry import Entry, Span
from .snapshot import Snapshot


class Segment(NamedTuple):
    """A piece of guest memory that is contiguous in both address spaces.

    Attributes:
        host: host address of the first byte; 0 when the memory is mapped on demand.
        guest: guest-physical address of the first byte.
        length: bytes.
    """

    host: int
    guest: GuestAddress
    length: int


class Translation(Snapshot):
    """Finds the pieces of a range."""

    __slots__ = ()

    def _index(self, address: int) -> int:
        """Index of the entry that holds a guest-physical address, or -1."""
        starts = self._starts
        hint = self._hint  # always valid, as the table does not change
        if hint < len(starts) and starts[hint] <= address < self._entries[hint].end:
            return hint
        index = bisect_right(starts, address) - 1
        if index >= 0 and address < self._entries[index].end:
            self._hint = index
            return index
        return -1

    def _find(self, address: int, length: int) -> Entry | None:
        """The short way: the one entry that holds a whole range; None also for an empty range."""
        if self._physical_addresses and length > 0:
            starts, entries = self._starts, self._entries
            index = self._hint
            if index < len(starts) and starts[index] <= address:
                entry = entries[index]
                if address + length <= entry.end:
                    return entry
            index = bisect_right(starts, address) - 1
            if index >= 0:
                entry = entries[index]
                if address + length <= entry.end:
                    self._hint = index
                    return entry
        return None

    def _physical(
        self, address: int, length: int, access: int, whole: int, whole_length: int
    ) -> list[Span]:
        """Split a range of guest-physical addresses; errors name the whole range."""
        index = self._index(address)
        if index < 0:
            raise OutOfBounds(whole, whole_length)
        entries = self._entries
        entry = entries[index]
        if access & WRITE and entry.read_only:
            raise _refusal(entry, whole, whole_length, access)
        room = entry.end - address
        if length <= room:
            return [(entry, address, length)]
        spans = [(entry, address, room)]
        length -= room
        while length:
            previous = entry
            index += 1
            if index == len(entries) or entries[index].guest != previous.end:
                raise OutOfBounds(whole, whole_length)
            entry = entries[index]
            if access & WRITE and entry.read_only:
                raise _refusal(entry, whole, whole_length, access)
            room = min(length, entry.end - entry.guest)
            spans.append((entry, entry.guest, room))
            length -= room
        return spans

    def _user(
        self, address: int, length: int, access: int, whole: int, whole_length: int
    ) -> list[Span]:
        """Split a range of user addresses; errors name the whole range."""
        spans: list[Span] = []
        index = bisect_right(self._user_starts, address) - 1
        while True:
            if not 0 <= index < len(self._by_user):
                raise OutOfBounds(whole, whole_length)
            entry = self._by_user[index]
            if not entry.user <= address < entry.user_end:
                raise OutOfBounds(whole, whole_length)
            if access & WRITE and entry.read_only:
                raise _refusal(entry, whole, whole_length, access)
            room = min(length, entry.user_end - address)
            spans.append((entry, entry.guest + address - entry.user, room))
            length -= room
            if not length:
                return spans
            address += room
            index += 1

    def _spans(self, address: int, length: int, access: int) -> list[Span]:
        """Split a range of the driver's addresses that is not empty."""
        iotlb = self._state.iotlb
        if iotlb is None:
            return self._physical(address, length, access, address, length)
        spans: list[Span] = []
        for user, size in iotlb.lookup(address, length, access):
            spans += self._user(user, size, access, address, length)
        return spans

    def _span(self, address: int, length: int, access: int) -> Span:
        """The one piece of a range of the driver's addresses; an empty range counts as one byte."""
        if length < 0:
            raise UsageError("a length cannot be negative")
        spans = self._spans(address, length or 1, access)
        if len(spans) > 1:
            raise NotContiguous(address, length)
        return spans[0]

    def segments(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[Segment]:
        """Split a range into pieces, with host and guest-physical addresses.

        Args:
            address: in the driver's address space (guest-physical, or an IOVA with an IOTLB).
            length: bytes; 0 gives an empty list.
            access: 1 read, 2 write, 3 both.

        Returns:
            Pieces in order. Those of on-demand regions have host address 0.

        Raises:
            OutOfBounds: a part of the range is no guest memory.
            IotlbMiss, AccessDenied: the IOTLB lacks an entry, or the access is not allowed.
        """
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        return [
            Segment(entry.host and entry.host + guest - entry.guest, GuestAddress(guest), size)
            for entry, guest, size in self._spans(address, length, access)
        ]

    def pieces(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[tuple[int, int]]:
        """Split a range into (host address, length) pieces.

        Arguments and errors are those of `segments`, and:

        Raises:
            NotMapped: a part of the range is mapped on demand.
        """
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        result = []
        for entry, guest, size in self._spans(address, length, access):
            if not entry.host:
                raise NotMapped(guest, size, access)
            result.append((entry.host + guest - entry.guest, size))
        return result

    def translate(self, address: BusAddress, length: int, access: int = Access.READ_WRITE) -> int:
        """Return the host address of a range that is contiguous in this process.

        Arguments and errors are those of `pieces`, and:

        Raises:
            NotContiguous: the range has more than one piece.
        """
        found = self._find(address, length)
        if found is not None and found.host and not (found.read_only and access & WRITE):
            return found.host + address - found.guest
        entry, guest, _ = self._span(address, length, access)
        if not entry.host:
            raise NotMapped(guest, length, access)
        return entry.host + guest - entry.guest

    def translate_user(
        self, address: UserAddress, length: int, access: int = Access.READ_WRITE
    ) -> int:
        """Return the host address of a contiguous range of user addresses (rings: SET_VRING_ADDR).

        Raises:
            OutOfBounds, NotContiguous, AccessDenied, NotMapped.
        """
        if length < 0:
            raise UsageError("a length cannot be negative")
        spans = self._user(address, length or 1, access, address, length)
        if len(spans) > 1:
            raise NotContiguous(address, length)
        entry, guest, _ = spans[0]
        if not entry.host:
            raise NotMapped(guest, length, access)
        return entry.host + guest - entry.guest

    def user_to_guest(self, address: UserAddress) -> GuestAddress:
        """Translate a user address to a guest-physical one.

        Raises:
            OutOfBounds: it belongs to no region.
        """
        return GuestAddress(self._user(address, 1, READ, address, 1)[0][1])


def _refusal(entry: Entry, address: int, length: int, access: int) -> AccessError:
    """The error for a write: pages pinned only for reading can be pinned again, others cannot."""
    if entry.access & WRITE:
        return AccessDenied(address, length, access)
    return NotMapped(address, length, access)
