"""Request numbers and structure bytes: those of xen/privcmd.h and xen/gntdev.h."""

import ctypes
import struct

from vhost_xen import abi


def test_request_numbers() -> None:
    assert abi.MMAPBATCH_V2 == 0x205004
    assert abi.MAP_GRANT_REF == 0x184700
    assert abi.UNMAP_GRANT_REF == 0x104701


def test_batch_bytes() -> None:
    request = abi.BatchRequest(domid=0x0102, first_frame=0x1_0000_0000, count=2, address=0xABC000)
    count, domid, padding, address, frames, errors = struct.unpack(
        "=IHHQQQ", bytes(request.argument)
    )
    assert (count, domid, padding, address) == (2, 0x0102, 0, 0xABC000)
    assert ctypes.sizeof(request.argument) == 32
    assert list((ctypes.c_uint64 * 2).from_address(frames)) == [0x1_0000_0000, 0x1_0000_0001]
    assert list((ctypes.c_int * 2).from_address(errors)) == [0, 0]


def test_batch_failures_are_those_the_kernel_wrote() -> None:
    request = abi.BatchRequest(domid=1, first_frame=10, count=4, address=0)
    assert request.failures(9) == (0, [])
    at = struct.unpack("=IHHQQQ", bytes(request.argument))[5]
    (ctypes.c_int * 4).from_address(at)[2] = -22
    assert request.failures(9) == (1, [(12, 22)])
    (ctypes.c_int * 4).from_address(at)[3] = -3
    assert request.failures(9) == (2, [(12, 22), (13, 3)])
    assert request.failures(1) == (2, [(12, 22)])
    assert request.failures(0) == (2, [])


def test_large_batches_are_made_in_steps() -> None:
    request = abi.BatchRequest(domid=1, first_frame=7, count=200_000, address=0)
    assert list(request.frames) == list(range(7, 200_007))
    for position in (0, 65_535, 65_536, 199_999):
        request.errors[position] = -22
    assert request.failures(3) == (4, [(7, 22), (65_542, 22), (65_543, 22)])


def test_map_bytes() -> None:
    request = abi.MapRequest(domid=7, first_reference=0xFFFFFFFE, count=2)
    assert bytes(request.argument) == struct.pack("=IIQIIII", 2, 0, 0, 7, 0xFFFFFFFE, 7, 0xFFFFFFFF)
    struct.pack_into("=Q", request.argument, 8, 0x1234000)
    assert request.index == 0x1234000


def test_map_of_nothing_is_as_long_as_its_number_says() -> None:
    assert bytes(abi.MapRequest(0, 0, 0).argument) == bytes(24)


def test_unmap_bytes() -> None:
    argument = abi.UnmapRequest(0x1122334455667000, 3).argument
    assert bytes(argument) == struct.pack("=QII", 0x1122334455667000, 3, 0)
