"""The memory of block daemons that wait for a front-end."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path

from comparison.builds import Unavailable
from comparison.cases import READ_FILE
from comparison.contestants import BACKENDS, Place
from comparison.processes import started


def idle_memory(folder: Path, image: Path, missing: dict[str, str]) -> dict[str, dict[str, int]]:
    """Return resident and proportional KiB of each block daemon without a front-end."""
    found = {}
    for name in READ_FILE:
        if BACKENDS[name].needs in missing:
            continue
        with contextlib.suppress(Unavailable):
            with started(BACKENDS[name], Place((folder / f"{name}.sock",), image)) as process:
                time.sleep(0.5)
                text = Path(f"/proc/{process.pid}/smaps_rollup").read_text()
            fields = dict(line.split(":", 1) for line in text.splitlines()[1:])
            found[name] = {key: int(fields[key].split()[0]) for key in ("Rss", "Pss")}
    return found
