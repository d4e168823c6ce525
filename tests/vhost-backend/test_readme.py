"""The README's examples run as they stand."""

import re
from pathlib import Path
from typing import Any

from vhost_backend import VirtioDevice
from vhost_backend.testing import attached

# In a checkout the tests lie beside the packages, in an sdist inside of the package.
_CHECKOUT = Path(__file__).parents[2] / "packages" / "vhost-backend"
README = (_CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parents[1]) / "README.md"


def test_the_examples() -> None:
    device, use = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in device.splitlines() if line.strip()]) <= 15
    names: dict[str, Any] = {"__name__": "example"}
    exec(device, names)
    assert issubclass(names["Upper"], VirtioDevice)
    exec(use, names)
    assert names["attached"] is attached
