"""A device whose own state moves with its guest, through QEMU's vhost-user-fs front-end."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.guest import (
    DEVICES,
    MODULES,
    SLOW,
    Assets,
    Guest,
    Migration,
    MigrationError,
    Missing,
    Qemu,
    Served,
    VhostUserDevice,
    build_initramfs,
    provide_qemu,
    skip_or_fail,
)
from tests.support.guest.devices import stub_fs

pytestmark = [pytest.mark.timeout(240), pytest.mark.needs(DEVICES)]

#: The first QEMU that moves the state of a vhost-user-fs device; before, it refuses to migrate.
FIRST = (8, 2)


@pytest.fixture(scope="module")
def moving_qemu(qemu: Qemu) -> Qemu:
    """The chosen QEMU, or one that can do this."""
    if qemu.version >= FIRST:
        return qemu
    try:
        return provide_qemu("10.0")
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture(scope="module")
def initramfs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("initramfs-fs") / "initramfs.cpio"
    return build_initramfs(assets, target, modules=[*MODULES, "virtiofs"])


@pytest.fixture
def start(
    assets: Assets, moving_qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path
) -> Iterator[Callable[..., tuple[Served, Guest]]]:
    """Start a device and a guest that has it."""
    with contextlib.ExitStack() as stack:

        def start(*arguments: str, incoming: bool = False) -> tuple[Served, Guest]:
            command = [sys.executable, str(stub_fs.__file__), "SOCKET", *arguments]
            environment = {"VIRTQUEUE_ENGINE": kind}
            device = stack.enter_context(
                Served("stub-fs", command, tmp_path, environment=environment)
            )
            attached = VhostUserDevice(
                device.socket, 6, driver="vhost-user-fs-pci", options={"tag": "stub"}
            )
            guest = Guest(
                assets, moving_qemu, initramfs, tmp_path, disks=[attached], incoming=incoming
            )
            return device, stack.enter_context(guest)

        yield start


def count(guest: Guest) -> int:
    """How many requests the guest's device remembers, this one included."""
    return int(guest.check("stat -f -c %c /mnt"))


def test_state_moves_with_the_guest(start: Callable[..., tuple[Served, Guest]]) -> None:
    source_device, source = start()
    target_device, target = start(incoming=True)
    source.boot()
    source.check("mount -t virtiofs stub /mnt")
    for _ in range(5):
        before = count(source)
    assert before >= 6
    source.migrate(target)
    assert f"saved {before}" in source_device.tail()
    assert f"loaded {before}" in target_device.tail()
    assert count(target) == before + 1


def test_source_goes_on_when_the_target_refuses_the_state(
    start: Callable[..., tuple[Served, Guest]],
) -> None:
    device, source = start()
    refusing, target = start("--refuse", incoming=True)
    source.boot()
    source.check("mount -t virtiofs stub /mnt")
    before = count(source)
    migration = Migration(source, target, capabilities=["return-path"], bandwidth=SLOW)
    with pytest.raises(MigrationError):
        migration.finish()
    assert "this one takes nobody in" in refusing.tail()
    assert refusing.running
    assert device.running
    assert count(source) == before + 1
