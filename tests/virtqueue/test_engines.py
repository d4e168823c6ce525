"""Which engine serves: the environment's choice, or the best there is."""

from __future__ import annotations

import subprocess
import sys

import pytest

from virtqueue import (
    EngineUnavailable,
    UsageError,
    available_engines,
    c_library,
    default_engine,
    load_engine,
)
from virtqueue.engine import c as c_engine


@pytest.fixture
def no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> None:
        raise ImportError("there is none")

    for module in (c_engine, c_library):
        monkeypatch.setattr(module, "library", missing)


def test_the_environment_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTQUEUE_ENGINE", "python")
    assert default_engine() == "python"
    monkeypatch.delenv("VIRTQUEUE_ENGINE")
    assert default_engine() == available_engines()[0]


def test_a_name_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIRTQUEUE_ENGINE", "fortran")
    with pytest.raises(UsageError, match="VIRTQUEUE_ENGINE is c or python"):
        default_engine()
    with pytest.raises(UsageError, match="no engine is called 'cobol'"):
        load_engine("cobol")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["c", "python"])
def test_an_engine_that_is_loaded_is_imported_whole(name: str) -> None:
    code = (
        "import sys, virtqueue\n"
        f"assert virtqueue.load_engine({name!r}) == {name!r}\n"
        "before = set(sys.modules)\n"
        "from virtqueue.engine.choose import make_engine\n"
        "block = virtqueue.layout.QueueBlock()\n"
        "try:\n"
        f"    make_engine({name!r}, block, None)\n"
        "except (virtqueue.VirtqueueError, AttributeError):\n"
        "    pass  # there is no ring behind the block\n"
        "assert not set(sys.modules) - before, set(sys.modules) - before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


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
