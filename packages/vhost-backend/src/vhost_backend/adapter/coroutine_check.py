"""Recognises coroutine functions without `inspect`, whose import costs a megabyte of memory."""

from __future__ import annotations

from types import FunctionType, MethodType

#: `inspect.CO_COROUTINE`: what `async def` sets in a function's code.
_CO_COROUTINE = 0x80


def is_coroutine_function(function: object) -> bool:
    """As `inspect.iscoroutinefunction`, which is imported only for unusual callables."""
    target = function.__func__ if isinstance(function, MethodType) else function
    if type(target) is FunctionType and not target.__dict__:  # no mark on it as a coroutine
        return bool(target.__code__.co_flags & _CO_COROUTINE)
    from inspect import iscoroutinefunction

    return iscoroutinefunction(function)
