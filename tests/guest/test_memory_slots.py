"""Memory that comes and goes under a running guest, a memory slot for each piece."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.guest import (
    MEMORY_KIB,
    SLOTS,
    Assets,
    BackEnd,
    Guest,
    Qemu,
    VerifyingWriters,
    VhostUserDisk,
    random_bytes,
)

pytestmark = [pytest.mark.timeout(400), pytest.mark.needs(SLOTS)]

#: What a guest's kernel takes at once.
DIMM = 128 << 20


def test_memory_comes_and_goes_while_the_disk_is_used(
    assets: Assets, qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path, dimms: int
) -> None:
    """The guest prefers memory that can be taken away again for its buffers: the new one."""
    image = tmp_path / "disk.img"
    image.write_bytes(random_bytes(8 << 20, seed=6))
    with (
        BackEnd(kind, image, tmp_path, num_queues=2) as back_end,
        Guest(
            assets,
            qemu,
            initramfs,
            tmp_path,
            disks=[VhostUserDisk(back_end.socket, 5, num_queues=2)],
            parameters="memory_hotplug.memmap_on_memory=1 memhp_default_state=online_movable",
            hotplug_slots=dimms,
            most_memory_kib=MEMORY_KIB + (dimms + 1) * (1 << 20),
        ) as guest,
    ):
        guest.boot()
        writers = VerifyingWriters(guest, "/dev/vda", share=1 << 18)
        writers.await_progress()
        for number in range(dimms):
            guest.qmp.execute(
                "object-add",
                qom_type="memory-backend-memfd",
                id=f"m{number}",
                size=DIMM,
                share=True,
            )
            guest.qmp.execute("device_add", driver="pc-dimm", id=f"d{number}", memdev=f"m{number}")
        await_movable(guest, dimms)
        writers.await_progress()
        for number in reversed(range(dimms)):
            guest.qmp.execute("device_del", id=f"d{number}")
        await_movable(guest, 0)
        for number in range(dimms):
            guest.qmp.wait_event("DEVICE_DELETED", device=f"d{number}")
            guest.qmp.execute("object-del", id=f"m{number}")
        writers.await_progress()
        assert writers.finish() == writers.expected(image.read_bytes())


def await_movable(guest: Guest, dimms: int) -> None:
    """Wait until the guest has so many pieces of removable memory."""
    guest.check(
        f"until [ $(grep -l Movable /sys/devices/system/memory/memory*/valid_zones | wc -l)"
        f" -eq {dimms} ]; do sleep 0.2; done",
        limit=180,
    )
