"""Methods that an adapter has from what it adapts, one way for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar


class Adapter(Protocol):
    """Has methods from its parts."""

    @property
    def parts(self) -> Sequence[object]:
        """Those that may have a method, in the order in which they are asked."""


A = TypeVar("A", bound=type[Adapter])


class _PassedOn:
    """The method `name` of the first part that has it, or else `owner`'s base's method `own`.

    It gives the part's own bound method, so `device.hooks.provided` sees through it.
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
