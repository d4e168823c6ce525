"""Errors that are kept to be raised later, and what is under them."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable

import pytest

from vhost_backend.errors import is_shortage, kept

PATIENCE = 20.0


class Memory:
    """What a frame refers to."""


def fail(held: list[weakref.ref[Memory]], text: str) -> None:
    memory = Memory()
    held.append(weakref.ref(memory))
    raise ValueError(text)


def with_a_cause(held: list[weakref.ref[Memory]]) -> None:
    cause: Exception | None = None
    try:
        fail(held, "cause")
    except ValueError as error:
        cause = error
    try:
        fail(held, "context")
    except ValueError:
        raise RuntimeError("both") from cause


def grouped(held: list[weakref.ref[Memory]]) -> None:
    try:
        fail(held, "member")
    except ValueError as error:
        member = error
    raise ExceptionGroup("of a task group", [member])


@pytest.mark.parametrize("raises", [with_a_cause, grouped])
def test_a_kept_error_holds_nothing_of_its_frames(
    raises: Callable[[list[weakref.ref[Memory]]], None],
) -> None:
    held: list[weakref.ref[Memory]] = []
    error: BaseException | None = None
    try:
        raises(held)
    except Exception as found:
        error = found
    assert error is not None
    assert held
    assert kept(error) is error
    gc.collect()
    assert [each() for each in held] == [None] * len(held)


def test_an_error_that_is_its_own_cause_is_looked_at_once() -> None:
    error = ValueError("raised from itself")
    error.__cause__ = error
    found: list[object] = []

    def look() -> None:
        found.extend((is_shortage(error), kept(error)))

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert found == [False, error]
