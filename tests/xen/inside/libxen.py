"""The other side, through the Xen project's own libraries: a domain that never runs, its grants.

Nothing here uses the packages under test: what the mapper shows is compared with what this sees.
"""

import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Sequence
from glob import glob

PAGE = 4096
GUEST_PAGES = 4096  # 16 MiB
FIRST_REFERENCE = 8  # the lower ones belong to toolstacks

PERMIT, READ_ONLY, READING, WRITING = 1, 4, 8, 16

_u32 = ctypes.c_uint32
_u64 = ctypes.c_uint64
_void = ctypes.c_void_p


class _CreateDomain(ctypes.Structure):
    _fields_ = (
        ("ssidref", _u32),
        ("handle", ctypes.c_uint8 * 16),
        ("flags", _u32),
        ("iommu_opts", _u32),
        ("max_vcpus", _u32),
        ("max_evtchn_port", _u32),
        ("max_grant_frames", ctypes.c_int32),
        ("max_maptrack_frames", ctypes.c_int32),
        ("grant_opts", _u32),
        ("vmtrace_size", _u32),
        ("cpupool_id", _u32),
        ("emulation_flags", _u32),
        ("misc_flags", _u32),
    )


def _library(name: str) -> ctypes.CDLL:
    return ctypes.CDLL(min(glob(f"/xenlib/lib{name}.so.*")), use_errno=True)


_ctrl = _library("xenctrl")
_memory = _library("xenforeignmemory")


def _declare(library: ctypes.CDLL, name: str, result: object, *arguments: object) -> None:
    function = getattr(library, name)
    function.restype = result
    function.argtypes = arguments


_int = ctypes.c_int
_declare(_ctrl, "xc_interface_open", _void, _void, _void, ctypes.c_uint)
_declare(
    _ctrl, "xc_domain_create", _int, _void, ctypes.POINTER(_u32), ctypes.POINTER(_CreateDomain)
)
_declare(_ctrl, "xc_set_paging_mempool_size", _int, _void, _u32, _u64)
_declare(_ctrl, "xc_domain_setmaxmem", _int, _void, _u32, _u64)
_declare(
    _ctrl,
    "xc_domain_populate_physmap_exact",
    _int,
    _void,
    _u32,
    ctypes.c_ulong,
    ctypes.c_uint,
    ctypes.c_uint,
    _void,
)
_declare(_ctrl, "xc_domain_destroy", _int, _void, _u32)
_declare(_ctrl, "xc_send_debug_keys", _int, _void, ctypes.c_char_p)
_declare(
    _ctrl,
    "xc_readconsolering",
    _int,
    _void,
    _void,
    ctypes.POINTER(ctypes.c_uint),
    _int,
    _int,
    ctypes.POINTER(_u32),
)
_declare(_memory, "xenforeignmemory_open", _void, _void, ctypes.c_uint)
_declare(
    _memory,
    "xenforeignmemory_map_resource",
    _void,
    _void,
    ctypes.c_uint16,
    ctypes.c_uint,
    ctypes.c_uint,
    ctypes.c_ulong,
    ctypes.c_ulong,
    ctypes.POINTER(_void),
    _int,
    _int,
)
_declare(_memory, "xenforeignmemory_unmap_resource", _int, _void, _void)

_interface = _ctrl.xc_interface_open(None, None, 0)
_foreign = _memory.xenforeignmemory_open(None, 0)


def _checked(result: int, what: str) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


class Guest:
    """A domain with memory in its first GUEST_PAGES frames and a grant table, without a CPU run."""

    def __init__(self) -> None:
        config = _CreateDomain(
            flags=3,  # HVM, hardware-assisted paging
            max_vcpus=1,
            max_evtchn_port=1023,
            max_grant_frames=8,
            max_maptrack_frames=8,
            grant_opts=1,
            emulation_flags=1,  # local APIC
        )
        domid = _u32(0)
        _checked(_ctrl.xc_domain_create(_interface, domid, config), "xc_domain_create")
        self.domid = domid.value
        self._table: int | None = None
        self._resource: int | None = None
        _checked(
            _ctrl.xc_set_paging_mempool_size(_interface, self.domid, 4 << 20),
            "xc_set_paging_mempool_size",
        )
        _checked(_ctrl.xc_domain_setmaxmem(_interface, self.domid, 24 << 10), "xc_domain_setmaxmem")
        frames = (_u64 * GUEST_PAGES)(*range(GUEST_PAGES))
        _checked(
            _ctrl.xc_domain_populate_physmap_exact(
                _interface, self.domid, GUEST_PAGES, 0, 0, ctypes.addressof(frames)
            ),
            "xc_domain_populate_physmap_exact",
        )
        address = _void()
        self._resource = _memory.xenforeignmemory_map_resource(
            _foreign,
            self.domid,
            1,  # the grant table
            0,  # its shared entries
            0,
            4,
            ctypes.byref(address),
            mmap.PROT_READ | mmap.PROT_WRITE,
            0,
        )
        if not self._resource:
            raise OSError(ctypes.get_errno(), "xenforeignmemory_map_resource")
        self._table = address.value

    def _entry(self, reference: int) -> int:
        assert self._table is not None
        return self._table + 8 * reference

    def grant(self, reference: int, frame: int, read_only: bool = False, to: int = 0) -> None:
        """Give domain `to` the right to map a frame."""
        entry = self._entry(reference)
        _u32.from_address(entry + 4).value = frame
        ctypes.c_uint16.from_address(entry + 2).value = to
        # Last of all, as the hypervisor looks at the flags first.
        ctypes.c_uint16.from_address(entry).value = PERMIT | (READ_ONLY if read_only else 0)

    def revoke(self, reference: int) -> None:
        """Take the right back; nobody may have the frame mapped."""
        assert not self.flags(reference) & (READING | WRITING)
        ctypes.memset(self._entry(reference), 0, 8)

    def flags(self, reference: int) -> int:
        """The entry's flags: the hypervisor marks READING and WRITING while it is mapped."""
        return ctypes.c_uint16.from_address(self._entry(reference)).value

    def busy(self, references: Sequence[int]) -> list[int]:
        """Those of the references that the hypervisor counts as mapped."""
        return [number for number in references if self.flags(number) & (READING | WRITING)]

    def destroy(self) -> None:
        """End the domain; its mapped pages stay until they are unmapped."""
        if self._resource:
            _checked(
                _memory.xenforeignmemory_unmap_resource(_foreign, self._resource),
                "xenforeignmemory_unmap_resource",
            )
            self._resource = self._table = None
        _checked(_ctrl.xc_domain_destroy(_interface, self.domid), "xc_domain_destroy")


_guests: list[Guest] = []


def guest() -> Guest:
    """The guest that checks share; made when first asked for."""
    if not _guests:
        _guests.append(Guest())
    return _guests[0]


def debug_key(key: str) -> str:
    """Press one of the hypervisor's debug keys; return what it printed."""
    _read_ring()
    _checked(_ctrl.xc_send_debug_keys(_interface, key.encode()), "xc_send_debug_keys")
    return _read_ring()


_ring_index = _u32(0)


def _read_ring() -> str:
    text = b""
    while True:
        buffer = ctypes.create_string_buffer(1 << 16)
        count = ctypes.c_uint(len(buffer))
        result = _ctrl.xc_readconsolering(
            _interface, buffer, ctypes.byref(count), 0, 1, ctypes.byref(_ring_index)
        )
        _checked(result, "xc_readconsolering")
        if not count.value:
            return text.decode(errors="replace")
        text += buffer.raw[: count.value]


class OwnGrants:
    """Pages of this domain that it grants to itself, by gntalloc."""

    def __init__(self, count: int, writable: bool = True, to: int = 0) -> None:
        self._fd = os.open("/dev/xen/gntalloc", os.O_RDWR | os.O_CLOEXEC)
        request = bytearray(struct.pack("=HHIQ", to, int(writable), count, 0) + bytes(4 * count))
        # The number has the size of a request for one reference in it, whatever the count.
        fcntl.ioctl(self._fd, 0x184705, request, True)
        self._index = struct.unpack_from("=Q", request, 8)[0]
        self.references = list(struct.unpack_from(f"={count}I", request, 16))
        self.memory = mmap.mmap(self._fd, count * PAGE, offset=self._index)
        self._count = count
        view = ctypes.c_char.from_buffer(self.memory)
        self.address = ctypes.addressof(view)

    def close(self) -> None:
        """Revoke the grants and free the pages."""
        self.memory.close()
        fcntl.ioctl(self._fd, 0x104706, struct.pack("=QII", self._index, self._count, 0))
        os.close(self._fd)
