"""The short form of the soak: twenty seconds of trouble; `soak` runs for as long as it is told."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from virtqueue import available_engines


def _load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("soak", Path(__file__).with_name("soak.py"))
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules["soak"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_twenty_seconds_of_trouble() -> None:
    report = _load().soak(20.0, engine=available_engines()[0], seed=2)
    assert "requests checked" in report


def test_what_grows_is_noticed() -> None:
    module = _load()
    usage = module.Usage(10_000, 10, 100, 4)
    steady = [(float(second), usage) for second in range(10)]
    module.check(steady)
    for more in (
        usage._replace(descriptors=11),
        usage._replace(mappings=120),
        usage._replace(resident_kib=20_000),
        usage._replace(threads=5),
    ):
        with pytest.raises(module.Grown):
            module.check([*steady, (10.0, more)])
