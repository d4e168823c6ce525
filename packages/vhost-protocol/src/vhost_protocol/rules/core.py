"""The two sides of a channel without I/O: values in, bytes and descriptors out, and the reverse.

``Requester`` asks and reads answers, ``Responder`` reads requests and answers.  On the main socket
the front-end is the requester; on the back-end's channel and the GPU socket the back-end is.  All
channels of one connection share a ``Session``.

After a RemoteProtocolError a core refuses everything but being dropped: what follows in the stream
has no meaning any more.  A LocalProtocolError changes nothing.
"""

from collections import deque
from collections.abc import Sequence
from enum import IntEnum
from types import TracebackType
from typing import Any, Generic, NamedTuple, TypeVar, cast

from ..errors import (
    BadDescriptors,
    LocalProtocolError,
    NotAllowed,
    RemoteProtocolError,
    UnexpectedReply,
)
from ..fds import FdLike, OwnedFd, close_all, fd_number
from ..messages.message import Message, Reply, Request
from ..messages.replies import Ack
from .codec import (
    Frame,
    Framer,
    Header,
    choose,
    decode_payload,
    encode_message,
)
from .rule import Rule, Violation
from .session import Session
from .table import Table

MessageT = TypeVar("MessageT", bound=Message, covariant=True)


class Outgoing(NamedTuple):
    """What to send: all of ``data``, with ``fds`` attached to its first byte."""

    data: bytes
    fds: tuple[int, ...] = ()


class _WithFds:
    """Something that arrived, and the descriptors that came with it, which it owns."""

    __slots__ = ("fds",)

    def __init__(self, fds: list[OwnedFd]) -> None:
        self.fds: list[OwnedFd] = fds

    def take_fd(self) -> OwnedFd | None:
        """Hand over the first descriptor, or None when there is none (left)."""
        return self.fds.pop(0) if self.fds else None

    def take_fds(self) -> list[OwnedFd]:
        """Hand over all descriptors."""
        fds, self.fds = self.fds, []
        return fds

    def close(self) -> None:
        """Close the descriptors that were not taken."""
        close_all(self.fds)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class Received(_WithFds):
    """A request that arrived.

    Attributes:
        message: its value.
        request: its code, an enum member.
        fds: descriptors that came with it; those still here are closed by ``close()``.
        header: its header as it was.
        needs_reply: whether the peer waits for an answer: one of its own kind or an Ack.
        answers: the classes the answer can have; empty when there is none.
        violations: rules it breaks that are tolerated.
    """

    __slots__ = ("_answered", "_rule", "answers", "header", "message", "violations")

    def __init__(
        self,
        rule: Rule,
        message: Message,
        header: Header,
        fds: list[OwnedFd],
        answers: tuple[type[Reply], ...],
        violations: tuple[Violation, ...],
    ) -> None:
        super().__init__(fds)
        self._rule = rule
        self._answered = False
        self.message: Message = message
        self.header: Header = header
        self.answers: tuple[type[Reply], ...] = answers
        self.violations: tuple[Violation, ...] = violations

    @property
    def request(self) -> IntEnum:
        """The request code: a FrontendRequest, BackendRequest or GpuRequest."""
        return self._rule.code

    @property
    def needs_reply(self) -> bool:
        """Whether an answer is due that has not been given."""
        return bool(self.answers) and not self._answered

    def __enter__(self) -> "Received":
        return self

    def __repr__(self) -> str:
        return f"<Received {self.message!r} fds={self.fds}>"


class Answered(_WithFds, Generic[MessageT]):
    """An answer that arrived.

    Attributes:
        message: its value.
        fds: descriptors that came with it; those still here are closed by ``close()``.
        request: the request it answers.
    """

    __slots__ = ("message", "request")

    def __init__(self, message: MessageT, fds: list[OwnedFd], request: Request[Any]) -> None:
        super().__init__(fds)
        self.message: MessageT = message
        self.request: Request[Any] = request

    def __enter__(self) -> "Answered[MessageT]":
        return self

    def __repr__(self) -> str:
        return f"<Answered {self.message!r} fds={self.fds}>"


class _Core:
    """What both sides do: attach descriptors to frames and remember being broken."""

    def __init__(self, table: Table, session: Session | None, *, replies: bool) -> None:
        self.table: Table = table
        self.session: Session = session if session is not None else Session()
        self._framer = Framer(table, self.session.order, replies=replies)
        self._fds: list[OwnedFd] = []
        self._broken: RemoteProtocolError | None = None

    @property
    def wanted(self) -> int:
        """How many bytes to read next; never beyond the end of a message."""
        return self._framer.wanted

    @property
    def partial(self) -> int:
        """Bytes received of an unfinished message."""
        return self._framer.buffered

    @property
    def broken(self) -> RemoteProtocolError | None:
        """The peer's error that ended this core, or None."""
        return self._broken

    def receive(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Take bytes and the descriptors that came with them, which are owned from here on.

        Descriptors belong to the message whose first byte is the first of ``data``.

        Raises:
            BadDescriptors: they came with a later byte, or are more than any message has.
        """
        owned = [OwnedFd(fd) for fd in fds]
        try:
            self._check_usable()
            if owned:
                if self._framer.buffered:
                    raise BadDescriptors(
                        "fds", len(owned), "must come with the first bytes of a header"
                    )
                if len(owned) > self.table.max_fds:
                    rule = f"at most {self.table.max_fds} in one message"
                    raise BadDescriptors("fds", len(owned), rule)
        except RemoteProtocolError as error:
            close_all(owned)
            self._fail(error)
            raise
        self._fds += owned
        self._framer.feed(data)

    def _next_frame(self) -> Frame | None:
        self._check_usable()
        try:
            return self._framer.next()
        except RemoteProtocolError as error:
            self._fail(error)
            raise

    def _take_fds(self) -> list[OwnedFd]:
        fds, self._fds = self._fds, []
        return fds

    def _check_usable(self) -> None:
        if self._broken is not None:
            raise self._broken.bare()

    def _fail(self, error: RemoteProtocolError) -> None:
        self._broken = error.bare()
        self.close()

    def close(self) -> None:
        """Close descriptors of a message that never became whole."""
        close_all(self._fds)

    def _raise_remote(self, violation: Violation, name: str) -> None:
        kind = BadDescriptors if violation.descriptors else NotAllowed
        raise kind(violation.field, violation.value, violation.rule, request=name)


class Responder(_Core):
    """The side that reads requests and answers them.

    Args:
        table: the rows of the socket.
        session: shared state; a new one by default.
        strict: treat violations that are usually tolerated as errors.
    """

    def __init__(self, table: Table, session: Session | None = None, *, strict: bool = False):
        super().__init__(table, session, replies=False)
        self._strict = strict

    def next(self) -> Received | None:
        """Return the next request, or None when bytes are missing.

        Raises:
            RemoteProtocolError: what arrived breaks a rule.
        """
        frame = self._next_frame()
        if frame is None:
            return None
        fds = self._take_fds()
        try:
            return self._understand(frame, fds)
        except RemoteProtocolError as error:
            close_all(fds)
            self._fail(error)
            raise

    def _understand(self, frame: Frame, fds: list[OwnedFd]) -> Received:
        header, rule, payload = frame
        session = self.session
        wire = session.wire
        message = decode_payload(choose(rule, header.size, wire), payload, wire, rule.name)
        violations = session.violations(self.table, rule, message, len(fds))
        for violation in violations:
            if self._strict or not violation.tolerated:
                self._raise_remote(violation, rule.name)
            session.tolerate(rule.name, violation)
        need_reply = header.need_reply
        assert isinstance(message, Request)
        session.request_sent(message)
        answers = session.answer_to(rule, message, need_reply)
        return Received(rule, message, header, fds, answers, violations)

    def reply(self, received: Received, message: Reply, fds: Sequence[FdLike] = ()) -> Outgoing:
        """Return the bytes of an answer.

        Args:
            received: the request.
            message: an instance of one of ``received.answers``.
            fds: descriptors to pass; they stay the caller's.

        Raises:
            LocalProtocolError: this request has another answer, none, or has had it.
        """
        self._check_usable()
        rule = received._rule
        if received._answered:
            raise LocalProtocolError(
                "reply", message, "the request was answered already", request=rule.name
            )
        if type(message) not in received.answers:
            names = " or ".join(kind.__name__ for kind in received.answers)
            wanted = f"the answer must be a {names}" if names else "this request is not answered"
            raise LocalProtocolError("reply", message, wanted, request=rule.name)
        numbers = tuple([fd_number(fd) for fd in fds])
        for found in self.session.reply_violations(rule, message, len(numbers)):
            raise LocalProtocolError(found.field, found.value, found.rule, request=rule.name)
        data = encode_message(self.table, rule, message, self.session.wire, reply=True)
        self.session.reply_sent(message)
        received._answered = True
        return Outgoing(data, numbers)

    def acknowledge(self, received: Received, ok: bool) -> Outgoing | None:
        """Return the bytes of an Ack, or None when the request is not answered with one (any more).

        Args:
            received: the request.
            ok: whether it succeeded.
        """
        if Ack not in received.answers or received._answered:
            return None
        return self.reply(received, Ack(0 if ok else 1))


class _Pending(NamedTuple):
    rule: Rule
    message: Request[Any]
    answers: tuple[type[Reply], ...]


class Requester(_Core):
    """The side that sends requests and reads their answers, which come in the same order.

    Args:
        table: the rows of the socket.
        session: shared state; a new one by default.
        strict: refuse to send what deployed peers are forgiven for.
    """

    def __init__(self, table: Table, session: Session | None = None, *, strict: bool = True):
        super().__init__(table, session, replies=True)
        self._strict = strict
        self._pending: deque[_Pending] = deque()

    @property
    def waiting(self) -> int:
        """How many answers are still to come."""
        return len(self._pending)

    def name_of(self, message: Message) -> str:
        """Return the specification's name of a request."""
        return message.request_name

    def request(
        self,
        message: Request[Any],
        fds: Sequence[FdLike] = (),
        *,
        need_reply: bool | None = None,
    ) -> tuple[Outgoing, bool]:
        """Return the bytes of a request, and whether an answer comes.

        Args:
            message: the request.
            fds: descriptors to pass; they stay the caller's.
            need_reply: set NEED_REPLY; by default when it brings an Ack (REPLY_ACK is negotiated
                and the request has no answer of its own).

        Raises:
            LocalProtocolError: the request is not legal now.
        """
        self._check_usable()
        session = self.session
        rule = self.table.by_message.get(type(message))
        if rule is None:
            raise LocalProtocolError(
                "request", type(message).__name__, f"not one of the {self.table.name} requests"
            )
        numbers = tuple([fd_number(fd) for fd in fds])
        for found in session.violations(self.table, rule, message, len(numbers)):
            if self._strict or not found.tolerated:
                raise LocalProtocolError(found.field, found.value, found.rule, request=rule.name)
        if need_reply is None:
            own = session.answer_to(rule, message, False)
            need_reply = not own and bool(session.answer_to(rule, message, True))
        data = encode_message(
            self.table, rule, message, session.wire, reply=False, need_reply=need_reply
        )
        session.request_sent(message)
        # Ask after the change, as the peer does: SET_PROTOCOL_FEATURES decides on its own Ack.
        answers = session.answer_to(rule, message, need_reply)
        if answers:
            self._pending.append(_Pending(rule, message, answers))
        return Outgoing(data, numbers), bool(answers)

    def next(self) -> Answered[Any] | None:
        """Return the next answer, or None when bytes are missing.

        Raises:
            RemoteProtocolError: what arrived is not the answer that is due.
        """
        frame = self._next_frame()
        if frame is None:
            return None
        fds = self._take_fds()
        try:
            return self._understand(frame, fds)
        except RemoteProtocolError as error:
            close_all(fds)
            self._fail(error)
            raise

    def _understand(self, frame: Frame, fds: list[OwnedFd]) -> Answered[Any]:
        header, rule, payload = frame
        if not self._pending:
            raise UnexpectedReply("request", header.code, "nothing was asked", request=rule.name)
        due = self._pending[0]
        if rule is not due.rule:
            wanted = f"the answer to {due.rule.name} is due"
            raise UnexpectedReply("request", header.code, wanted, request=rule.name)
        kind = due.answers[0]
        for other in due.answers[1:]:
            if header.size in other._sizes:
                kind = other
                break
        wire = self.session.wire
        message = cast("Reply", decode_payload(kind, payload, wire, rule.name))
        for violation in self.session.reply_violations(rule, message, len(fds)):
            self._raise_remote(violation, rule.name)
        self._pending.popleft()
        self.session.reply_sent(message)
        return Answered(message, fds, due.message)
