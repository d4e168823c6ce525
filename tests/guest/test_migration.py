"""A guest that moves to another QEMU."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.support.guest import MIB, Assets, Guest, Qemu

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
        source.start("n=0; while :; do n=$((n+1)); echo $n >/tmp/n; done")
        source.migrate(target)
        assert target.check("sha256sum /tmp/p") == digest
        first = int(target.check("cat /tmp/n; sleep 0.2").split()[0])
        assert int(target.check("cat /tmp/n")) > first
