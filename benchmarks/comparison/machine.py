"""Describe the machine that a run has."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator
from pathlib import Path


def machine() -> Iterator[str]:
    """Describe the machine and the interpreter."""
    model = "unknown processor"
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    yield f"- date: {time.strftime('%Y-%m-%d', time.gmtime())}"
    yield f"- machine: {model}, {os.cpu_count()} CPUs, Linux {platform.release()}"
    name = f"{platform.python_implementation()} {platform.python_version()}"
    yield f"- interpreter: {name} ({Path(sys.executable).resolve()}; {platform.python_compiler()})"
    load = os.getloadavg()
    yield f"- load average when the run began: {load[0]:.1f}, {load[1]:.1f}, {load[2]:.1f}"
