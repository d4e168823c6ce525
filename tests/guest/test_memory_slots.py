"""Memory that comes and goes under a running guest, a memory slot for each piece."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from tests.support.guest import (
    MEMORY_KIB,
    MODULES,
    SLOTS,
    Assets,
    BackEnd,
    Guest,
    Qemu,
    VerifyingWriters,
    VhostUserDisk,
    build_initramfs,
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


#: The first QEMU whose virtio-mem uses many slots, each only while there is memory in it.
FIRST_WITH_SLOTS = (8, 2)


def test_virtio_mem_grows_and_shrinks_while_the_disk_is_used(
    assets: Assets, qemu: Qemu, kind: str, tmp_path: Path
) -> None:
    initramfs = build_initramfs(assets, tmp_path / "initramfs", modules=[*MODULES, "virtio-mem"])
    image = tmp_path / "disk.img"
    image.write_bytes(random_bytes(8 << 20, seed=6))
    device = "virtio-mem-pci,id=vm,memdev=vm,requested-size=0,addr=7"
    if qemu.version >= FIRST_WITH_SLOTS:
        device += ",dynamic-memslots=on"
    with (
        BackEnd(kind, image, tmp_path, num_queues=2) as back_end,
        Guest(
            assets,
            qemu,
            initramfs,
            tmp_path,
            disks=[VhostUserDisk(back_end.socket, 5, num_queues=2)],
            parameters="memhp_default_state=online_movable",
            extra=[
                *("-object", f"memory-backend-memfd,id=vm,size={2 * DIMM},share=on"),
                *("-device", device),
            ],
            hotplug_slots=1,
            most_memory_kib=MEMORY_KIB + (1 << 20),
        ) as guest,
    ):
        guest.boot()
        writers = VerifyingWriters(guest, "/dev/vda", share=1 << 18)
        writers.await_progress()
        before = guest.check("awk '/MemTotal/ {print $2}' /proc/meminfo")
        for size in (2 * DIMM, DIMM, 0):
            resize(guest, size)
            writers.await_progress()
        assert guest.check("awk '/MemTotal/ {print $2}' /proc/meminfo") == before
        assert writers.finish() == writers.expected(image.read_bytes())


def resize(guest: Guest, size: int) -> None:
    """Have virtio-mem plug or unplug memory, and wait until the guest has."""
    path = "/machine/peripheral/vm"
    guest.qmp.execute("qom-set", path=path, property="requested-size", value=size)
    deadline = time.monotonic() + 120
    while guest.qmp.execute("qom-get", path=path, property="size") != size:
        assert time.monotonic() < deadline, guest.describe()
        time.sleep(0.1)


def await_movable(guest: Guest, dimms: int) -> None:
    """Wait until the guest has so many pieces of removable memory."""
    guest.check(
        f"until [ $(grep -l Movable /sys/devices/system/memory/memory*/valid_zones | wc -l)"
        f" -eq {dimms} ]; do sleep 0.2; done",
        limit=180,
    )
