"""Mappers: the interface between the region table and the code that maps memory.

A `Mapper` turns a region and the file descriptor that came with it into a `Mapping`. There are two
kinds. A mapping with a host address is mapped as a whole (files, Xen foreign mappings). A mapping
without one is mapped on demand (Xen grants): `Mapping.pin` makes a range accessible, and
`Mapping.unpin` ends that.
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .region import Region

if TYPE_CHECKING:
    from .window import Window


class Mapping(Protocol):
    """The mapped memory of one region.

    `GuestMemory` calls `close` once: when the last snapshot and the last view that use the mapping
    are gone, or at once when making its table fails. Several threads may call methods at a time.

    These attributes are optional, with defaults:

    ``poison_address`` (int)
        Host address of an aligned 32-bit word that a SIGBUS handler sets after a fault in this
        mapping. Default: `GuestMemory` provides a word.
    ``sealed`` (bool, default True)
        Accesses cannot fault: the peer cannot take pages away.
    ``guarded`` (bool, default False)
        A SIGBUS guard watches the mapping.
    ``read_only`` (bool, default False)
        The memory must not be written.
    ``bounded`` (bool, default False)
        A first access to a page takes a short time, and no other process can delay it.
    """

    @property
    def host_address(self) -> int | None:
        """Host address of the region's first byte; None when mapped on demand."""

    @property
    def size(self) -> int:
        """The region's size in bytes."""

    @property
    def page_size(self) -> int:
        """Size in bytes of the memory's pages (of hugetlb: the large pages)."""

    @property
    def poisoned(self) -> bool:
        """True once an access has failed because the memory behind it had gone."""

    def pin(self, address: int, length: int, access: int) -> tuple[int, Any]:
        """Make a range accessible.

        Args:
            address: guest-physical address of the first byte, inside the region.
            length: bytes; the range ends inside the region.
            access: 1 read, 2 write, 3 both (`Access`).

        Returns:
            The host address of the first byte (the range is contiguous there) and a token for
            `unpin`. Pins nest: a range stays accessible until each of its tokens is given back.

        Raises:
            GuestMemoryError: the range cannot be made accessible.
        """

    def unpin(self, token: Any) -> None:
        """End the pin that ``token`` came from. Called once for each token."""

    def close(self) -> None:
        """Release the memory. Calling it again is harmless."""


class Mapper(Protocol):
    """Makes mappings. One mapper may serve many tables and threads."""

    def map(self, region: Region, fd: int | None) -> Mapping:
        """Map one region, which has passed `Region.check`.

        Args:
            region: the region to map.
            fd: the file descriptor that came with it. It is borrowed for the call: the mapper must
                not close or keep it.

        Raises:
            GuestMemoryError: nothing is left mapped.
        """


@runtime_checkable
class WindowMapper(Mapper, Protocol):
    """A mapper that can put its mappings into `GuestMemory`'s flat window."""

    def map_into(self, region: Region, fd: int | None, window: "Window") -> Mapping:
        """Map one region inside of ``window``, or elsewhere when that is not possible.

        Raises:
            WindowFull: the window has no room left; nothing is mapped.
            GuestMemoryError: nothing is left mapped.
        """


@runtime_checkable
class WindowMapping(Mapping, Protocol):
    """A mapping that can be mapped again in another window, when the first is too small."""

    def duplicate(self, window: "Window") -> Mapping:
        """Map the same memory into ``window`` too; both mappings share one poison word.

        Raises:
            GuestMemoryError: nothing is left mapped.
        """
