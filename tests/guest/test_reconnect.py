"""A back-end that dies while a guest uses it, and QEMU that takes it back when it returns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.guest import (
    INFLIGHT,
    MIB,
    PACKED,
    Assets,
    Bed,
    Disk,
    Qemu,
    VerifyingWriters,
)


@pytest.fixture
def bed(
    request: pytest.FixtureRequest,
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    kind: str,
    tmp_path: Path,
) -> Iterator[Bed]:
    options = getattr(request, "param", {})
    disks = [Disk("main", 16 * MIB, num_queues=2, reconnect=1, options=options)]
    with Bed(assets, qemu, initramfs, tmp_path, kind, disks) as bed:
        yield bed
        assert bed.complaints() == []


@pytest.mark.timeout(300)
def test_idle_back_end_is_killed_and_restarted(bed: Bed) -> None:
    disk = bed["main"]
    for turn in range(2):
        disk.back_end.kill()
        disk.back_end.start()
        bed.guest.check(
            f"head -c {MIB} /dev/urandom >/tmp/p{turn} && "
            f"dd if=/tmp/p{turn} of={disk.node} bs=64k seek={turn * MIB}"
            " oflag=seek_bytes,direct conv=notrunc status=none"
        )
    digests = bed.guest.check(
        f"cat /tmp/p0 /tmp/p1 | sha256sum; dd if={disk.node} bs=64k count=32 iflag=direct"
        " status=none | sha256sum"
    ).split()[::2]
    assert digests == [disk.host_sha256(0, 2 * MIB)] * 2


@pytest.mark.needs(INFLIGHT)
@pytest.mark.parametrize(
    "bed",
    [
        pytest.param({"packed": "off"}, id="split"),
        pytest.param({"packed": "on"}, id="packed", marks=pytest.mark.needs(PACKED)),
    ],
    indirect=True,
)
def test_back_end_is_killed_mid_io(bed: Bed, kills: int) -> None:
    """Nothing written is lost, nothing is completed twice, however often the back-end dies."""
    disk = bed["main"]
    packed = bed.guest.check(f"cat {disk.block}/device/features")[34] == "1"
    assert packed == (disk.options["packed"] == "on")
    writers = VerifyingWriters(bed.guest, disk.node)
    writers.await_progress()
    chance = random.Random(8)
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 0.5))
        disk.back_end.kill()
        before = writers.passes()
        disk.back_end.start()
        writers.await_progress(before)
    digests = writers.finish()
    share = writers.share
    assert digests == [disk.host_sha256(n * share, share) for n in range(writers.count)]
