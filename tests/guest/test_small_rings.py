"""Rings that are shorter than the guest's requests: Linux's indirect tables do not follow them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.guest import MIB, PACKED, Assets, Bed, Disk, Qemu, able, random_bytes

pytestmark = pytest.mark.timeout(300)

SIZE = 16 * MIB
CONTENT = random_bytes(SIZE, seed=16)
SIZES = ("16", "64")
NAMES = [
    *(f"split-{size}" for size in SIZES),
    *(pytest.param(f"packed-{size}", marks=pytest.mark.needs(PACKED)) for size in SIZES),
]


@pytest.fixture(scope="module")
def bed(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bed]:
    rings = [("split", "off"), ("packed", "on")] if able(kind, PACKED) else [("split", "off")]
    disks = []
    for ring, packed in rings:
        for size in SIZES:
            options = {"queue-size": size, "packed": packed}
            disks.append(Disk(f"{ring}-{size}", SIZE, content=CONTENT, options=options))
    with Bed(assets, qemu, initramfs, tmp_path_factory.mktemp("bed"), kind, disks) as bed:
        yield bed


@pytest.fixture(autouse=True)
def content_kernel(bed: Bed) -> Iterator[None]:
    yield
    assert bed.complaints() == []


@pytest.mark.parametrize("name", NAMES)
def test_a_mebibyte_at_a_time(bed: Bed, name: str) -> None:
    """Past the page cache, so that every request is as long as the driver makes them."""
    disk = bed[name]
    read = bed.guest.check(f"dd if={disk.node} bs=1M iflag=direct status=none | sha256sum")
    assert read.split()[0] == disk.host_sha256()
    written = bed.guest.check(
        f"head -c {4 * MIB} /dev/urandom >/tmp/pattern && "
        f"dd if=/tmp/pattern of={disk.node} bs=1M seek=5 oflag=direct conv=notrunc status=none && "
        "sha256sum </tmp/pattern && rm /tmp/pattern"
    )
    assert disk.host_sha256(5 * MIB, 4 * MIB) == written.split()[0]


@pytest.mark.parametrize("name", NAMES)
def test_one_request_from_pages_that_lie_apart(bed: Bed, name: str) -> None:
    """Neighbours on the disk that are none in memory: each page takes a descriptor of its own."""
    disk = bed[name]
    pages = 256
    # An open file keeps the page cache, which is filled with every other page first.
    written = bed.guest.check(
        f"head -c {pages * 4096} /dev/urandom >/tmp/pattern && exec 3<>{disk.node} && "
        f"for first in 0 1; do for page in $(seq $first 2 {pages - 1}); do"
        f" dd if=/tmp/pattern of={disk.node} bs=4k seek=$page skip=$page count=1 conv=notrunc"
        " status=none || exit 1; done; done && sync && sha256sum </tmp/pattern && rm /tmp/pattern"
    )
    assert disk.host_sha256(0, pages * 4096) == written.split()[0]
