"""Recordings: a first line that says what it is, then a line of JSON for each message."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import IO, Any, NamedTuple, TextIO

from ..messages.constants import HEADER_SIZE
from ..messages.message import BIG, LITTLE, NATIVE
from .tracer import CHANNELS

_FORMAT = "vhost-trace"
_VERSION = 1
_ORDERS = {"little": LITTLE, "big": BIG}


class TraceError(Exception):
    """The trace cannot go on; the text is for the user."""


class Record(NamedTuple):
    """One message as it was seen."""

    time: float
    connection: int
    channel: str
    from_frontend: bool
    data: bytes
    fds: tuple[str, ...]


def header_line(order: str = NATIVE) -> dict[str, Any]:
    """Return the first line of a recording."""
    name = next(word for word, sign in _ORDERS.items() if sign == order)
    return {"format": _FORMAT, "version": _VERSION, "byteorder": name}


def write_record(file: TextIO, record: Record) -> None:
    """Append a record to a recording: a line of JSON."""
    line = {
        "t": record.time,
        "c": record.connection,
        "ch": record.channel,
        "fe": record.from_frontend,
        "data": record.data.hex(),
        "fds": list(record.fds),
    }
    file.write(json.dumps(line) + "\n")


def read_records(file: IO[str]) -> tuple[str, Iterator[Record]]:
    """Open a recording: its byte order, and its records as they are read.

    Raises:
        TraceError: it is not a recording, or a line of it is damaged.
    """
    try:
        head = json.loads(file.readline())
        good = head["format"] == _FORMAT and head["version"] == _VERSION
        order = _ORDERS[head["byteorder"]]
    except (ValueError, KeyError, TypeError):
        good = False
        order = ""
    if not good:
        raise TraceError("not a vhost-trace recording of version 1")
    return order, _records(file)


def _records(file: IO[str]) -> Iterator[Record]:
    for number, line in enumerate(file, 2):
        if not line.strip():
            continue
        try:
            item = json.loads(line)
            record = Record(
                float(item["t"]),
                int(item["c"]),
                str(item["ch"]),
                bool(item["fe"]),
                bytes.fromhex(item["data"]),
                tuple([str(fd) for fd in item["fds"]]),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise TraceError(f"line {number}: damaged record ({error!r})") from None
        if record.channel not in CHANNELS or len(record.data) < HEADER_SIZE:
            raise TraceError(f"line {number}: damaged record (no such channel, or no header)")
        yield record
