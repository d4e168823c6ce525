"""What a test does when a part it needs is not there."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NoReturn

import pytest

from .assets import Missing


def in_ci() -> bool:
    """Whether the tests are the purpose of this run."""
    return os.environ.get("CI") == "true"


def skip_or_fail(reason: Missing) -> NoReturn:
    """Skip the test with the reason; with CI=true fail, so that nothing is silently left out."""
    if in_ci():
        pytest.fail(f"CI=true and {reason}")
    pytest.skip(str(reason))


def may_use_userfaultfd() -> bool:
    """Whether this process, and so a QEMU that it starts, can wait for pages that arrive late."""
    if os.access("/dev/userfaultfd", os.R_OK | os.W_OK) or os.geteuid() == 0:
        return True
    switch = Path("/proc/sys/vm/unprivileged_userfaultfd")
    return switch.exists() and switch.read_text().strip() == "1"
