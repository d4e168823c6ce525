"""Writers in a guest that check all they write, for tests that pull the disk away meanwhile."""

from __future__ import annotations

import hashlib
import time

from .guest import Guest, GuestError

# What a writer does: each pass fills its region with bytes that no pass before has had there, past
# the page cache, and reads them back. The file nN counts its passes, resultN ends with the digest
# of what is there at last, or with what went wrong.
_WRITER = """
writer() {
    n=$1 size=$2 offset=$3 pass=0
    head -c $((SHARE + 16384)) /dev/urandom >/tmp/base$n
    while [ ! -e /tmp/stop ]; do
        pass=$((pass + 1))
        tail -c +$((pass % 1000 * 13 + 1)) /tmp/base$n | head -c SHARE >/tmp/w$n
        dd if=/tmp/w$n of=NODE bs=$size seek=$offset oflag=seek_bytes,direct conv=notrunc \
            status=none || { echo "write fails in pass $pass"; return; }
        dd if=NODE bs=$size skip=$offset count=SHARE iflag=skip_bytes,count_bytes,direct \
            status=none | cmp - /tmp/w$n || { echo "difference in pass $pass"; return; }
        echo $pass >/tmp/n$n.new
        mv /tmp/n$n.new /tmp/n$n
    done
    sha256sum </tmp/w$n
}
"""
_SIZES = (4096, 4096, 16384, 65536, 131072, 262144)


class VerifyingWriters:
    """Processes in a guest, each writing its own region of a device over and over.

    Writer n owns the `share` bytes from n * share on. They work on their own, so they also go on
    in a guest that moves: set `guest` to the new one then.
    """

    def __init__(self, guest: Guest, node: str, share: int = 1 << 19) -> None:
        self.guest = guest
        self.share = share
        self.count = len(_SIZES)
        calls = "\n".join(
            f"writer {n} {size} {n * share} >/tmp/result{n}.new 2>&1 </dev/null &&"
            f" mv /tmp/result{n}.new /tmp/result{n} &"
            for n, size in enumerate(_SIZES)
        )
        script = _WRITER.replace("SHARE", str(share)).replace("NODE", node)
        guest.check(f"{script}\n{calls}\necho 0 | tee {' '.join(f'/tmp/n{n}' for n in self._all)}")

    @property
    def _all(self) -> range:
        return range(self.count)

    def passes(self) -> list[int]:
        """How many passes each writer has finished."""
        said = self.guest.check("for n in /tmp/n?; do cat $n; done")
        return [int(word) for word in said.split()]

    def await_progress(self, before: list[int] | None = None, limit: float = 60) -> None:
        """Wait until every writer has finished a pass since `before` (default: now).

        Raises GuestError when one gives up, or for `limit` seconds none finishes a pass.
        """
        before = self.passes() if before is None else before
        now = before
        deadline = time.monotonic() + limit
        while True:
            last, now = now, self.passes()
            if now != last:
                deadline = time.monotonic() + limit
            if all(new > old for new, old in zip(now, before, strict=True)):
                return
            ended = self.guest.run("cat /tmp/result?").output
            if "pass" in ended:
                raise GuestError(f"{ended}\n{self.guest.describe()}")
            if time.monotonic() > deadline:
                raise GuestError(f"from {before} to {now} passes\n{self.guest.describe()}")
            time.sleep(0.1)

    def finish(self, limit: float = 60) -> list[str]:
        """Let each end its pass; the digests of their regions. Raises GuestError as above."""
        results = [f"/tmp/result{n}" for n in self._all]
        said = self.guest.check(
            f"touch /tmp/stop; until ls {' '.join(results)} >/dev/null 2>&1;"
            f" do usleep 50000; done; cat {' '.join(results)}",
            limit,
        )
        lines = said.splitlines()
        if len(lines) != self.count or not all(line.endswith(" -") for line in lines):
            raise GuestError(f"{said}\n{self.guest.describe()}")
        return [line.split()[0] for line in lines]

    def expected(self, content: bytes) -> list[str]:
        """The digests that `finish` has to return when this is what the device holds."""
        return [
            hashlib.sha256(content[n * self.share : (n + 1) * self.share]).hexdigest()
            for n in self._all
        ]
