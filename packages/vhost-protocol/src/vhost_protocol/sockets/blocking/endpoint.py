# Derived from ../aio/endpoint.py by scripts/derive-blocking: change that file.
"""Halves of a channel: one that asks, one that answers.  The endpoints build on them."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Any, TypeVar

from ...errors import ConnectionClosed, LocalProtocolError, ProtocolError, RequestFailed
from ...fds import FdLike, fd_number
from ...messages.message import Reply, Request
from ...messages.replies import Ack
from ...rules.core import Answered, Outgoing, Received, Requester, Responder
from ...rules.session import Session
from ...rules.table import Table
from ..raw import Deadline
from .transport import Lock, Transport, exchange_ended

ReplyT = TypeVar("ReplyT", bound=Reply)


class _Endpoint:
    """A socket and what is common to both halves.

    Attributes:
        timeout: seconds one exchange may take, or None for no limit.
    """

    def __init__(self, sock: socket.socket, timeout: float | None) -> None:
        self._transport = Transport(sock)
        self._closed = False
        self.timeout: float | None = timeout

    def fileno(self) -> int:
        """Return the socket's descriptor, for ``select``; -1 after ``close()``."""
        return self._transport.fileno()

    @property
    def closed(self) -> bool:
        """Whether ``close()`` was called or an error has ended the connection."""
        return self._closed

    def _check_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("connection", "closed", "cannot be used any more")

    def shutdown(self) -> None:
        """End the connection from another thread.

        Calls that wait on it are woken: ``receive()`` returns None (inside a message it raises
        ConnectionClosed), a request raises ConnectionClosed.  ``close()`` is for the thread that
        uses the endpoint: from another it would free the descriptor under that thread's feet.
        """
        self._transport.shutdown()

    def close(self) -> None:
        """Close the socket and every descriptor that was not taken.  Can be called again."""
        self._closed = True
        self._transport.close()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


class RequestingEndpoint(_Endpoint):
    """A socket on which we ask; threads or tasks that share it take turns.

    Args:
        sock: a connected Unix stream socket; owned from here on.
        table: the rows of the socket.
        session: shared state; a new one by default.
        timeout: seconds one exchange may take, or None for no limit.
        strict: refuse to send what deployed peers are forgiven for.
    """

    def __init__(
        self,
        sock: socket.socket,
        table: Table,
        session: Session | None = None,
        *,
        timeout: float | None = None,
        strict: bool = True,
    ) -> None:
        super().__init__(sock, timeout)
        self._core = Requester(table, session, strict=strict)
        self._lock = Lock()

    @property
    def session(self) -> Session:
        """What is negotiated."""
        return self._core.session

    def request(
        self,
        message: Request[ReplyT],
        fds: Sequence[FdLike] = (),
        *,
        need_reply: bool | None = None,
    ) -> Answered[ReplyT] | Answered[Ack] | None:
        """Send a request and wait for its answer, if it has one.

        A call that is interrupted or cancelled closes the connection: the next one would take its
        answer.

        Args:
            message: the request.
            fds: descriptors to pass; they stay the caller's.
            need_reply: see ``Requester.request``.

        Returns:
            the answer with its descriptors, which the caller owns, or None.

        Raises:
            LocalProtocolError: the request is not legal now; nothing was sent.
            RemoteProtocolError: the answer is wrong.
            ConnectionClosed, Timeout, OutOfResources: there was none.  After these and after
                RemoteProtocolError the connection is closed.
        """
        with self._lock:
            self._check_open()
            outgoing, answered = self._core.request(message, fds, need_reply=need_reply)
            try:
                deadline = Deadline(self.timeout)
                self._transport.send(outgoing, deadline)
                return self._await(deadline) if answered else None
            except BaseException as error:
                if isinstance(error, ProtocolError) and error.request is None:
                    error.request = self._core.name_of(message)
                # The stream may stand inside a message.
                self.close()
                raise

    def _await(self, deadline: Deadline) -> Answered[Any]:
        core = self._core
        while True:
            answer = core.next()
            if answer is not None:
                return answer
            data, fds = self._transport.receive(core.wanted, core.partial, deadline)
            if not data:
                raise ConnectionClosed(
                    "the peer closed the connection instead of answering", partial=core.partial
                )
            core.receive(data, fds)

    def call(self, message: Request[Any], fds: Sequence[FdLike] = ()) -> None:
        """Send a request that is answered with an Ack or not at all.

        Raises:
            RequestFailed: the Ack is not zero.
            ProtocolError: as ``request``.
        """
        answer = self.request(message, fds)
        if answer is not None:
            with answer:
                reply = answer.message
                if isinstance(reply, Ack) and reply.value:
                    raise RequestFailed(self._core.name_of(message), reply.value)

    def ask(self, message: Request[ReplyT], fds: Sequence[FdLike] = ()) -> ReplyT:
        """Send a request and return its answer's value; descriptors it brings are closed.

        Raises:
            ProtocolError: as ``request``.
        """
        with self.ask_fds(message, fds) as answer:
            return answer.message

    def ask_fds(self, message: Request[ReplyT], fds: Sequence[FdLike] = ()) -> Answered[ReplyT]:
        """Send a request and return its answer with the descriptors it brings.

        Raises:
            LocalProtocolError: this request has no answer now.
            ProtocolError: as ``request``.
        """
        answer = self.request(message, fds)
        if answer is None:
            raise LocalProtocolError("reply", None, "this request is not answered in this state")
        return answer  # type: ignore[return-value]

    def send_raw(self, data: bytes, fds: Sequence[FdLike] = ()) -> None:
        """Send bytes as they are, to see what a peer makes of them.  For tests of peers.

        Nothing is checked and no answer is awaited.
        """
        with self._lock:
            self._check_open()
            numbers = tuple([fd_number(fd) for fd in fds])
            self._transport.send(Outgoing(data, numbers), Deadline(self.timeout))

    def close(self) -> None:
        """Close the socket and every descriptor that was not taken.  Can be called again.

        An exchange of another thread ends first, with ConnectionClosed.
        """
        self._closed = True
        with exchange_ended(self._lock, self.shutdown):
            super().close()
            self._core.close()


class AnsweringEndpoint(_Endpoint):
    """A socket on which requests arrive; one thread or task receives, any may answer.

    Args:
        sock: a connected Unix stream socket; owned from here on.
        table: the rows of the socket.
        session: shared state; a new one by default.
        timeout: seconds a message may take once it has begun, and an answer to be taken, or None.
        strict: treat violations that are usually tolerated as errors.
    """

    def __init__(
        self,
        sock: socket.socket,
        table: Table,
        session: Session | None = None,
        *,
        timeout: float | None = None,
        strict: bool = False,
    ) -> None:
        super().__init__(sock, timeout)
        self._core = Responder(table, session, strict=strict)
        self._lock = Lock()

    @property
    def session(self) -> Session:
        """What is negotiated."""
        return self._core.session

    def receive(self) -> Received | None:
        """Wait for a request.  Giving up, as a cancelled task does, loses nothing.

        Returns:
            the request with its descriptors, to be closed by the caller, or None when the peer has
            closed the connection between messages.

        Raises:
            RemoteProtocolError: what arrived breaks a rule.
            ConnectionClosed: the peer left inside a message, or before it had read our answers.
            Timeout: a message began and did not end in time.
            OutOfResources: this process ran short of descriptors or memory.
                After any of these the connection is closed.
        """
        self._check_open()
        core = self._core
        # The peer may be silent for hours between messages, but not inside one.
        deadline = Deadline(None)
        try:
            while True:
                wanted = core.wanted
                if not wanted:
                    return core.next()
                partial = core.partial
                if partial and deadline.seconds is None and self.timeout is not None:
                    deadline = Deadline(self.timeout)
                data, fds = self._transport.receive(wanted, partial, deadline)
                if not data:
                    if partial:
                        raise ConnectionClosed(
                            "the peer closed the connection inside a message", partial=partial
                        )
                    return None
                core.receive(data, fds)
        except (ProtocolError, OSError):
            self.close()
            raise

    def reply(self, received: Received, message: Reply, fds: Sequence[FdLike] = ()) -> None:
        """Answer a request.

        Args:
            received: the request.
            message: an instance of one of ``received.answers``.
            fds: descriptors to pass; they stay the caller's.

        Raises:
            LocalProtocolError: this request has another answer, none, or has had it.
            ConnectionClosed, Timeout: the peer does not take it; the connection is closed.
        """
        with self._lock:
            self._check_open()
            self._send(self._core.reply(received, message, fds))

    def acknowledge(self, received: Received, ok: bool) -> bool:
        """Answer with an Ack if one is due; do nothing otherwise.

        It is due when the request asked for one and REPLY_ACK is negotiated, or when an Ack is the
        request's own answer, and none was sent.

        Returns:
            whether one was sent.

        Raises:
            ConnectionClosed, Timeout: the peer does not take it; the connection is closed.
        """
        with self._lock:
            self._check_open()
            outgoing = self._core.acknowledge(received, ok)
            if outgoing is None:
                return False
            self._send(outgoing)
            return True

    def _send(self, outgoing: Outgoing) -> None:
        try:
            self._transport.send(outgoing, Deadline(self.timeout))
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the socket and every descriptor that was not taken.  Can be called again."""
        super().close()
        self._core.close()
