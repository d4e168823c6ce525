"""Views: guest memory without copies."""

from ..addresses import WRITE, Access, BusAddress
from ..errors import Poisoned, Unguarded, UsageError
from ..regions.entry import Span
from .translation import Translation


class Views(Translation):
    """Gives out views that keep the memory mapped."""

    __slots__ = ()

    def view(self, address: BusAddress, length: int, access: int = Access.READ_WRITE) -> memoryview:
        """Return a zero-copy view of a range, which keeps the memory mapped as long as it exists.

        A view of memory that needs a guard keeps the whole snapshot, so that it stays watched.

        Args:
            address: in the driver's address space.
            length: bytes.
            access: with 1 (read) the view is read-only.

        Raises:
            Unguarded: the memory may vanish and no guard is installed; use `read` and `write`.
            NotContiguous: the range has more than one piece; see `views`.
            OutOfBounds, IotlbMiss, AccessDenied, Poisoned.
        """
        return self._export(self._span(address, length, access), length, access)

    def views(
        self, address: BusAddress, length: int, access: int = Access.READ_WRITE
    ) -> list[memoryview]:
        """The same as `view` for ranges of any number of pieces; an empty range has none."""
        if length <= 0:
            if length:
                raise UsageError("a length cannot be negative")
            return []
        spans = self._spans(address, length, access)
        return [self._export(span, span[2], access) for span in spans]

    def _export(self, span: Span, length: int, access: int) -> memoryview:
        entry, guest, _ = span
        if not entry.direct:
            raise Unguarded(guest, length)
        if entry.poison.value:
            raise Poisoned(guest, length)
        if not entry.host:
            entry = entry.pinned(guest, length or 1, access)
        view = entry.export(entry.host + guest - entry.guest, length, self)
        return view if access & WRITE else view.toreadonly()
