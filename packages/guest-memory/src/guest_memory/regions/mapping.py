"""How memory gets into this process: the seam between the region table and the mapping code.

A `Mapper` turns a region and the file descriptor that came with it into a `Mapping`. Two kinds
exist. A mapping with a host address is there as a whole (files, Xen foreign mappings). A mapping
without one is reached page by page: `Mapping.pin` makes a range accessible for a while,
`Mapping.unpin` ends that (Xen grants on demand).
"""

from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from .region import Region

if TYPE_CHECKING:
    from .window import Window


class Mapping(Protocol):
    """Memory of one region, for as long as it is used.

    `GuestMemory` calls `close` once, when the last snapshot and the last view that use the mapping
    are gone, or at once when the table that it was made for comes to nothing. Methods may be called
    from several threads at a time.

    These attributes are optional; without them the default holds:

    ``poison_address`` (int)
        Host address of an aligned 32-bit word that a SIGBUS handler sets when it survived a fault
        in this mapping. Default: `GuestMemory` provides a word.
    ``sealed`` (bool, default True)
        Accesses cannot fault: the peer cannot take pages away.
    ``guarded`` (bool, default False)
        A SIGBUS guard watches the mapping.
    ``read_only`` (bool, default False)
        The memory must not be written.
    ``bounded`` (bool, default False)
        A first access to a page takes a short time that no other process controls.
    """

    @property
    def host_address(self) -> int | None:
        """Where the first byte of the region is in this process, None when mapped on demand."""

    @property
    def size(self) -> int:
        """Size in bytes: the region's."""

    @property
    def page_size(self) -> int:
        """Size in bytes of the pages that the memory is made of (hugetlb: the large ones)."""

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
        """End what the `pin` that returned ``token`` began. Called once for each token."""

    def close(self) -> None:
        """Release the memory. Harmless when repeated."""


class Mapper(Protocol):
    """Makes mappings. One mapper may serve many tables and threads."""

    def map(self, region: Region, fd: int | None) -> Mapping:
        """Map one region, which has passed `Region.check`.

        Args:
            region: what to map.
            fd: the file descriptor that came with it, borrowed for the duration of the call: the
                mapper never closes or keeps it.

        Raises:
            GuestMemoryError: nothing is left mapped.
        """


@runtime_checkable
class WindowMapper(Mapper, Protocol):
    """A mapper that can put its mappings where `GuestMemory` wants them: into the flat window."""

    def map_into(self, region: Region, fd: int | None, window: "Window") -> Mapping:
        """Map one region inside of ``window``, or elsewhere when that is not possible.

        Raises:
            WindowFull: the window has no room left; nothing is mapped.
            GuestMemoryError: nothing is left mapped.
        """


@runtime_checkable
class WindowMapping(Mapping, Protocol):
    """A mapping that can be had a second time, in another window, when the first is too small."""

    def duplicate(self, window: "Window") -> Mapping:
        """Map the same memory into ``window`` too; the two share their fate (poison word).

        Raises:
            GuestMemoryError: nothing is left mapped.
        """
