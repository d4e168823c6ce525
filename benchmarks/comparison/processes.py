"""Run a contestant as a process, on the processors that its case allows."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from comparison.builds import Unavailable
from comparison.contestants import Backend, Place

LISTEN_SECONDS = 20.0


@contextlib.contextmanager
def confined(cpus: frozenset[int]) -> Iterator[None]:
    """Confine processes started in the block to `cpus`; an empty set leaves them free."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus or before)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


@contextlib.contextmanager
def started(backend: Backend, place: Place) -> Iterator[subprocess.Popen[bytes]]:
    """Run a back-end until the block ends."""
    command = backend.command(place)
    # testpmd places its threads itself, and runs until its input ends.
    cpus = frozenset() if backend.needs == "dpdk" else place.back_end
    with tempfile.TemporaryFile() as errors:
        with confined(cpus):
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=errors,
                env={**os.environ, "PYTHONWARNINGS": "ignore"},
            )
        try:
            for socket in place.sockets:
                _wait(process, socket, errors.fileno())
            yield process
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            assert process.stdin is not None
            process.stdin.close()
            for socket in place.sockets:
                socket.unlink(missing_ok=True)


def _wait(process: subprocess.Popen[bytes], socket: Path, errors: int) -> None:
    end = time.monotonic() + LISTEN_SECONDS
    while not socket.exists():
        if process.poll() is not None:
            text = os.pread(errors, 65536, 0).decode(errors="replace").strip()
            raise Unavailable((text.splitlines() or [f"ended with {process.returncode}"])[-1])
        if time.monotonic() > end:
            raise Unavailable(f"did not listen within {LISTEN_SECONDS:g} s")
        time.sleep(0.005)
