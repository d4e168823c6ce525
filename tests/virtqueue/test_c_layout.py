"""The C header and the ctypes declarations describe the same bytes."""

from __future__ import annotations

import ctypes
import re
from enum import IntEnum, IntFlag
from pathlib import Path

import pytest

from guest_memory import abi
from virtqueue import layout
from virtqueue.c_library import library
from virtqueue.counters import Counters
from virtqueue.native.file_handler import FileBlock
from virtqueue.native.server import ServerBlock
from virtqueue.native.transfer import Operation, TransferFlags, TransferItem

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "gm_region": abi.GmRegion,
    "gm_iotlb_entry": abi.GmIotlbEntry,
    "gm_table": abi.GmTable,
    "gm_log": abi.GmLog,
    "vq_queue": layout.QueueBlock,
    "vq_provision": layout.Provision,
    "vq_counters": Counters,
    "vq_server": ServerBlock,
    "vq_file": FileBlock,
    "vq_io": TransferItem,
}
FORMATS = {
    "vq_record": (
        layout.RECORD,
        "header readable writable status readable_length writable_length head flags "
        "segment_count first_segment",
    ),
    "vq_segment": (layout.SEGMENT, "host guest length flags provision"),
    "vq_done": (layout.DONE, "head status flags written"),
}


class Entry(ctypes.Structure):
    _fields_ = [
        ("name", ctypes.c_char_p),
        ("offset", ctypes.c_uint32),
        ("size", ctypes.c_uint32),
    ]


@pytest.fixture(scope="module")
def compiled() -> dict[str, tuple[int, int]]:
    function = library().held.vq_layout
    function.restype = ctypes.POINTER(Entry)
    entries = function()
    found: dict[str, tuple[int, int]] = {}
    index = 0
    while entries[index].name:
        found[entries[index].name.decode()] = (entries[index].offset, entries[index].size)
        index += 1
    return found


def test_every_structure_of_the_header_has_its_mirror(compiled: dict[str, tuple[int, int]]) -> None:
    names = {name for name in compiled if "." not in name}
    assert names == set(STRUCTURES) | set(FORMATS)


@pytest.mark.parametrize("name", STRUCTURES)
def test_sizes_and_offsets_are_equal(compiled: dict[str, tuple[int, int]], name: str) -> None:
    mirror = STRUCTURES[name]
    expected = {name: (0, ctypes.sizeof(mirror))}
    for field in mirror._fields_:
        descriptor = getattr(mirror, field[0])
        expected[f"{name}.{field[0]}"] = (descriptor.offset, descriptor.size)
    assert {k: v for k, v in compiled.items() if k.split(".")[0] == name} == expected


@pytest.mark.parametrize("name", FORMATS)
def test_packed_formats_are_equal(compiled: dict[str, tuple[int, int]], name: str) -> None:
    packing, names = FORMATS[name]
    assert compiled[name][1] == packing.size
    for index, field in enumerate(names.split()):
        offset, size = compiled[f"{name}.{field}"]
        values = [b"" if f == "header" else 0 for f in names.split()]
        values[index] = b"\xff" * 16 if field == "header" else (1 << 8 * size) - 1
        raw = packing.pack(*values)
        assert [i for i, byte in enumerate(raw) if byte] == list(range(offset, offset + size))


@pytest.mark.parametrize(
    ("name", "fields"), [("vq_record", layout.RecordField), ("vq_done", layout.DoneField)]
)
def test_the_places_of_fields_are_those_of_the_format(name: str, fields: type) -> None:
    packing, names = FORMATS[name]
    places = {field: place for field, place in vars(fields).items() if field.isupper()}
    assert places == {field.upper(): place for place, field in enumerate(names.split())}
    assert len(packing.unpack(bytes(packing.size))) == len(places)
    assert layout.DONE.pack(0, 0, 0xFF, 0)[layout.DONE_FLAGS_OFFSET] == 0xFF


HEADER = Path(__file__).parents[2] / "packages" / "virtqueue" / "csrc" / "virtqueue.h"
PREFIXES: dict[str, tuple[type[IntEnum] | type[IntFlag], ...]] = {
    "VQ_REASON_": (layout.Reason,),
    "VQ_MORE_": (layout.More,),
    "VQ_DONE_": (layout.DoneFlags,),
    "VQ_SEGMENT_": (layout.SegmentFlags,),
    "VQ_IO_": (Operation, TransferFlags),
}


@pytest.mark.skipif(not HEADER.exists(), reason="the C sources are not beside the tests")
@pytest.mark.parametrize("prefix", PREFIXES)
def test_constants_are_equal(prefix: str) -> None:
    found = re.findall(rf"\b{prefix}(\w+)\s*=?\s*(\d+)u?\b", HEADER.read_text())
    assert {name: int(value) for name, value in found} == {
        each.name: each.value for enum in PREFIXES[prefix] for each in enum
    }


@pytest.mark.skipif(not HEADER.exists(), reason="the C sources are not beside the tests")
def test_features_results_and_record_flags_are_equal() -> None:
    text = HEADER.read_text()
    for enum in (layout.Features, layout.RecordFlags):
        for each in enum:
            assert re.search(rf"#define VQ_{each.name} {each.value}u\b", text), each
    names = {"ABI": "ABI_ERROR"}
    for result in layout.Result:
        name = names.get(result.name, result.name)
        assert re.search(rf"\bVQ_{name} = {result.value},", text), result
