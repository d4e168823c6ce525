"""Which engine serves: the environment's choice, or the best there is."""

from __future__ import annotations

import pytest

from virtqueue import (
    EngineUnavailable,
    UsageError,
    available_engines,
    c_library,
    default_engine,
)


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("there is none")

    monkeypatch.setattr(c_library, "library", missing)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTQUEUE_ENGINE", "python")
    assert default_engine() == "python"
    monkeypatch.delenv("VIRTQUEUE_ENGINE")
    assert default_engine() == available_engines()[0]


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTQUEUE_ENGINE", "fortran")
    with pytest.raises(UsageError, match="VIRTQUEUE_ENGINE is c or python"):
        default_engine()


@pytest.mark.usefixtures("no_library")
def test_without_the_library_python_serves_unless_c_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("VIRTQUEUE_ENGINE", raising=False)
    assert available_engines() == ("python",)
    assert default_engine() == "python"
    monkeypatch.setenv("VIRTQUEUE_ENGINE", "c")
    with pytest.raises(EngineUnavailable, match="there is none"):
        default_engine()
