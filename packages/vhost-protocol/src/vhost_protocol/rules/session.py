"""The rows applied to a connection: which rules a message breaks, what answers it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..messages import replies as a
from ..messages import requests as r
from ..messages.constants import ProtocolFeatures
from ..messages.gpu import GpuFeaturesReply, GpuSetProtocolFeatures
from ..messages.message import Message
from .checks import counted
from .negotiated import Negotiated
from .rule import Answer, Rule, Violation
from .table import Table


class Session(Negotiated):
    """The negotiated state of one connection; shared by its channels.  See ``Negotiated``."""

    __slots__ = ()

    def violations(
        self, table: Table, rule: Rule, message: Message, fds: int
    ) -> tuple[Violation, ...]:
        """Return the rules that sending ``message`` with ``fds`` descriptors breaks now."""
        found: tuple[Violation, ...] = ()
        for check in table.checks[rule.code]:
            broken = check(self, message, fds)
            if broken:
                found += broken
        return found

    def reply_violations(self, rule: Rule, message: Message, fds: int) -> tuple[Violation, ...]:
        """Return the rules that answering with ``message`` and ``fds`` descriptors breaks."""
        return counted(rule.reply_fds, message, fds)

    def answer_to(self, rule: Rule, message: Message, need_reply: bool) -> tuple[type, ...]:
        """Return the classes of the answer that ``message`` gets now; empty when it gets none.

        Args:
            rule: the row of the message.
            message: the request.
            need_reply: whether its header says NEED_REPLY.
        """
        answer = rule.answer
        if answer is Answer.ALWAYS:
            return rule.replies
        if answer is Answer.NEVER:
            return ()
        # Other payloads under the same code get an Ack at most.
        if type(message) is rule.message and (
            (answer is Answer.WITH_LOG_SHMFD and self.has(ProtocolFeatures.LOG_SHMFD))
            or (answer is Answer.IN_POSTCOPY and self.postcopy)
        ):
            return rule.replies
        if need_reply and (answer is Answer.IF_FLAGGED or self.has(ProtocolFeatures.REPLY_ACK)):
            return (a.Ack,)
        return ()

    def tolerate(self, request: str, violation: Violation) -> None:
        """Count a broken rule that the peer is forgiven for."""
        key = request, violation.rule
        self.tolerated[key] = self.tolerated.get(key, 0) + 1

    def request_sent(self, message: Message) -> None:
        """Take over what a legal request changes; it holds for the messages after it."""
        change = _CHANGES.get(type(message))
        if change is not None:
            change(self, message)

    def reply_sent(self, message: Message) -> None:
        """Take over what an answer tells."""
        change = _TOLD.get(type(message))
        if change is not None:
            change(self, message)


def _set(field: str, value: object) -> Callable[[Session, Any], None]:
    def change(session: Session, message: Any) -> None:
        setattr(session, field, value)

    return change


def _take(field: str) -> Callable[[Session, Any], None]:
    def change(session: Session, message: Any) -> None:
        setattr(session, field, message.features)

    return change


def _take_features(session: Session, message: r.SetFeatures) -> None:
    session.features = message.features
    session.features_set = True


_CHANGES: dict[type[Message], Callable[[Session, Any], None]] = {
    r.SetFeatures: _take_features,
    r.SetProtocolFeatures: _take("protocol_features"),
    r.SetOwner: _set("owned", True),
    r.ResetOwner: _set("owned", False),
    r.PostcopyListen: _set("postcopy", True),
    r.PostcopyEnd: _set("postcopy", False),
    GpuSetProtocolFeatures: _take("gpu_features"),
}
_TOLD: dict[type[Message], Callable[[Session, Any], None]] = {
    a.FeaturesReply: _take("offered_features"),
    a.ProtocolFeaturesReply: _take("offered_protocol_features"),
    GpuFeaturesReply: _take("offered_gpu_features"),
}
