"""The short form of the soak: twenty seconds of trouble; `soak` runs for as long as it is told."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from virtqueue import EngineName, available_engines


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


def test_the_command_ends_with_a_verdict(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = _load()
    monkeypatch.setattr(sys, "argv", ["soak.py", "--minutes=0.5", "--engine=python"])
    faults = (module.Grown("threads"), module.VhostBackendError("lost"), SystemExit("510"))
    outcomes = iter((None, *faults))

    def soak(seconds: float, *, engine: EngineName, seed: int) -> str:
        assert (seconds, engine, seed) == (30, "python", 1)
        outcome = next(outcomes)
        if outcome is not None:
            raise outcome
        return "figures"

    monkeypatch.setattr(module, "soak", soak)
    for status, words in ((0, "passed"), (1, "FAILED"), (1, "FAILED"), (1, "FAILED")):
        assert module.main() == status
        assert capsys.readouterr().out.splitlines()[-1].startswith(f"verdict: {words}")


def test_what_grows_is_noticed() -> None:
    module = _load()
    usage = module.Usage(10_000, 10, 100, 4)
    steady = [(float(second), usage) for second in range(10)]
    module.check(steady)
    for more in (
        usage._replace(descriptors=11),
        usage._replace(mappings=120),
        usage._replace(resident_kib=20_000),
        usage._replace(threads=6),
    ):
        with pytest.raises(module.Grown):
            module.check([*steady, (10.0, more)])
