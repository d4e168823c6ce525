"""A guest that moves to another QEMU."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from tests.support.guest import (
    LOG,
    MIB,
    Assets,
    BackEnd,
    Guest,
    Qemu,
    VerifyingWriters,
    VhostUserDisk,
)

pytestmark = pytest.mark.timeout(300)


def test_control_without_vhost_user(
    assets: Assets, qemu: Qemu, initramfs: Path, tmp_path: Path
) -> None:
    """QEMU itself must be able to move this guest, before a back-end can be to blame."""
    with (
        Guest(assets, qemu, initramfs, tmp_path) as source,
        Guest(assets, qemu, initramfs, tmp_path, incoming=True) as target,
    ):
        source.boot()
        digest = source.check(f"head -c {8 * MIB} /dev/urandom >/tmp/p; sha256sum /tmp/p")
        source.start("n=0; while :; do n=$((n+1)); echo $n >/tmp/m; mv /tmp/m /tmp/n; done")
        source.migrate(target)
        assert target.check("sha256sum /tmp/p") == digest
        first = int(target.check("cat /tmp/n; sleep 0.2").split()[0])
        assert int(target.check("cat /tmp/n")) > first


@pytest.mark.needs(LOG)
def test_paused_guest_knows_where_its_ring_stands(
    assets: Assets, qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path
) -> None:
    """What QEMU learns from GET_VRING_BASE is what it sends to the target.

    QEMU 7.2 says SET_STATUS 0 before it asks, which must not make the back-end forget.
    """
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(MIB))
    with (
        BackEnd(kind, image, tmp_path) as back_end,
        Guest(
            assets, qemu, initramfs, tmp_path, disks=[VhostUserDisk(back_end.socket, 5)]
        ) as guest,
    ):
        guest.boot()
        guest.check("dd if=/dev/vda of=/dev/null bs=4k count=20 iflag=direct status=none")
        guest.qmp.execute("stop")
        path = "/machine/peripheral/disk5/virtio-backend"
        ring = guest.qmp.execute("x-query-virtio-queue-status", path=path, queue=0)
        assert ring["last-avail-idx"] == ring["used-idx"] >= 20
        guest.qmp.execute("cont")
        guest.check("dd if=/dev/vda of=/dev/null bs=4k count=20 iflag=direct status=none")


@pytest.mark.needs(LOG)
def test_precopy_under_a_verifying_load(
    assets: Assets, qemu: Qemu, initramfs: Path, kind: str, tmp_path: Path
) -> None:
    """Two back-ends serve one image, first the source's and then the target's guest.

    What a back-end writes into guest memory and does not log is old at the target: the writers
    find it, and so does the digest of a file in the page cache.
    """
    image = tmp_path / "shared.img"
    image.write_bytes(bytes(16 * MIB))
    with (
        BackEnd(kind, image, tmp_path, num_queues=2) as first,
        BackEnd(kind, image, tmp_path, num_queues=2) as second,
        Guest(
            assets, qemu, initramfs, tmp_path, disks=[VhostUserDisk(first.socket, 5, num_queues=2)]
        ) as source,
        Guest(
            assets,
            qemu,
            initramfs,
            tmp_path,
            disks=[VhostUserDisk(second.socket, 5, num_queues=2)],
            incoming=True,
        ) as target,
    ):
        source.boot()
        digest = source.check(f"head -c {8 * MIB} /dev/urandom >/tmp/p; sha256sum /tmp/p")
        writers = VerifyingWriters(source, "/dev/vda")
        writers.await_progress()
        source.migrate(target)
        writers.guest = target
        writers.await_progress()
        assert target.check("sha256sum /tmp/p") == digest
        digests = writers.finish()
        content, share = image.read_bytes(), writers.share
        regions = [content[n * share : (n + 1) * share] for n in range(writers.count)]
        assert digests == [hashlib.sha256(region).hexdigest() for region in regions]
