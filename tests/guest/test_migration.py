"""A guest that moves to another QEMU."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tests.support.guest import (
    DEVICES,
    LOG,
    MIB,
    PACKED,
    POSTCOPY,
    SLOW,
    Assets,
    BackEnd,
    Guest,
    Migration,
    Missing,
    Qemu,
    Served,
    VerifyingWriters,
    VhostUserDisk,
    may_use_userfaultfd,
    random_bytes,
    skip_or_fail,
)

pytestmark = pytest.mark.timeout(300)

#: The first QEMU whose vhost-user-blk has the property `inflight-migration`.
FIRST_WITH_INFLIGHT_MIGRATION = (11, 0)


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


class Moving:
    """A guest that writes all the time and is moved from QEMU to QEMU, each with its own back-end.

    The back-ends serve one image in turn. What one of them writes into guest memory and does not
    log is old at the next stop: the writers find it, and so does the digest of a file in memory
    that was read from the disk.
    """

    SIZE = 16 * MIB
    FILE = 8 * MIB

    def __init__(
        self,
        stack: contextlib.ExitStack,
        start: Callable[..., Guest],
        image: Path,
        back_end: Callable[[], Served],
        *,
        num_queues: int = 2,
        share: int = 1 << 19,
        options: dict[str, str] | None = None,
    ) -> None:
        content = random_bytes(self.SIZE, seed=3)
        image.write_bytes(content)
        self.image = image
        self._stack = stack
        self._start = start
        self._num_queues = num_queues
        self._options = options or {}
        self.back_ends = [stack.enter_context(back_end()) for _ in range(2)]
        self._here = 0
        self._digest = hashlib.sha256(content[-self.FILE :]).hexdigest()
        self.guest = self._new(0, incoming=False)
        self.guest.boot()
        self.guest.check(f"tail -c {self.FILE} /dev/vda >/tmp/p")
        self.writers = VerifyingWriters(self.guest, "/dev/vda", share)
        self.writers.await_progress()

    def _new(self, place: int, *, incoming: bool) -> Guest:
        disk = VhostUserDisk(
            self.back_ends[place].socket, 5, num_queues=self._num_queues, options=self._options
        )
        return self._stack.enter_context(self._start(disks=[disk], incoming=incoming))

    def next_guest(self) -> Guest:
        """Where to move to: a QEMU at the back-end that the guest does not use."""
        return self._new(1 - self._here, incoming=True)

    def has_arrived(self, target: Guest) -> None:
        """Go on with this one."""
        self._here = 1 - self._here
        self.guest.close()
        self.guest = self.writers.guest = target

    def check(self) -> None:
        """The writers go on, and memory holds what it held."""
        self.writers.await_progress()
        assert self.guest.check("sha256sum </tmp/p").split()[0] == self._digest

    def finish(self) -> None:
        """What the writers wrote at last is what the image holds."""
        digests = self.writers.finish()
        content, share = self.image.read_bytes(), self.writers.share
        regions = [content[n * share : (n + 1) * share] for n in range(self.writers.count)]
        assert digests == [hashlib.sha256(region).hexdigest() for region in regions]
        assert hashlib.sha256(content[-self.FILE :]).hexdigest() == self._digest


@pytest.fixture
def start(assets: Assets, qemu: Qemu, initramfs: Path, tmp_path: Path) -> Callable[..., Guest]:
    """Start a guest with what it takes; the rest is the test's."""
    return functools.partial(Guest, assets, qemu, initramfs, tmp_path)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.mark.needs(LOG)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="split"),
        pytest.param({"packed": "on"}, id="packed", marks=pytest.mark.needs(PACKED)),
    ],
)
def test_precopy_under_a_verifying_load(
    stack: contextlib.ExitStack,
    start: Callable[..., Guest],
    kind: str,
    tmp_path: Path,
    migrations: int,
    options: dict[str, str],
) -> None:
    """Again and again, and once not to the end: then the guest stays where it is."""
    image = tmp_path / "shared.img"
    back_end = functools.partial(BackEnd, kind, image, tmp_path, num_queues=2)
    moving = Moving(stack, start, image, back_end, options=options)
    target = moving.next_guest()
    migration = Migration(moving.guest, target, bandwidth=SLOW)
    migration.await_bytes(SLOW)
    moving.check()
    migration.cancel()
    moving.check()
    target.close()
    # What packed rings add shows in fewer moves.
    for _ in range(max(1, migrations // 3) if options else migrations):
        target = moving.next_guest()
        Migration(moving.guest, target).finish()
        moving.has_arrived(target)
        moving.check()
    moving.finish()


UNORDERED_DISK = str(Path(__file__).parents[2] / "examples" / "unordered_disk.py")


def unordered(kind: str, image: Path, folder: Path) -> Served:
    """A disk of coroutines that take their time: it always has some when the guest pauses."""
    return Served(
        "unordered_disk",
        [sys.executable, UNORDERED_DISK, "SOCKET", str(image)],
        folder,
        environment={"VIRTQUEUE_ENGINE": kind},
    )


@pytest.mark.needs(DEVICES)
def test_requests_in_flight_are_not_lost_on_the_way(
    stack: contextlib.ExitStack, start: Callable[..., Guest], kind: str, tmp_path: Path
) -> None:
    """One that were dropped at the pause, counted as taken, would leave its writer waiting."""
    image = tmp_path / "shared.img"
    back_end = functools.partial(unordered, kind, image, tmp_path)
    moving = Moving(stack, start, image, back_end, num_queues=1, share=1 << 16)
    target = moving.next_guest()
    Migration(moving.guest, target).finish()
    moving.has_arrived(target)
    moving.check()
    moving.finish()


@pytest.mark.needs(DEVICES)
def test_requests_in_flight_are_finished_at_the_target(
    stack: contextlib.ExitStack,
    start: Callable[..., Guest],
    qemu: Qemu,
    kind: str,
    tmp_path: Path,
    migrations: int,
) -> None:
    """QEMU carries the in-flight region along and asks for no drain (`inflight-migration`)."""
    if qemu.version < FIRST_WITH_INFLIGHT_MIGRATION:
        pytest.skip(f"QEMU {qemu} cannot move requests in flight: --qemu=11.1")
    image = tmp_path / "shared.img"
    back_end = functools.partial(unordered, kind, image, tmp_path)
    options = {"inflight-migration": "on"}
    moving = Moving(stack, start, image, back_end, num_queues=1, share=1 << 16, options=options)
    for _ in range(migrations):
        target = moving.next_guest()
        Migration(moving.guest, target).finish()
        moving.has_arrived(target)
        moving.check()
    moving.finish()
    for device in moving.back_ends:
        assert device.stop() == 0
    # The sources gave up some; their targets had them from the region.
    assert any(
        int(said) for device in moving.back_ends
        for said in re.findall(r"(\d+) given up", device.tail())
    )  # fmt: skip


@pytest.mark.needs(POSTCOPY)
def test_postcopy_under_a_verifying_load(
    stack: contextlib.ExitStack,
    start: Callable[..., Guest],
    kind: str,
    tmp_path: Path,
    migrations: int,
) -> None:
    """The guest runs at the target, its disk too, while most of its memory is still to come."""
    if not may_use_userfaultfd():
        skip_or_fail(Missing("userfaultfd is not allowed here"))
    image = tmp_path / "shared.img"
    back_end = functools.partial(
        BackEnd, kind, image, tmp_path, num_queues=2, extra=("--no-mem-slots",)
    )
    moving = Moving(stack, start, image, back_end)
    for _ in range(migrations):
        target = moving.next_guest()
        migration = Migration(moving.guest, target, capabilities=["postcopy-ram"], bandwidth=SLOW)
        migration.await_bytes(SLOW)
        migration.switch_to_postcopy()
        figures = migration.finish()
        assert figures["ram"]["postcopy-requests"] > 0
        moving.has_arrived(target)
        moving.check()
    moving.finish()
