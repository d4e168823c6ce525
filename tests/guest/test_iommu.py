"""A disk behind a virtual IOMMU: every address is asked for, and taken away again."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from tests.support.guest import (
    IOMMU,
    LOG,
    MIB,
    Assets,
    BackEnd,
    Guest,
    Migration,
    Qemu,
    VerifyingWriters,
    VhostUserDisk,
    random_bytes,
)

pytestmark = [pytest.mark.timeout(240), pytest.mark.needs(IOMMU)]


@pytest.mark.parametrize("ring", [128, 1024])
@pytest.mark.parametrize("packed", ["off", "on"], ids=["split", "packed"])
def test_disk_behind_intel_iommu(
    assets: Assets, qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path, packed: str, ring: int
) -> None:
    """With `iommu.strict=1` the guest unmaps each buffer when its request is done.

    The guest's kernel puts a ring of 1024 descriptors on pages all over its memory.
    """
    image = tmp_path / "disk.img"
    image.write_bytes(random_bytes(8 * MIB, seed=4))
    options = {"iommu_platform": "on", "ats": "on", "packed": packed, "disable-legacy": "on"}
    options["queue-size"] = str(ring)
    with (
        BackEnd(kind, image, tmp_path, num_queues=2) as back_end,
        Guest(
            assets,
            qemu,
            initramfs,
            tmp_path,
            disks=[VhostUserDisk(back_end.socket, 5, num_queues=2, options=options)],
            machine="q35",
            extra=["-device", "intel-iommu,device-iotlb=on"],
            parameters="intel_iommu=on iommu.strict=1",
        ) as guest,
    ):
        guest.boot()
        access_platform = 33
        assert guest.check("cat /sys/block/vda/device/features")[access_platform] == "1"
        assert guest.check("ls /sys/bus/pci/devices/0000:00:05.0/iommu_group/devices")
        writers = VerifyingWriters(guest, "/dev/vda", share=1 << 18)
        writers.await_progress()
        writers.await_progress()
        digests = writers.finish()
        content = image.read_bytes()
        assert digests == writers.expected(content)
        assert "IOTLB" not in back_end.tail()


@pytest.mark.needs(LOG)
def test_guest_with_an_iommu_moves(
    assets: Assets, qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path
) -> None:
    """What it logs are guest addresses, though it knows of IOVAs only; the target asks anew."""
    image = tmp_path / "disk.img"
    image.write_bytes(random_bytes(8 * MIB, seed=4))
    options = {"iommu_platform": "on", "ats": "on", "disable-legacy": "on", "queue-size": "1024"}
    with contextlib.ExitStack() as stack:

        def start(incoming: bool) -> Guest:
            back_end = stack.enter_context(BackEnd(kind, image, tmp_path, num_queues=2))
            disk = VhostUserDisk(back_end.socket, 5, num_queues=2, options=options)
            guest = Guest(
                assets,
                qemu,
                initramfs,
                tmp_path,
                disks=[disk],
                machine="q35",
                extra=["-device", "intel-iommu,device-iotlb=on"],
                parameters="intel_iommu=on iommu.strict=1",
                incoming=incoming,
            )
            return stack.enter_context(guest)

        source = start(incoming=False)
        source.boot()
        writers = VerifyingWriters(source, "/dev/vda", share=1 << 18)
        writers.await_progress()
        target = start(incoming=True)
        Migration(source, target).finish()
        source.close()
        writers.guest = target
        writers.await_progress()
        digests = writers.finish()
        assert digests == writers.expected(image.read_bytes())
