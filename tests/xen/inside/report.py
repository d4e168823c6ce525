"""One result line for each check; the tests outside read them from the console."""

import json
import time
import traceback
from collections.abc import Callable
from typing import Any, TypeVar

MARK = "XEN-RESULT "
END = "XEN-END"

_Error = TypeVar("_Error", bound=BaseException)
Check = Callable[[], dict[str, Any] | None]
_checks: list[tuple[str, Check]] = []
_lines: list[str] = []


def check(function: Check) -> Check:
    """Register a check; what it returns is reported as its details."""
    module = function.__module__.rpartition(".")[2]
    _checks.append((f"{module}.{function.__name__}", function))
    return function


def expect(kind: type[_Error], call: Callable[[], object]) -> _Error:
    """Return the error of this kind that the call has to raise."""
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"no {kind.__name__}")


def say(name: str, ok: bool, started: float, **details: Any) -> None:
    """Print one result."""
    result = {"name": name, "ok": ok, "seconds": round(time.monotonic() - started, 3), **details}
    _lines.append(MARK + json.dumps(result))
    print(_lines[-1], flush=True)


def run() -> None:
    """Run all checks in the order in which they were registered."""
    for name, function in _checks:
        started = time.monotonic()
        try:
            details = function() or {}
        except BaseException as error:
            text = "".join(traceback.format_exception(error))
            say(name, False, started, error=text[-3000:])
        else:
            say(name, True, started, **details)
    # The hypervisor prints to the same console and may have torn a line; now it is quiet.
    for line in _lines:
        print("\n" + line, flush=True)
    print(f"\n{END}", flush=True)
