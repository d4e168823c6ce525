"""Have perf watch a process, and write where its time went."""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def profiled(folder: Path, name: str, pid: int) -> Iterator[None]:
    """Profile the process `pid` during the block; write the report to a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    base = folder / name.replace("/", "-")
    data = base.with_name(base.name + ".data")
    record = ["perf", "record", "--quiet", "--event=cpu-clock", f"--pid={pid}", f"-o{data}"]
    with subprocess.Popen(record, stderr=subprocess.DEVNULL) as perf:
        try:
            yield
        finally:
            perf.send_signal(signal.SIGINT)
    report = ["perf", "report", "--stdio", "--sort=dso,symbol", "--percent-limit=1", f"-i{data}"]
    text = subprocess.run(report, capture_output=True, text=True).stdout
    base.with_name(base.name + ".txt").write_text(text)
    data.unlink(missing_ok=True)
