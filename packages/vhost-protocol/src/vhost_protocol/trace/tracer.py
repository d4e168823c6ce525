"""Understanding traffic from the side: every message decoded, paired and judged, none refused.

A ``Tracer`` is fed whole messages of one connection, in the order in which they were seen, from a
proxy or a recording.  It keeps the same ``Session`` as the endpoints and asks the same table, but
where they would end the connection it writes down what is wrong and goes on.
"""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

from ..errors import RemoteProtocolError, RuleError
from ..messages.constants import HEADER_SIZE, VERSION
from ..messages.message import Message, Reply, show
from ..rules.codec import Header, choose, decode_header, decode_payload, find_rule
from ..rules.rules import BACKEND_TABLE, FRONTEND_TABLE, GPU_TABLE, Rule, Table
from ..rules.session import Session, Violation

#: The sockets of a connection, by name, and which end asks on them.
CHANNELS: dict[str, Table] = {
    "main": FRONTEND_TABLE,
    "backend": BACKEND_TABLE,
    "gpu": GPU_TABLE,
}
_FRONTEND_ASKS = frozenset(("main",))


class Event(NamedTuple):
    """One message, understood as far as it can be.

    Attributes:
        number: counts the messages of a connection from 1.
        time: seconds since the start of the trace.
        connection: counts the connections of a trace from 1.
        channel: ``"main"``, ``"backend"`` or ``"gpu"``.
        from_frontend: who sent it.
        header: its header.
        request: name of its request code, or None for one that is not known.
        is_reply: whether it is an answer.
        message: its value, or None when it cannot be decoded.
        payload: its payload.
        fds: what the descriptors that came along are, as far as it is known.
        answers: number of the request that it answers, or None.
        latency: seconds since that request, or None.
        violations: rules that it breaks.
    """

    number: int
    time: float
    connection: int
    channel: str
    from_frontend: bool
    header: Header
    request: str | None
    is_reply: bool
    message: Message | None
    payload: bytes
    fds: tuple[str, ...]
    answers: int | None
    latency: float | None
    violations: tuple[Violation, ...]


class _Asked(NamedTuple):
    number: int
    time: float
    rule: Rule
    answers: tuple[type[Reply], ...]


class Tracer:
    """Follows one connection.

    Args:
        connection: its number in the trace.
        order: byte order of the messages, ``"<"`` or ``">"``; this machine's by default.
    """

    def __init__(self, connection: int = 1, order: str | None = None) -> None:
        self._connection = connection
        self.session: Session = Session() if order is None else Session(order)
        self._asked: dict[str, deque[_Asked]] = {name: deque() for name in CHANNELS}
        self._count = 0

    def feed(
        self,
        time: float,
        channel: str,
        from_frontend: bool,
        data: bytes,
        fds: tuple[str, ...] = (),
    ) -> Event:
        """Understand one whole message.

        Args:
            time: seconds since the start of the trace.
            channel: a key of ``CHANNELS``.
            from_frontend: who sent it.
            data: header and payload.
            fds: a word for each descriptor that came along.
        """
        self._count += 1
        table = CHANNELS[channel]
        header = decode_header(data[:HEADER_SIZE], self.session.order)
        payload = data[HEADER_SIZE:]
        asks = from_frontend == (channel in _FRONTEND_ASKS)
        rule = table.rules.get(header.code)
        found: list[Violation] = []
        try:
            find_rule(table, header, reply=not asks)
        except RemoteProtocolError as error:
            found.append(_violation(error))
        message: Message | None = None
        asked: _Asked | None = None
        if rule is not None:
            if asks:
                message = self._request(table, rule, header, payload, len(fds), time, found)
            else:
                asked = self._pair(channel, rule, found)
                message = self._reply(rule, asked, payload, len(fds), found)
        return Event(
            self._count,
            time,
            self._connection,
            channel,
            from_frontend,
            header,
            rule.name if rule is not None else None,
            not asks,
            message,
            payload,
            fds,
            asked.number if asked is not None else None,
            time - asked.time if asked is not None else None,
            tuple(found),
        )

    def _request(
        self,
        table: Table,
        rule: Rule,
        header: Header,
        payload: bytes,
        fds: int,
        time: float,
        found: list[Violation],
    ) -> Message | None:
        session = self.session
        wire = session.wire
        try:
            kind = choose(rule, len(payload), wire)
            message = decode_payload(kind, payload, wire, rule.name)
        except RemoteProtocolError as error:
            if not found:
                found.append(_violation(error))
            return None
        found += session.violations(table, rule, message, fds)
        session.request_sent(message)
        answers = session.answer_to(rule, message, header.need_reply)
        if answers:
            name = next(name for name, other in CHANNELS.items() if other is table)
            self._asked[name].append(_Asked(self._count, time, rule, answers))
        return message

    def _pair(self, channel: str, rule: Rule, found: list[Violation]) -> _Asked | None:
        due = self._asked[channel]
        for asked in due:
            if asked.rule is rule:
                if asked is not due[0]:
                    wanted = f"the answer to {due[0].rule.name} is due first"
                    found.append(Violation("request", rule.name, wanted))
                due.remove(asked)
                return asked
        found.append(Violation("reply", rule.name, "answers nothing that was asked"))
        return None

    def _reply(
        self,
        rule: Rule,
        asked: _Asked | None,
        payload: bytes,
        fds: int,
        found: list[Violation],
    ) -> Message | None:
        kinds = asked.answers if asked is not None else rule.replies
        fitting = [kind for kind in kinds if len(payload) in kind._sizes] or list(kinds)
        if not fitting:
            return None
        try:
            message = decode_payload(fitting[0], payload, self.session.wire, rule.name)
        except RemoteProtocolError as error:
            if not any(violation.field == "size" for violation in found):
                found.append(_violation(error))
            return None
        found += self.session.reply_violations(rule, message, fds)
        self.session.reply_sent(message)
        return message

    @property
    def unanswered(self) -> int:
        """How many requests still wait for an answer."""
        return sum(len(due) for due in self._asked.values())


def _violation(error: RuleError) -> Violation:
    return Violation(error.field, error.value, error.rule)


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
