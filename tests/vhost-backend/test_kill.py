"""SIGKILL at random instants, in the middle of requests: `kill_device` has the long form."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "kill_device", Path(__file__).with_name("kill_device.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("packed", [False, True])
def test_no_request_is_lost_or_repeated(tmp_path: Path, engine: str, packed: bool) -> None:
    """Fifty kills each way, two hundred in all."""
    figures = _load().kill_repeatedly(
        tmp_path / "disk.img", 50, packed=packed, engine=engine, seed=2 + packed
    )
    assert figures.startswith("50 kills")
    assert figures.endswith("none lost, none repeated")
