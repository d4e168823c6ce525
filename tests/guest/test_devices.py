"""Devices that are no disks of ours, and several guests at once."""

from __future__ import annotations

import contextlib
import hashlib
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
from tests.support.guest import (
    DEVICES,
    MIB,
    MODULES,
    Assets,
    Guest,
    Qemu,
    Served,
    VerifyingWriters,
    VhostUserDevice,
    VhostUserDisk,
    build_initramfs,
    random_bytes,
)

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = [pytest.mark.timeout(240), pytest.mark.needs(DEVICES)]


@pytest.fixture(scope="module")
def initramfs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("initramfs-devices") / "initramfs.cpio"
    return build_initramfs(assets, target, modules=[*MODULES, "virtio-rng"])


@pytest.fixture
def serve(kind: str, tmp_path: Path) -> Iterator[Callable[..., Served]]:
    """Run one of the examples."""
    with contextlib.ExitStack() as stack:

        def serve(example: str, arguments: Sequence[str]) -> Served:
            return stack.enter_context(
                Served(
                    example,
                    [sys.executable, str(EXAMPLES / example), *arguments],
                    tmp_path,
                    environment={"VIRTQUEUE_ENGINE": kind},
                )
            )

        yield serve


def test_two_guests_at_two_sockets_of_one_process(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    serve: Callable[..., Served],
    tmp_path: Path,
) -> None:
    """Each writes to its own disk; one goes away and the other does not notice."""
    images = [tmp_path / f"{number}.img" for number in range(2)]
    for seed, image in enumerate(images):
        image.write_bytes(random_bytes(4 * MIB, seed))
    # The socket that is waited for is opened last.
    both = serve("two_disks.py", [str(images[1]), "SOCKET.2", str(images[0]), "SOCKET"])
    sockets = [both.socket, both.socket.with_suffix(".2")]
    with contextlib.ExitStack() as stack:
        guests = [
            stack.enter_context(
                Guest(assets, qemu, initramfs, tmp_path, disks=[VhostUserDisk(socket, 5)], cpus=1)
            )
            for socket in sockets
        ]
        for guest in guests:
            guest.boot()
        writers = [VerifyingWriters(guest, "/dev/vda", share=1 << 18) for guest in guests]
        for writer in writers:
            writer.await_progress()
        assert writers[0].finish() == writers[0].expected(images[0].read_bytes())
        guests[0].close()
        writers[1].await_progress()
        assert writers[1].finish() == writers[1].expected(images[1].read_bytes())
    assert both.stop() == 0


def test_coroutines_complete_out_of_order(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    serve: Callable[..., Served],
    tmp_path: Path,
) -> None:
    image = tmp_path / "disk.img"
    content = random_bytes(4 * MIB, seed=5)
    image.write_bytes(content)
    device = serve("unordered_disk.py", ["SOCKET", str(image)])
    disk = VhostUserDisk(device.socket, 5)
    with Guest(assets, qemu, initramfs, tmp_path, disks=[disk]) as guest:
        guest.boot()
        digest = guest.check("dd if=/dev/vda bs=64k status=none | sha256sum").split()[0]
        assert digest == hashlib.sha256(content).hexdigest()
        writers = VerifyingWriters(guest, "/dev/vda", share=1 << 16)
        writers.await_progress()
        assert writers.finish() == writers.expected(image.read_bytes())
    assert device.stop() == 0
    overtaken, begun = re.findall(r"(\d+) of (\d+) were overtaken", device.tail())[-1]
    assert int(overtaken) > int(begun) // 10


def test_a_disk_that_is_no_file(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    serve: Callable[..., Served],
    tmp_path: Path,
) -> None:
    """A guest finds what it wrote, also after a reboot, and the image below is as it was."""
    image = tmp_path / "disk.img"
    content = random_bytes(4 * MIB, seed=6)
    image.write_bytes(content)
    device = serve("overlay_disk.py", ["SOCKET", str(image)])
    with Guest(assets, qemu, initramfs, tmp_path, disks=[VhostUserDisk(device.socket, 5)]) as guest:
        guest.boot()
        read = "dd if=/dev/vda bs=64k status=none | sha256sum"
        assert guest.check(read).split()[0] == hashlib.sha256(content).hexdigest()
        guest.check("dd if=/dev/zero of=/dev/vda bs=64k seek=8 count=16 conv=fsync status=none")
        guest.reboot()
        expected = content[: MIB // 2] + bytes(MIB) + content[MIB // 2 + MIB :]
        assert guest.check(read).split()[0] == hashlib.sha256(expected).hexdigest()
    assert device.stop() == 0
    assert image.read_bytes() == content


def test_another_type_of_device(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    serve: Callable[..., Served],
    tmp_path: Path,
) -> None:
    """A device of a few lines under QEMU's vhost-user-rng front-end, and the kernel's driver."""
    device = serve("text_source.py", ["SOCKET"])
    attached = VhostUserDevice(device.socket, 6, driver="vhost-user-rng-pci")
    with Guest(assets, qemu, initramfs, tmp_path, disks=[attached]) as guest:
        guest.boot()
        assert "virtio_rng" in guest.check("cat /sys/class/misc/hw_random/rng_current")
        said = guest.check("head -c 200 /dev/hwrng")
        assert said.count("The quick brown fox.") >= 5
    assert device.running


def test_the_references_example_under_a_real_guest(
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    serve: Callable[..., Served],
    tmp_path: Path,
) -> None:
    """The README example of rust-vmm's crate, line by line: a guest's entropy, also after a reboot
    and for the next guest."""
    device = serve("reference_readme.py", ["SOCKET"])
    attached = VhostUserDevice(device.socket, 6, driver="vhost-user-rng-pci")
    for _ in range(2):
        with Guest(assets, qemu, initramfs, tmp_path, disks=[attached]) as guest:
            guest.boot()
            assert "virtio_rng" in guest.check("cat /sys/class/misc/hw_random/rng_current")
            read = "head -c 100000 /dev/hwrng | sha256sum"
            first = guest.check(read)
            assert first != guest.check(read)
            guest.reboot()
            assert "virtio_rng" in guest.check("cat /sys/class/misc/hw_random/rng_current")
            assert first != guest.check(read)
    assert device.running
    assert device.stop() == 0
