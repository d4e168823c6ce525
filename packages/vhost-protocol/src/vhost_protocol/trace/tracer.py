"""Understanding traffic from the side: every message decoded, paired and judged, none refused.

A ``Tracer`` is fed whole messages of one connection, in the order in which they were seen, from a
proxy or a recording.  It keeps the same ``Session`` as the endpoints and asks the same table, but
where they would end the connection it writes down what is wrong and goes on.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from ..errors import RemoteProtocolError, RuleError
from ..messages.constants import HEADER_SIZE
from ..messages.message import Message, Reply
from ..rules.codec import Header, choose, decode_header, decode_payload, find_rule
from ..rules.rule import Rule, Violation
from ..rules.session import Session
from ..rules.table import BACKEND_TABLE, FRONTEND_TABLE, GPU_TABLE, Table

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
        from_frontend: whether the front-end sent it.
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
            from_frontend: whether the front-end sent it.
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
