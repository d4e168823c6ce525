"""Methods that an adapter has from what it adapts, one way for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast

P = ParamSpec("P")
R = TypeVar("R")


class Adapter(Protocol):
    """Has its methods from `parts`."""

    @property
    def parts(self) -> Sequence[object]:
        """Those that may have a method, in the order in which they are asked."""


class _PassedOn:
    """The method `name` of the first part that has it, in the place of the adapter's own."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __set_name__(self, owner: type, name: str) -> None:
        self._owner, self._own = owner, name

    def __get__(self, adapter: Adapter | None, kind: type) -> Any:
        if adapter is None:
            return self
        for part in adapter.parts:
            found = getattr(part, self._name, None)
            if found is not None:
                return found
        return getattr(super(self._owner, adapter), self._own)


def passed_on(method: Callable[Concatenate[Any, P], R]) -> Callable[Concatenate[Any, P], R]:
    """Stands for `method` of one of the adapter's parts; without one, for the base's method.

    What is got from the adapter is the part's own bound method, so `provided` sees through it.
    """
    return cast("Callable[Concatenate[Any, P], R]", _PassedOn(method.__name__))
