"""Events as lines of text or JSON, and a printer for the records of many connections."""

from __future__ import annotations

import json
from typing import Any, TextIO

from ..messages.constants import VERSION
from ..messages.message import NATIVE, Message, show
from .recording import Record
from .tracer import Event, Tracer


def format_text(event: Event) -> str:
    """Write an event as one line, and a further line for each violation."""
    arrow = "fe -> be" if event.from_frontend else "fe <- be"
    channel = "" if event.channel == "main" else f" [{event.channel}]"
    name = event.request or f"request {event.header.code}"
    parts = [f"{event.time:10.6f} c{event.connection} #{event.number:<4} {arrow}{channel} {name}"]
    if event.is_reply:
        parts.append("reply")
    if event.message is None:
        parts.append(f"({event.header.size} bytes, not understood: {event.payload[:32].hex()})")
    else:
        fields = event.message._fields
        parts += [f"{field}={event.message._show(field)}" for field in fields]
    if event.fds:
        parts.append(f"fds=[{', '.join(event.fds)}]")
    if event.header.need_reply:
        parts.append("need-reply")
    if event.answers is not None and event.latency is not None:
        parts.append(f"(answers #{event.answers} after {event.latency * 1000:.3f} ms)")
    lines = [" ".join(parts)]
    for broken in event.violations:
        mark = "~~" if broken.tolerated else "!!"
        lines.append(f"           {mark} {broken.field} is {show(broken.value)}: {broken.rule}")
    return "\n".join(lines)


def to_json(event: Event) -> dict[str, Any]:
    """Return an event as plain values for ``json``; keys never hold secrets."""
    message = event.message
    return {
        "number": event.number,
        "time": round(event.time, 6),
        "connection": event.connection,
        "channel": event.channel,
        "from": "front-end" if event.from_frontend else "back-end",
        "code": event.header.code,
        "request": event.request,
        "reply": event.is_reply,
        "version": event.header.flags & VERSION,
        "need_reply": event.header.need_reply,
        "size": event.header.size,
        "message": None if message is None else type(message).__name__,
        "fields": None if message is None else _plain(message),
        "payload": event.payload[:256].hex() if message is None else None,
        "fds": list(event.fds),
        "answers": event.answers,
        "latency": None if event.latency is None else round(event.latency, 6),
        "violations": [
            {
                "field": v.field,
                "value": v.value if isinstance(v.value, (int, str)) else show(v.value),
                "rule": v.rule,
                "tolerated": v.tolerated,
            }
            for v in event.violations
        ],
    }


def _plain(value: object, *, field: str = "", secret: frozenset[str] = frozenset()) -> Any:
    if isinstance(value, Message):
        return {f: _plain(getattr(value, f), field=f, secret=value._secret) for f in value._fields}
    if field in secret and isinstance(value, bytes):
        return f"<{len(value)} secret bytes>"
    if isinstance(value, bytes):
        return value.hex()
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool):
        return value
    return int(value) if isinstance(value, int) else str(value)


class Printer:
    """Prints records, one tracer for each connection."""

    def __init__(self, out: TextIO, *, as_json: bool, order: str = NATIVE) -> None:
        self._out = out
        self._json = as_json
        self._order = order
        self._tracers: dict[int, Tracer] = {}
        self.violations: int = 0

    def record(self, record: Record) -> None:
        """Print one record."""
        tracer = self._tracers.get(record.connection)
        if tracer is None:
            tracer = self._tracers[record.connection] = Tracer(record.connection, self._order)
        event = tracer.feed(
            record.time, record.channel, record.from_frontend, record.data, record.fds
        )
        self.violations += sum(1 for broken in event.violations if not broken.tolerated)
        text = json.dumps(to_json(event)) if self._json else format_text(event)
        print(text, file=self._out, flush=True)

    def note(self, when: float, connection: int, text: str) -> None:
        """Print something that is not a message."""
        if self._json:
            line = {"time": round(when, 6), "connection": connection, "note": text}
            print(json.dumps(line), file=self._out, flush=True)
        else:
            print(f"{when:10.6f} c{connection} -- {text}", file=self._out, flush=True)

    def end(self, connection: int) -> None:
        """Forget a connection."""
        self._tracers.pop(connection, None)
