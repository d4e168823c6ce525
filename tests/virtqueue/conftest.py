"""One ring rig for every engine, format and feature set."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from virtqueue_rig import FEATURES, Rig

from virtqueue import EngineName, available_engines

# Asking for an engine means that it has to be there: a missing one fails, it does not skip.
ENGINES = (
    (os.environ["VIRTQUEUE_ENGINE"],)
    if os.environ.get("VIRTQUEUE_ENGINE")
    else available_engines()[::-1]
)


# Tests of the C engine itself, by file; of the build they are all but one without it too.
_NAMES = ("guard", "layout", "server", "stops", "transfer", "uring")
OF_THE_LIBRARY = {f"test_c_{name}.py" for name in _NAMES}
OF_THE_LIBRARY.add("test_a_library_from_other_sources_is_noticed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without the library (VIRTQUEUE_BUILD=none) there is nothing for its own tests to test."""
    if "c" in (*available_engines(), *ENGINES):
        return
    reason = pytest.mark.skip(reason="this installation has no C engine")
    for item in items:
        if not OF_THE_LIBRARY.isdisjoint((item.path.name, item.name.partition("[")[0])):
            item.add_marker(reason)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param == "packed")


@pytest.fixture(params=list(FEATURES))
def features(request: pytest.FixtureRequest) -> dict[str, bool]:
    return FEATURES[request.param]


def rigs(engine: EngineName) -> Iterator[type[Rig]]:
    """`Rig` with the engine filled in; every rig is closed at the end."""
    made: list[Rig] = []

    class Made(Rig):
        def __init__(self, **settings: object) -> None:
            settings.setdefault("engine", engine)
            super().__init__(**settings)  # type: ignore[arg-type]
            made.append(self)

    yield Made
    for rig in made:
        rig.close()
    # A free-threaded 3.13 keeps the class, and what it refers to, for ever.
    made.clear()


@pytest.fixture
def make_rig(engine: EngineName) -> Iterator[type[Rig]]:
    yield from rigs(engine)


@pytest.fixture
def make_python_rig() -> Iterator[type[Rig]]:
    """For what can only be done to the Python engine."""
    yield from rigs("python")
