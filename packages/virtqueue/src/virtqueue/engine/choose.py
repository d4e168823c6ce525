"""Choosing a ring engine."""

from __future__ import annotations

import os
from typing import Final, Literal

from ..errors import EngineUnavailable, UsageError
from ..layout import QueueBlock
from ..memory.table import Memory
from .interface import Engine

EngineName = Literal["c", "python"]

VARIABLE: Final = "VIRTQUEUE_ENGINE"


def wanted_engine(name: str | None) -> EngineName | None:
    """The engine that the caller, or else the environment, asks for; None for the best."""
    chosen = name or os.environ.get(VARIABLE) or None
    if chosen is None:
        return None
    if chosen == "c":
        return "c"
    if chosen == "python":
        return "python"
    raise UsageError(f"no engine is called {chosen!r}: {VARIABLE} is c or python")


def make_engine(name: str | None, block: QueueBlock, memory: Memory) -> Engine:
    """An engine for the block; raises `EngineUnavailable` when "c" is wanted and not there."""
    wanted = wanted_engine(name)
    if wanted != "python":
        try:
            from .c import create as create_c

            return create_c(block)
        except (ImportError, EngineUnavailable) as error:
            if wanted == "c":
                raise _unavailable(error) from error
    from .python.create import create

    return create(block, memory)


def available_engines() -> tuple[EngineName, ...]:
    """The engines that can be used here, the best first."""
    try:
        from .c import check

        check()
    except (ImportError, EngineUnavailable):
        return ("python",)
    return ("c", "python")


def load_engine(name: str | None = None) -> EngineName:
    """Import what the engine called `name` needs (None: the default), and tell which one it is.

    Otherwise the first queue imports it, and a disk that stands still holds it up. Raises
    `UsageError` for a name of no engine, `EngineUnavailable` where there is no C engine.
    """
    wanted = wanted_engine(name)
    if wanted != "python":
        try:
            from .c import check

            check()
            return "c"
        except (ImportError, EngineUnavailable) as error:
            if wanted == "c":
                raise _unavailable(error) from error
    from .python import create  # noqa: F401

    return "python"


def default_engine() -> EngineName:
    """The engine that a queue gets when nothing else is said: VIRTQUEUE_ENGINE's, or the best.

    Raises `UsageError` when VIRTQUEUE_ENGINE names no engine, and `EngineUnavailable` when it asks
    for the C engine, which is not there.
    """
    return load_engine()


def _unavailable(error: Exception) -> EngineUnavailable:
    return EngineUnavailable(f"the C engine cannot be used: {error}")
