"""The kernel's interface: request numbers and the bytes of each request.

The structures are those of ``xen/privcmd.h`` and ``xen/gntdev.h``, in native byte order and natural
alignment. A request number is ``_IOC(_IOC_NONE, type, number, size)`` with the structure's size.
"""

import array
import ctypes
import struct
from itertools import islice
from typing import Final


def _ioc(letter: str, number: int, size: int) -> int:
    return size << 16 | ord(letter) << 8 | number


_BATCH: Final = struct.Struct("@IHxxQQQ")  # num, domid, addr, arr, err
_MAP: Final = struct.Struct("@IIQ")  # count, padding, index (out); references follow
_REFERENCE: Final = struct.Struct("@II")  # domid, reference
_UNMAP: Final = struct.Struct("@QII")  # index, count, padding

MMAPBATCH_V2: Final = _ioc("P", 4, _BATCH.size)
MAP_GRANT_REF: Final = _ioc("G", 0, _MAP.size + _REFERENCE.size)  # one number for every count
UNMAP_GRANT_REF: Final = _ioc("G", 1, _UNMAP.size)

XEN_PAGE_SIZE: Final = 4096
# Large arrays are processed in steps of this many entries, so that other threads get their turn.
_STEP: Final = 1 << 16
GRANT_ADDRESS_BIT: Final = 1 << 63
DOMID_FIRST_RESERVED: Final = 0x7FF0


class BatchRequest:
    """One MMAPBATCH_V2: map `count` frames of a domain from `first_frame` on, at `address`.

    `argument` is the ioctl's argument. It points to `frames` and `errors`, which this object keeps
    alive. The kernel writes one errno (0 or negative) for each page to `errors`.
    """

    def __init__(self, domid: int, first_frame: int, count: int, address: int) -> None:
        self.frames: array.array[int] = array.array("Q")
        for start in range(0, count, _STEP):
            step = min(_STEP, count - start)
            self.frames.extend(range(first_frame + start, first_frame + start + step))
        self.errors: array.array[int] = array.array("i", bytes(4 * count))
        self.argument: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(
            _BATCH.pack(
                count,
                domid,
                address,
                self.frames.buffer_info()[0],
                self.errors.buffer_info()[0],
            ),
            _BATCH.size,
        )

    def failures(self, limit: int) -> tuple[int, list[tuple[int, int]]]:
        """The number of failed frames, and the first `limit` of them with their positive errno."""
        failed = 0
        first: list[tuple[int, int]] = []
        for start in range(0, len(self.errors), _STEP):
            errors = self.errors[start : start + _STEP]
            count = len(errors) - errors.count(0)
            failed += count
            if count and len(first) < limit:
                frames = self.frames[start : start + _STEP]
                found = (
                    (frame, -error) for frame, error in zip(frames, errors, strict=True) if error
                )
                first += islice(found, limit - len(first))
        return failed, first


class MapRequest:
    """One MAP_GRANT_REF: consecutive references of a domain, for one later mmap at `index`."""

    def __init__(self, domid: int, first_reference: int, count: int) -> None:
        data = bytearray(_MAP.pack(count, 0, 0))
        pairs = array.array("I", (domid,)) * (2 * count)
        pairs[1::2] = array.array("I", range(first_reference, first_reference + count))
        # An empty request still has room for one reference, which the request number counts.
        data += pairs.tobytes() or bytes(_REFERENCE.size)
        self.argument: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(
            bytes(data), len(data)
        )

    @property
    def index(self) -> int:
        """The offset to give to mmap; the ioctl sets it."""
        index: int = _MAP.unpack_from(self.argument)[2]
        return index


class UnmapRequest:
    """One UNMAP_GRANT_REF: `index` and `count` must be those of one MAP_GRANT_REF."""

    def __init__(self, index: int, count: int) -> None:
        self.argument: ctypes.Array[ctypes.c_char] = ctypes.create_string_buffer(
            _UNMAP.pack(index, count, 0), _UNMAP.size
        )
