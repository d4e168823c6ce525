"""The one way in which an adapter takes over methods of the objects that it adapts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar


class Adapter(Protocol):
    """An object that takes over methods of its parts."""

    @property
    def parts(self) -> Sequence[object]:
        """The objects to look for a method in, in this order."""


A = TypeVar("A", bound=type[Adapter])


class _PassedOn:
    """The method `name` of the first part that has it, or else `own` of `owner`'s base class.

    The result is the part's own bound method, so `device.hooks.provided` sees the part's method.
    """

    def __init__(self, owner: type, own: str, name: str) -> None:
        self._owner, self._own, self._name = owner, own, name

    def __get__(self, adapter: Adapter | None, kind: type) -> Any:
        if adapter is None:
            return self
        for part in adapter.parts:
            found = getattr(part, self._name, None)
            if found is not None:
                return found
        return getattr(super(self._owner, adapter), self._own)


def passes_on(*same: str, **renamed: Callable[..., object]) -> Callable[[A], A]:
    """Class decorator: these methods come from the adapter's parts, some under another name."""

    def install(kind: A) -> A:
        names = dict.fromkeys(same) | renamed
        for own, method in names.items():
            setattr(kind, own, _PassedOn(kind, own, own if method is None else method.__name__))
        return kind

    return install
