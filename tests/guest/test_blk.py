"""A disk served to a real guest: what it says, what it stores, what survives."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.guest import (
    MIB,
    PACKED,
    STORAGE_DAEMON,
    Assets,
    BackEnd,
    Bed,
    CommandFailed,
    Disk,
    Qemu,
    able,
    random_bytes,
)

pytestmark = pytest.mark.timeout(300)

SERIAL = "a-serial-number-20ch"
RINGS = ["main", "plain", pytest.param("packed", marks=pytest.mark.needs(PACKED))]
READ_ONLY_CONTENT = random_bytes(2 * MIB, seed=1)


@pytest.fixture(scope="module")
def bed(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    kind: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Bed]:
    disks = [
        # An odd number of sectors, so that nothing is right by roundness.
        Disk("main", 64 * MIB + 512, num_queues=2, serial=SERIAL),
        Disk("fixed", 2 * MIB, read_only=True, content=READ_ONLY_CONTENT),
        Disk("plain", 32 * MIB, options={"event_idx": "off", "indirect_desc": "off"}),
    ]
    if able(kind, PACKED):
        disks.append(Disk("packed", 32 * MIB, num_queues=2, options={"packed": "on"}))
    with Bed(assets, qemu, initramfs, tmp_path_factory.mktemp("bed"), kind, disks) as bed:
        yield bed


@pytest.fixture(autouse=True)
def content_kernel(bed: Bed) -> Iterator[None]:
    """No test may leave the guest's kernel complaining, nor a back-end dead."""
    yield
    dead = [disk.name for disk in bed.disks.values() if not disk.back_end.running]
    assert not dead, bed.describe()
    assert bed.complaints() == []


def write_pattern(bed: Bed, node: str, offset: int, length: int) -> str:
    """Fill a byte range with random bytes from inside, durably; returns their digest."""
    return bed.guest.check(
        f"head -c {length} /dev/urandom >/tmp/pattern && "
        f"dd if=/tmp/pattern of={node} bs=64k seek={offset} oflag=seek_bytes"
        " conv=notrunc,fsync status=none && "
        "sha256sum </tmp/pattern && rm /tmp/pattern"
    ).split()[0]


def read_digest(bed: Bed, node: str, offset: int, length: int) -> str:
    """The digest of a byte range as the guest reads it from the device, not from its cache."""
    return bed.guest.check(
        f"sync; blockdev --flushbufs {node}; echo 3 >/proc/sys/vm/drop_caches; "
        f"dd if={node} bs=64k skip={offset} count={length} iflag=skip_bytes,count_bytes"
        " status=none | sha256sum"
    ).split()[0]


def test_capacity(bed: Bed) -> None:
    for disk in bed.disks.values():
        sectors = int(bed.guest.check(f"cat {disk.block}/size"))
        assert sectors * 512 == disk.size, disk.name


def test_ring_features_are_what_qemu_was_asked_for(bed: Bed) -> None:
    indirect, event_idx, packed = 28, 29, 34
    expected = {
        "main": {indirect, event_idx},
        "fixed": {indirect, event_idx},
        "plain": set(),
        "packed": {indirect, event_idx, packed},
    }
    for disk in bed.disks.values():
        bits = bed.guest.check(f"cat {disk.block}/device/features")
        accepted = {bit for bit in (indirect, event_idx, packed) if bits[bit] == "1"}
        assert accepted == expected[disk.name], disk.name


def test_serial(bed: Bed) -> None:
    expected = SERIAL if bed.kind != STORAGE_DAEMON else bed["main"].back_end.serial
    assert bed.guest.check(f"cat {bed['main'].block}/serial") == expected


@pytest.mark.parametrize("name", RINGS)
def test_pattern_reads_back_and_is_in_the_image(bed: Bed, name: str) -> None:
    disk = bed[name]
    offset, length = 3 * MIB + 512, 8 * MIB
    before = disk.host_sha256(0, offset), disk.host_sha256(offset + length)
    written = write_pattern(bed, disk.node, offset, length)
    assert read_digest(bed, disk.node, offset, length) == written
    assert disk.host_sha256(offset, length) == written
    assert (disk.host_sha256(0, offset), disk.host_sha256(offset + length)) == before


def test_guest_reads_what_the_host_has_written(bed: Bed) -> None:
    assert (
        read_digest(bed, bed["fixed"].node, 0, len(READ_ONLY_CONTENT))
        == hashlib.sha256(READ_ONLY_CONTENT).hexdigest()
    )


def test_last_sector_and_the_end(bed: Bed) -> None:
    disk = bed["main"]
    last = disk.size - 512
    written = bed.guest.check(
        f"head -c 512 /dev/urandom >/tmp/s; dd if=/tmp/s of={disk.node} bs=512 seek={last}"
        " oflag=seek_bytes,direct conv=notrunc status=none && sha256sum </tmp/s"
    ).split()[0]
    assert disk.host_sha256(last, 512) == written
    with pytest.raises(CommandFailed, match="No space left"):
        bed.guest.check(
            f"dd if=/tmp/s of={disk.node} bs=512 seek={disk.size} oflag=seek_bytes conv=notrunc"
        )
    assert disk.image.stat().st_size == disk.size


def test_read_only_is_refused(bed: Bed) -> None:
    disk = bed["fixed"]
    assert bed.guest.check(f"cat {disk.block}/ro") == "1"
    assert bed.guest.check(f"cat {bed['main'].block}/ro") == "0"
    status, output = bed.guest.run(f"dd if=/dev/zero of={disk.node} bs=512 count=1 conv=notrunc")
    assert status != 0
    assert "not permitted" in output or "Read-only" in output
    assert disk.host_bytes() == READ_ONLY_CONTENT


def test_two_queues_carry_requests(bed: Bed) -> None:
    disk = bed["main"]
    assert bed.guest.check(f"ls {disk.block}/mq").split() == ["0", "1"]

    def interrupts() -> list[int]:
        table = bed.guest.check(
            f"device=$(basename $(readlink -f {disk.block}/device)); "
            "grep $device-req /proc/interrupts"
        )
        counts = {}
        for line in table.splitlines():
            words = line.split()
            counts[words[-1]] = sum(map(int, words[1:3]))
        return [counts[name] for name in sorted(counts)]

    before = interrupts()
    for cpu in (0, 1):
        bed.guest.check(
            f"taskset {1 << cpu} dd if={disk.node} of=/dev/null bs=4k count=64 iflag=direct"
            " status=none"
        )
    after = interrupts()
    assert len(after) == 2
    assert all(b > a for a, b in zip(before, after, strict=True)), (before, after)


def test_flush_reaches_the_back_end(bed: Bed) -> None:
    disk = bed["main"]
    if bed.kind == STORAGE_DAEMON:
        # It says "write through" until the guest asks for better.
        bed.guest.check(f"echo write back >{disk.block}/cache_type")
    assert bed.guest.check(f"cat {disk.block}/queue/write_cache") == "write back"
    before = int(bed.guest.check(f"cat {disk.block}/stat").split()[15])
    bed.guest.check(f"dd if=/dev/zero of={disk.node} bs=4k count=1 conv=notrunc,fsync status=none")
    assert int(bed.guest.check(f"cat {disk.block}/stat").split()[15]) > before


def test_discard_frees_the_range(bed: Bed) -> None:
    disk = bed["main"]
    offset, length = 32 * MIB, 4 * MIB
    write_pattern(bed, disk.node, offset, length)
    assert int(bed.guest.check(f"cat {disk.block}/queue/discard_max_bytes")) > 0
    around = disk.host_sha256(0, offset + MIB), disk.host_sha256(offset + 3 * MIB)
    blocks = disk.image.stat().st_blocks
    bed.guest.check(f"blkdiscard -o {offset + MIB} -l {2 * MIB} {disk.node}")
    assert disk.image.stat().st_blocks <= blocks - 2 * MIB // 512 + 16
    assert disk.host_bytes(offset + MIB, 2 * MIB) == bytes(2 * MIB)
    assert (disk.host_sha256(0, offset + MIB), disk.host_sha256(offset + 3 * MIB)) == around


def test_write_zeroes_clears_the_range(bed: Bed) -> None:
    disk = bed["main"]
    offset, length = 36 * MIB, 4 * MIB
    write_pattern(bed, disk.node, offset, length)
    assert int(bed.guest.check(f"cat {disk.block}/queue/write_zeroes_max_bytes")) > 0
    around = disk.host_sha256(0, offset + MIB), disk.host_sha256(offset + 3 * MIB)
    bed.guest.check(f"/usr/sbin/blkdiscard -z -o {offset + MIB} -l {2 * MIB} {disk.node}")
    zeroes = hashlib.sha256(bytes(2 * MIB)).hexdigest()
    assert read_digest(bed, disk.node, offset + MIB, 2 * MIB) == zeroes
    assert disk.host_sha256(offset + MIB, 2 * MIB) == zeroes
    assert (disk.host_sha256(0, offset + MIB), disk.host_sha256(offset + 3 * MIB)) == around


@pytest.mark.parametrize("name", RINGS)
def test_parallel_writers_verify_their_own(bed: Bed, name: str) -> None:
    """Eight processes, each with a region and a request size of its own, past the page cache."""
    disk = bed[name]
    start, share = 16 * MIB, MIB
    sizes = [512, 1024, 4096, 4096, 16384, 65536, 262144, MIB]
    # Small requests cost the emulated processor most, so their writers do less.
    writers = [(n, size, min(share, size * 256)) for n, size in enumerate(sizes)]
    script = "".join(
        f"( head -c {length} /dev/urandom >/tmp/w{n}; for pass in 1 2 3; do"
        f" dd if=/tmp/w{n} of={disk.node} bs={size} seek={start + n * share}"
        " oflag=seek_bytes,direct conv=notrunc status=none &&"
        f" dd if={disk.node} bs={size} skip={start + n * share} count={length // size * size}"
        f" iflag=skip_bytes,count_bytes,direct status=none | cmp - /tmp/w{n} || exit 1;"
        f' done; sha256sum </tmp/w{n} >/tmp/w{n}.sum ) & pids="$pids $!"; '
        for n, size, length in writers
    )
    output = bed.guest.check(
        f"pids=; {script} for pid in $pids; do wait $pid || exit 1; done; "
        "cat /tmp/w?.sum; rm /tmp/w?*",
        limit=120,
    )
    sums = [line.split()[0] for line in output.splitlines()]
    assert sums == [disk.host_sha256(start + n * share, length) for n, _, length in writers]


def test_file_system_survives_a_remount(bed: Bed) -> None:
    """Many small requests of all kinds, merged and reordered by the kernel as it likes."""
    disk = bed["plain"]
    output = bed.guest.check(
        f"mke2fs {disk.node} >/dev/null && mount -t ext4 {disk.node} /mnt && "
        "cp -r /lib /bin /mnt && "
        "(cd /mnt && find . -type f -exec sha256sum {} + | sort | sha256sum); umount /mnt; "
        "echo 3 >/proc/sys/vm/drop_caches; "
        f"mount -t ext4 {disk.node} /mnt && "
        "(cd /mnt && find . -type f -exec sha256sum {} + | sort | sha256sum); umount /mnt",
        limit=120,
    )
    first, second = output.splitlines()
    assert first == second


def test_hotplug_and_unplug(bed: Bed, tmp_path: Path) -> None:
    image = tmp_path / "late.img"
    image.write_bytes(random_bytes(MIB, seed=2))
    guest = bed.guest
    with BackEnd(bed.kind, image, tmp_path) as back_end:
        address = {"type": "unix", "data": {"path": str(back_end.socket)}}
        guest.qmp.execute(
            "chardev-add",
            id="late",
            backend={"type": "socket", "data": {"addr": address, "server": False}},
        )
        guest.qmp.execute(
            "device_add",
            driver="vhost-user-blk-pci",
            id="late-disk",
            chardev="late",
            addr="0x10",
            num_queues=1,
        )
        node = guest.check(
            "cd /sys/bus/pci/devices; "
            "until ls 0000:00:10.0/virtio*/block 2>/dev/null; do usleep 50000; done",
            limit=20,
        )
        assert (
            read_digest(bed, f"/dev/{node}", 0, MIB)
            == hashlib.sha256(image.read_bytes()).hexdigest()
        )
        guest.qmp.execute("device_del", id="late-disk")
        guest.qmp.wait_event("DEVICE_DELETED", device="late-disk")
        guest.qmp.execute("chardev-remove", id="late")
        assert back_end.running


def test_reboot_against_the_same_back_end(bed: Bed) -> None:
    disk = bed["main"]
    offset, length = 40 * MIB, 2 * MIB
    written = write_pattern(bed, disk.node, offset, length)
    process = disk.back_end.process.pid
    bed.reboot()
    assert read_digest(bed, disk.node, offset, length) == written
    again = write_pattern(bed, disk.node, offset, length)
    assert disk.host_sha256(offset, length) == again
    assert (disk.back_end.running, disk.back_end.process.pid) == (True, process)


def test_second_qemu_after_the_first_has_quit(bed: Bed) -> None:
    disk = bed["main"]
    offset, length = 44 * MIB, 2 * MIB
    written = write_pattern(bed, disk.node, offset, length)
    assert bed.guest.power_off() == 0
    bed.replace_guest()
    assert read_digest(bed, disk.node, offset, length) == written
    again = write_pattern(bed, disk.node, offset, length)
    assert disk.host_sha256(offset, length) == again


def test_back_end_ends_on_request(
    assets: Assets, qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path
) -> None:
    """SIGTERM ends a back-end at once, while a guest that has its disk still runs."""
    with Bed(assets, qemu, initramfs, tmp_path, kind, [Disk("only", MIB)]) as bed:
        disk = bed["only"]
        bed.guest.check(f"dd if={disk.node} of=/dev/null bs=64k status=none")
        assert disk.back_end.stop() == 0, bed.describe()
        assert not disk.back_end.socket.exists()
