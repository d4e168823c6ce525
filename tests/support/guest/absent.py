"""What a test does when a part it needs is not there."""

from __future__ import annotations

import os
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
