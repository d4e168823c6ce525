"""A back-end that dies while a guest uses it, and QEMU that takes it back when it returns."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.guest import INFLIGHT, MIB, OURS, PACKED, Assets, Bed, Disk, Qemu, able

pytestmark = pytest.mark.timeout(300)

WRITERS = 6
SHARE = MIB // 2

# Writer N fills its region with what no pass before has had there, and reads it back; the file
# nN counts its passes. It ends when it is told to, or at the first difference.
WRITER = """
head -c {base} /dev/urandom >/tmp/base{n}
pass=0
while [ ! -e /tmp/stop ]; do
    pass=$((pass + 1))
    tail -c +$((pass % 1000 * 13 + 1)) /tmp/base{n} | head -c {share} >/tmp/w{n}
    dd if=/tmp/w{n} of={node} bs={size} seek={offset} oflag=seek_bytes,direct \
        conv=notrunc status=none || exit 3
    dd if={node} bs={size} skip={offset} count={share} iflag=skip_bytes,count_bytes,direct \
        status=none | cmp - /tmp/w{n} || exit 4
    echo $pass >/tmp/n{n}.new
    mv /tmp/n{n}.new /tmp/n{n}
done
sha256sum </tmp/w{n}
"""


@pytest.fixture
def bed(
    request: pytest.FixtureRequest,
    assets: Assets,
    qemu: Qemu,
    initramfs: Path,
    kind: str,
    tmp_path: Path,
) -> Iterator[Bed]:
    options = getattr(request, "param", {})
    disks = [Disk("main", 16 * MIB, num_queues=2, reconnect=1, options=options)]
    with Bed(assets, qemu, initramfs, tmp_path, kind, disks) as bed:
        yield bed
        assert bed.complaints() == []


def test_idle_back_end_is_killed_and_restarted(bed: Bed) -> None:
    disk = bed["main"]
    for turn in range(2):
        disk.back_end.kill()
        disk.back_end.start()
        bed.guest.check(
            f"head -c {MIB} /dev/urandom >/tmp/p{turn} && "
            f"dd if=/tmp/p{turn} of={disk.node} bs=64k seek={turn * MIB}"
            " oflag=seek_bytes,direct conv=notrunc status=none"
        )
    digests = bed.guest.check(
        f"cat /tmp/p0 /tmp/p1 | sha256sum; dd if={disk.node} bs=64k count=32 iflag=direct"
        " status=none | sha256sum"
    ).split()[::2]
    assert digests == [disk.host_sha256(0, 2 * MIB)] * 2


@pytest.mark.needs(INFLIGHT)
@pytest.mark.parametrize(
    "bed", [{"packed": "off"}, {"packed": "on"}], ids=["split", "packed"], indirect=True
)
def test_back_end_is_killed_mid_io(bed: Bed, kills: int) -> None:
    """Nothing written is lost, nothing is completed twice, however often the back-end dies."""
    disk = bed["main"]
    packed = bed.guest.check(f"cat {disk.block}/device/features")[34] == "1"
    if not packed and disk.options["packed"] == "on":
        assert not (bed.kind in OURS and able(bed.kind, PACKED))
        pytest.skip("the back-end has no packed rings")
    sizes = [4096, 4096, 16384, 65536, 131072, 262144]
    writers = [
        bed.guest.start(
            WRITER.format(
                n=n, base=SHARE + 16384, share=SHARE, size=size, offset=n * SHARE, node=disk.node
            ),
            limit=280,
        )
        for n, size in enumerate(sizes)
    ]
    chance = random.Random(8)

    def passes() -> list[int]:
        said = bed.guest.check(
            f"for n in {' '.join(map(str, range(WRITERS)))}; do "
            "cat /tmp/n$n 2>/dev/null || echo 0; done"
        )
        return [int(word) for word in said.split()]

    def await_progress(before: list[int], limit: float = 40) -> None:
        deadline = time.monotonic() + limit
        while any(new <= old for new, old in zip(passes(), before, strict=True)):
            ended = [writer.wait() for writer in writers if writer.done]
            assert not ended, bed.describe()
            assert time.monotonic() < deadline, f"{before} {passes()}\n{bed.describe()}"
            time.sleep(0.1)

    await_progress([0] * WRITERS)
    for _ in range(kills):
        time.sleep(chance.uniform(0.05, 0.5))
        disk.back_end.kill()
        before = passes()
        disk.back_end.start()
        await_progress(before)
    bed.guest.check("touch /tmp/stop")
    results = [writer.wait() for writer in writers]
    assert [result.status for result in results] == [0] * WRITERS, results
    for n, result in enumerate(results):
        assert result.output.split()[0] == disk.host_sha256(n * SHARE, SHARE)
