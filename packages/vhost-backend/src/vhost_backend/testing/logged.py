"""An error that a device logs fails its test, unless the test expects it.

A device's mistake does not reach the driver as an exception. The request fails, or even seems to
succeed, and only the log says why; but a test that passes shows no log.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import threading
import traceback
from collections.abc import Iterator
from typing import Final

from ..errors import VhostBackendError

_LOGGER: Final = logging.getLogger("vhost_backend")


class DeviceErrors(VhostBackendError):
    """A device or its daemon has logged errors. `errors` has them, with their tracebacks."""

    def __init__(self, errors: list[str]) -> None:
        super().__init__("the device has logged errors:\n" + "\n".join(errors))
        self.errors = errors


class MissingError(VhostBackendError):
    """An error that a test expects was not logged."""


class _Watch:
    """Collects errors: those that a test expects (`pattern`), or all others (None)."""

    def __init__(self, pattern: re.Pattern[str] | None) -> None:
        self.pattern = pattern
        self.errors: list[str] = []

    def take(self) -> list[str]:
        """Return the errors so far, and forget them."""
        errors, self.errors = self.errors, []
        return errors


class _Handler(logging.Handler):
    """Gives each error to one watch: the latest that expects it, or else the latest for all."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.watches: list[_Watch] = []
        self.changing = threading.Lock()

    def emit(self, record: logging.LogRecord) -> None:
        text = _text_of(record)
        watches = list(reversed(self.watches))
        for watch in watches:
            if watch.pattern is not None and watch.pattern.search(text):
                watch.errors.append(text)
                return
        for watch in watches:
            if watch.pattern is None:
                watch.errors.append(text)
                return


_handler: Final = _Handler()


def _text_of(record: logging.LogRecord) -> str:
    text = record.getMessage()
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        text += "\n" + "".join(traceback.format_exception(error)).rstrip()
    return text


class _Sender(logging.Handler):
    """Writes a child's errors to a file, each as a line of JSON."""

    def __init__(self, fd: int) -> None:
        super().__init__(logging.ERROR)
        self._fd = fd

    def emit(self, record: logging.LogRecord) -> None:
        os.write(self._fd, json.dumps(_text_of(record)).encode() + b"\n")


class ChildErrors:
    """Carries the errors that child processes log into this process's log."""

    def __init__(self) -> None:
        self.fd: int = os.memfd_create("errors", os.MFD_CLOEXEC)
        self._read = 0

    def send(self) -> None:
        """In the child: send every error that is logged from now on."""
        _LOGGER.addHandler(_Sender(self.fd))

    def receive(self) -> None:
        """In the parent, when the child has ended: log the child's errors."""
        text = os.pread(self.fd, os.fstat(self.fd).st_size - self._read, self._read)
        self._read += len(text)
        for line in text.splitlines():
            with contextlib.suppress(ValueError):  # the last line of a killed child
                _LOGGER.error("in the device's process: %s", json.loads(line))

    def close(self) -> None:
        """Close the file."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


@contextlib.contextmanager
def _watching(pattern: re.Pattern[str] | None) -> Iterator[_Watch]:
    watch = _Watch(pattern)
    with _handler.changing:
        if not _handler.watches:
            _LOGGER.addHandler(_handler)
        _handler.watches.append(watch)
    try:
        yield watch
    finally:
        with _handler.changing:
            _handler.watches.remove(watch)
            if not _handler.watches:
                _LOGGER.removeHandler(_handler)


@contextlib.contextmanager
def no_errors() -> Iterator[None]:
    """Raise `DeviceErrors` at the end when an error was logged and not expected.

    If the test raises another error, the logged errors are added to it as a note (`add_note`).
    """
    with _watching(None) as watch:
        try:
            yield
        except BaseException as error:
            if watch.errors:
                error.add_note(str(DeviceErrors(watch.errors)))
            raise
    if watch.errors:
        raise DeviceErrors(watch.errors)


def raise_pending() -> None:
    """Raise `DeviceErrors` for unexpected errors logged so far; each error is raised once."""
    with _handler.changing:
        errors = [
            text for watch in _handler.watches if watch.pattern is None for text in watch.take()
        ]
    if errors:
        raise DeviceErrors(errors)


@contextlib.contextmanager
def expect_errors(pattern: str = "") -> Iterator[list[str]]:
    """Expect logged errors that match the regular expression `pattern`; yields the list of them.

    The pattern is matched against message and traceback. These errors do not fail the test. Use it
    around `attached`, `served` or `DeviceProcess`, or inside of them. Raises `MissingError` at the
    end when no such error was logged.
    """
    with _watching(re.compile(pattern)) as watch:
        yield watch.errors
    if not watch.errors:
        raise MissingError(f"no error was logged that matches {pattern!r}")
