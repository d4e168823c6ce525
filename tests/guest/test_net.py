"""QEMU's virtio-net, which its vhost-user devices share nothing with, on a device that echoes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.guest import (
    DEVICES,
    MODULES,
    Assets,
    Guest,
    Missing,
    Qemu,
    Served,
    VhostUserNet,
    build_initramfs,
    provide_qemu,
    skip_or_fail,
)
from tests.support.guest.devices import echo_net

pytestmark = [pytest.mark.timeout(240), pytest.mark.needs(DEVICES)]

NEWEST = "11.1"
SLOT = 6
#: Ethernet, IPv4 and ICMP headers around what a ping carries.
HEADERS = 14 + 20 + 8


@pytest.fixture(scope="module", params=["chosen", "newest"])
def net_qemu(request: pytest.FixtureRequest, qemu: Qemu) -> Qemu:
    """The chosen QEMU, and the newest that there is."""
    if request.param == "chosen":
        return qemu
    try:
        return provide_qemu(NEWEST)
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture(scope="module")
def initramfs(assets: Assets, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("initramfs-net") / "initramfs.cpio"
    return build_initramfs(assets, target, modules=[*MODULES, "virtio_net"])


@pytest.fixture
def device(kind: str, tmp_path: Path) -> Iterator[Served]:
    command = [sys.executable, str(echo_net.__file__), "SOCKET"]
    environment = {"VIRTQUEUE_ENGINE": kind}
    with Served("echo-net", command, tmp_path, environment=environment) as served:
        yield served


def ping(guest: Guest, count: int, size: int) -> None:
    """Every ping comes back with what it carried, however late."""
    said = guest.check(f"ping -A -c {count} -s {size} -W 30 10.0.0.2", limit=90)
    assert f"{count} packets transmitted, {count} packets received, 0% packet loss" in said


@pytest.mark.parametrize("packed", ["off", "on"], ids=["split", "packed"])
def test_a_guest_pings(
    assets: Assets,
    net_qemu: Qemu,
    initramfs: Path,
    device: Served,
    packed: str,
    tmp_path: Path,
) -> None:
    """Also after the driver has let go of the device and taken it again."""
    net = VhostUserNet(device.socket, SLOT, options={"packed": packed})
    with Guest(assets, net_qemu, initramfs, tmp_path, disks=[net]) as guest:
        guest.boot()
        up = "ip address add 10.0.0.1/24 dev eth0 && ip link set eth0 up"
        guest.check(up)
        folder = f"/sys/bus/pci/devices/0000:00:{SLOT:02x}.0/virtio*"
        assert guest.check(f"cat {folder}/features")[34] == ("1" if packed == "on" else "0")
        for size in (56, 1472):
            ping(guest, 100, size)
        guest.check(
            f"virtio=$(basename $(echo {folder})); cd /sys/bus/virtio/drivers/virtio_net;"
            " echo $virtio >unbind && echo $virtio >bind"
        )
        guest.check(up)
        ping(guest, 100, 1472)
        statistics = "/sys/class/net/eth0/statistics"
        names = ("rx_packets", "tx_packets", "rx_errors", "rx_dropped", "tx_errors", "tx_dropped")
        said = guest.check(f"cd {statistics} && cat {' '.join(names)}").split()
    assert device.running
    assert device.stop() == 0
    *complaints, last = device.tail().splitlines()
    assert complaints == []
    counts = json.loads(last)
    assert counts["too_long"] == 0
    assert counts["echoed"] == counts["received"] >= 300
    assert counts["echoed_bytes"] >= 200 * (1472 + HEADERS) + 100 * (56 + HEADERS)
    # What the driver has counted since it took the device again.
    received, sent, *lost = map(int, said)
    assert received >= 100
    assert sent >= 100
    assert lost == [0, 0, 0, 0]
