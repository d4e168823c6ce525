"""The conversation of a daemon with one front-end: messages, answers, and waits for the device.

It is written once for both kinds of daemon. Wherever the conversation waits, it awaits a method of
its `Line`. In an event loop the task sleeps there. In a daemon with threads the method blocks and
never suspends, so `run` finishes the coroutine in one step.
"""

from __future__ import annotations

import contextlib
import enum
import os
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import vhost_protocol as vp

from ..control import Answer, ControlPlane, Outcome, Wait
from ..errors import Refused
from .waiting import ReadAhead, Remains, WaitLog

T = TypeVar("T")

#: Seconds that a front-end may leave answers unread once its socket is full. Without this limit it
#: could keep the daemon from ending.
ANSWER_PATIENCE = 10.0


class Seen(enum.Enum):
    """The result of a look at the connection."""

    NOTHING = enum.auto()
    MESSAGE = enum.auto()
    HANG_UP = enum.auto()


class Line(Protocol):
    """One connection, and the ways in which its conversation waits."""

    @property
    def closed(self) -> bool:
        """Whether the connection has ended here."""

    @property
    def stopping(self) -> bool:
        """Whether the daemon was told to end."""

    async def look(self, seconds: float | None, *, reading: bool) -> Seen:
        """Sleep until the device makes progress, `seconds` are over, or the front-end does
        something.

        A message ends the sleep only with `reading`. A hang-up is reported even when unread
        messages come before it.
        """

    async def receive(self) -> vp.Received | None:
        """The next message; None when the front-end has hung up or the daemon ends."""

    async def handle(self, received: vp.Received) -> Outcome:
        """Have the control plane apply the message."""

    async def reply(
        self, received: vp.Received, message: vp.Reply, fds: Sequence[vp.FdLike]
    ) -> None:
        """Answer with a reply of the request's own kind."""

    async def acknowledge(self, received: vp.Received, ok: bool) -> bool:
        """Answer with an Ack where one is due; returns whether it was due."""


class Conversation:
    """The messages of one front-end, in their order, until it hangs up or the daemon ends.

    Args:
        control: applies the messages.
        line: the connection.
        remains: the requests of the last front-end that have not ended.
        wait_log: makes the log of a wait, from the name of the wait and the rings it waits for.
        refused: called with a refusal that the front-end got as its answer.
    """

    def __init__(
        self,
        control: ControlPlane,
        line: Line,
        remains: Remains,
        wait_log: Callable[[str, Callable[[], Sequence[int]]], WaitLog],
        refused: Callable[[Refused], None],
    ) -> None:
        self._control = control
        self._line = line
        self._remains = remains
        self._wait_log = wait_log
        self._refused = refused
        self._ahead = ReadAhead()

    async def hold(self) -> None:
        """Handle messages until the conversation ends."""
        while not self._line.stopping:
            received = self._ahead.next() or await self._next()
            if received is None or not await self._serve(received):
                return

    async def finish_requests(self, failed: Callable[[], bool]) -> None:
        """When the daemon ends before the front-end, wait until the front-end's requests end.

        The wait stops once `failed()`: a worker has failed, and its requests will not end.
        """
        ended = self._control.end_requests()
        report = self._wait_log("the end of the daemon", self._control.rings)
        while not (failed() or self._line.closed or ended()):
            if await self._look(report, reading=False) is Seen.HANG_UP:
                return
        report.end()

    def close(self) -> None:
        """Close the descriptors of messages that were read and not handled."""
        self._ahead.close()

    async def _next(self) -> vp.Received | None:
        """The next message. Meanwhile look at the last front-end's requests, and at memory."""
        while True:
            due = [self._remains.look(), self._control.memory_due]
            seconds = min((left for left in due if left is not None), default=None)
            if seconds is None:  # there is nothing to do before the message comes
                return await self._line.receive()
            if await self._line.look(seconds, reading=True) is not Seen.NOTHING:
                return await self._line.receive()
            if self._line.stopping:
                return None
            self._control.look_at_memory()

    async def _serve(self, received: vp.Received) -> bool:
        """Handle one message and answer it; False when the conversation has ended meanwhile."""
        line = self._line
        with received:
            try:
                outcome = await line.handle(received)
            except Refused as error:
                return await self._refuse(received, error)
            if isinstance(outcome, Wait):
                if not await self._wait_for(outcome):
                    return False
                try:
                    outcome = outcome.finish()
                except Refused as error:
                    return await self._refuse(received, error)
            if isinstance(outcome, Answer):
                try:
                    await line.reply(received, outcome.message, outcome.fds)
                finally:
                    _close_lent(outcome)
            else:
                await line.acknowledge(received, True)
            return True

    async def _refuse(self, received: vp.Received, error: Refused) -> bool:
        """Answer that the message was refused; raises `error` where it has no such answer."""
        if not await self._line.acknowledge(received, False):
            raise error  # then only a hang-up can refuse it
        self._refused(error)
        return True

    async def _wait_for(self, wait: Wait) -> bool:
        """Wait until the device has ended the requests that a message waits for.

        False when the front-end hangs up first, or the daemon is told to end.
        """
        report = self._wait_log(wait.what, lambda: wait.rings)
        while not wait.ready():
            if self._line.stopping:
                return False
            seen = await self._look(report, reading=not self._ahead.full, every=wait.every)
            if seen is Seen.HANG_UP:
                return False
            if seen is Seen.MESSAGE:
                received = await self._line.receive()
                if received is None:
                    return False
                if self._ahead.goes_first(received) and not await self._serve(received):
                    return False
        report.end()
        return True

    async def _look(self, report: WaitLog, *, reading: bool, every: float | None = None) -> Seen:
        seconds = report.left if every is None else min(report.left, every)
        seen = await self._line.look(seconds, reading=reading)
        self._control.settle()
        report.look()
        return seen


@contextlib.contextmanager
def answering(connection: vp.BackendConnection | vp.AsyncBackendConnection) -> Iterator[None]:
    """Limit the time that sending an answer may take; receiving has no limit."""
    connection.timeout = ANSWER_PATIENCE
    try:
        yield
    finally:
        connection.timeout = None


def run(coroutine: Coroutine[Any, Any, T]) -> T:
    """Finish a coroutine whose awaits block and never suspend."""
    try:
        coroutine.send(None)
    except StopIteration as end:
        result: T = end.value
        return result
    raise AssertionError("this line does not block")


def _close_lent(answer: Answer) -> None:
    """Close the descriptors of an answer that was sent, if they are ours to close."""
    if answer.close:
        for fd in answer.fds:
            os.close(fd)
