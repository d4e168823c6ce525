"""Back-ends that serve an image to a guest: ours, and QEMU's storage daemon as the control."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from .assets import Missing, tool
from .processes import Child

# Our own daemon with either ring engine, and the foreign one that every Debian has.
OURS = ("c", "python")
STORAGE_DAEMON = "storage-daemon"

# What a back-end must be able to do for some tests, and which ones can. A program named by its
# path is expected to do everything but packed rings, as QEMU's own example back-ends do.
# LOG stands for all that a migration takes: the dirty log, the ring's place, a shared image.
LOG = "log"
INFLIGHT = "inflight"
PACKED = "packed"
POSTCOPY = "postcopy"
IOMMU = "iommu"
SLOTS = "slots"
DEVICES = "devices"  # any device that is written with our package
_OURS = frozenset({INFLIGHT, IOMMU, LOG, PACKED, POSTCOPY, SLOTS, DEVICES})
_ABILITIES: dict[str, frozenset[str]] = {
    "c": _OURS,
    "python": _OURS,
    STORAGE_DAEMON: frozenset({LOG}),
}


def able(kind: str, ability: str) -> bool:
    """Whether tests that need this ability are run with this kind of back-end."""
    return ability in _ABILITIES.get(kind, {LOG, INFLIGHT})


class Served:
    """A back-end process that listens on a Unix socket of its own, `socket`.

    `command` is its argument vector, in which SOCKET stands for the socket's path; `name` names
    the log in `folder`.
    `start()` waits until the socket listens. As a context manager it starts and ends it.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        folder: Path,
        *,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        # Paths of Unix sockets are short; the folders of tests are not.
        self._folder = tempfile.TemporaryDirectory(prefix="vub-")
        self.socket = Path(self._folder.name) / "s"
        self.log = folder / f"{name}.{Path(self._folder.name).name}.back-end.log"
        self._environment = os.environ | dict(environment or {})
        self._process: Child | None = None
        self._command = [word.replace("SOCKET", str(self.socket)) for word in command]

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            error.add_note(f"--- back-end: {' '.join(self._command)}\n{self.tail()}")
        self.close()

    @property
    def process(self) -> Child:
        """The running process."""
        if self._process is None:
            raise RuntimeError("the back-end has not been started")
        return self._process

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.returncode is None

    def start(self, limit: float = 30) -> None:
        """Start it and wait until it listens. Raises RuntimeError with its output otherwise."""
        self._process = Child(self._command, self.log, environment=self._environment)
        deadline = time.monotonic() + limit
        while not _listens(self.socket):
            if self._process.returncode is not None or time.monotonic() > deadline:
                raise RuntimeError(
                    f"{' '.join(self._command)} does not listen "
                    f"(exit status {self._process.returncode})\n{self.tail()}"
                )
            time.sleep(0.02)

    def kill(self) -> None:
        """SIGKILL: no chance to tidy up."""
        self.process.kill()

    def stop(self, limit: float = 10) -> int:
        """SIGTERM; returns the exit status."""
        return self.process.terminate(limit)

    def tail(self) -> str:
        return "" if self._process is None else self._process.tail()

    def close(self) -> None:
        if self._process is not None:
            self._process.close()
        self._folder.cleanup()


class BackEnd(Served):
    """A back-end process that serves one disk image.

    `kind` is "c" or "python" (our daemon, with that ring engine), "storage-daemon" (QEMU's), or the
    path of a program that keeps the specification's conventions for back-end programs.
    """

    def __init__(
        self,
        kind: str,
        image: Path,
        folder: Path,
        *,
        read_only: bool = False,
        num_queues: int = 1,
        serial: str | None = None,
        extra: tuple[str, ...] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.kind = kind
        self.image = image
        environment = dict(environment or {})
        if kind == STORAGE_DAEMON:
            command = self._storage_daemon(read_only, num_queues)
            self.serial = "vhost_user_blk"
        elif kind not in OURS:
            self.serial = kind
            command = [kind, "--socket-path=SOCKET", f"--blk-file={image}"]
            command += ["--read-only"] if read_only else []
        else:
            self.serial = serial or ""
            command = self._ours(read_only, num_queues, serial)
            environment["VIRTQUEUE_ENGINE"] = kind
        super().__init__(image.name, [*command, *extra], folder, environment=environment)

    def start(self, limit: float = 30) -> None:
        if self.kind not in OURS:
            # Foreign ones may refuse to replace what a killed one has left.
            self.socket.unlink(missing_ok=True)
        super().start(limit)

    def _ours(self, read_only: bool, num_queues: int, serial: str | None) -> list[str]:
        command = [sys.executable, "-m", "vhost_backend", "blk"]
        command += ["--socket-path=SOCKET", f"--blk-file={self.image}"]
        command += [f"--num-queues={num_queues}"]
        if read_only:
            command += ["--read-only"]
        if serial is not None:
            command += [f"--serial={serial}"]
        return command

    def _storage_daemon(self, read_only: bool, num_queues: int) -> list[str]:
        program = tool("qemu-storage-daemon")
        if program is None:
            raise Missing("qemu-storage-daemon is not installed (Debian: qemu-system-common)")
        node = f"file,node-name=disk,filename={self.image},discard=unmap,locking=off"
        if read_only:
            node += ",read-only=on"
        return [
            program,
            *("--blockdev", node, "--export"),
            "type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,"
            f"addr.path=SOCKET,num-queues={num_queues},"
            f"writable={'off' if read_only else 'on'}",
        ]


def _listens(path: Path) -> bool:
    """Whether a Unix socket listens at the path, told without a connection.

    A connection would be a front-end's to the back-end, and some serve only one at a time.
    """
    if not path.exists():
        return False
    name = str(path)
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        words = line.split(maxsplit=7)
        # The flags of a listening socket hold SO_ACCEPTCON (bit 16).
        if len(words) == 8 and words[7] == name and int(words[3], 16) & 0x10000:
            return True
    return False
