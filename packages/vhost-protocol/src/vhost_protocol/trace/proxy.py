"""Between front-ends that connect to one path and a back-end that listens on another."""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import stat
import time
from typing import TextIO

from ..fds import OwnedFd
from ..messages.constants import HEADER_SIZE, FrontendRequest
from ..messages.message import NATIVE
from ..rules.codec import decode_header
from .pipe import Pipe, describe_fd
from .recording import Record, TraceError, header_line, write_record
from .show import Printer

#: Requests that pass another socket, which is traced too.
_SOCKETS = {
    FrontendRequest.SET_BACKEND_REQ_FD: "backend",
    FrontendRequest.GPU_SET_SOCKET: "gpu",
}


#: Seconds after which a front-end that could not be accepted is tried again.
_RETRY = 0.2


class Proxy:
    """Passes messages on between front-ends and a back-end, and shows them.

    Args:
        listen: path of the socket to make for front-ends.
        connect: path of the socket on which the back-end listens.
        printer: shows the messages.
        recording: gets them as well, or None.

    Attributes:
        recorded: False once a message could not be written to the recording.
    """

    def __init__(
        self, listen: str, connect: str, printer: Printer, recording: TextIO | None
    ) -> None:
        self._connect = connect
        self._printer = printer
        self._recording = recording
        self.recorded: bool = True
        self._start = time.monotonic()
        self._pipes: dict[int, list[Pipe]] = {}
        self._sockets: dict[int, list[socket.socket]] = {}
        self._connections = 0
        self._waiting = False
        self._path = listen
        self._listener = _listen(listen)
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ, None)
        self._stop_read, self._stop_write = socket.socketpair()
        self._stop_write.setblocking(False)
        self._selector.register(self._stop_read, selectors.EVENT_READ, None)
        if recording is not None:
            recording.write(json.dumps(header_line()) + "\n")

    def stop(self) -> None:
        """End ``run()``; may be called from a signal handler or another thread."""
        with contextlib.suppress(OSError):
            self._stop_write.send(b"x")

    def run(self, *, once: bool = False) -> None:
        """Serve until ``stop()``, or until the first connection ends."""
        while True:
            for key, _ in self._selector.select(_RETRY if self._waiting else None):
                if key.fileobj is self._stop_read:
                    return
                if key.fileobj is self._listener:
                    self._accept()
            if self._listener not in self._selector.get_map():
                self._selector.register(self._listener, selectors.EVENT_READ, None)
            for number in list(self._pipes):
                self._work(number)
                if once and not self._pipes and self._connections:
                    return

    def _now(self) -> float:
        # Whole microseconds, as in a recording: a replay prints the same lines.
        return round(time.monotonic() - self._start, 6)

    def _accept(self) -> None:
        try:
            front, _ = self._listener.accept()
        except BlockingIOError:
            return
        except OSError as error:
            # Out of descriptors, most likely: present connections go on, others wait.
            if not self._waiting:
                self._printer.note(self._now(), 0, f"a front-end has to wait: {error.strerror}")
            self._waiting = True
            self._selector.unregister(self._listener)
            return
        self._waiting = False
        self._connections += 1
        number = self._connections
        back = None
        try:
            back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            # A back-end whose queue of connections is full must not hold up those there are.
            back.setblocking(False)
            back.connect(self._connect)
        except OSError as error:
            front.close()
            if back is not None:
                back.close()
            self._printer.note(self._now(), number, f"cannot connect to the back-end: {error}")
            return
        self._pipes[number] = []
        self._sockets[number] = []
        self._printer.note(self._now(), number, "connected")
        self._add(number, "main", front, back)

    def _add(self, number: int, channel: str, front: socket.socket, back: socket.socket) -> None:
        for sock in (front, back):
            sock.setblocking(False)
            self._selector.register(sock, selectors.EVENT_READ, None)
            self._sockets[number].append(sock)
        for source, sink, from_frontend in ((front, back, True), (back, front, False)):

            def show(
                data: bytes, fds: list[OwnedFd], from_frontend: bool = from_frontend
            ) -> list[OwnedFd]:
                return self._show(number, channel, from_frontend, data, fds)

            self._pipes[number].append(Pipe(source, sink, show))

    def _show(
        self, number: int, channel: str, from_frontend: bool, data: bytes, fds: list[OwnedFd]
    ) -> list[OwnedFd]:
        words = tuple([describe_fd(fd.fileno()) for fd in fds])
        record = Record(self._now(), number, channel, from_frontend, data, words)
        self._record(record)
        self._printer.record(record)
        if channel == "main" and from_frontend and len(fds) == 1 and words[0] == "socket":
            code = decode_header(data[:HEADER_SIZE], NATIVE).code
            other = _SOCKETS.get(FrontendRequest(code)) if code in _SOCKETS else None
            if other is not None:
                return [self._interpose(number, other, fds[0])]
        return fds

    def _record(self, record: Record) -> None:
        if self._recording is None:
            return
        try:
            write_record(self._recording, record)
            self._recording.flush()
        except OSError as error:
            # A full disk is no reason to cut the connection that is traced.
            self.recorded = False
            self._recording = None
            note = f"the recording ends before this message: {error.strerror}"
            self._printer.note(record.time, record.connection, note)

    def _interpose(self, number: int, channel: str, fd: OwnedFd) -> OwnedFd:
        """Keep the socket that was passed and pass one of ours instead."""
        try:
            ours, theirs = socket.socketpair()
        except OSError as error:
            note = f"the {channel} channel is not traced: {error.strerror}"
            self._printer.note(self._now(), number, note)
            return fd
        front = socket.socket(fileno=fd.detach())
        self._add(number, channel, front, ours)
        return OwnedFd(theirs.detach())

    def _work(self, number: int) -> None:
        pipes = self._pipes[number]
        for pipe in list(pipes):
            pipe.pump()
        for pipe in list(pipes):
            if pipe.ended:
                self._end_channel(number, pipe)
        if not self._pipes[number]:
            self._printer.note(self._now(), number, "closed")
            self._printer.end(number)
            del self._pipes[number], self._sockets[number]
            return
        for sock in self._sockets[number]:
            events = 0
            for pipe in self._pipes[number]:
                if pipe.source is sock and not pipe.sending:
                    events |= selectors.EVENT_READ
                if pipe.sink is sock and pipe.sending:
                    events |= selectors.EVENT_WRITE
            self._watch(sock, events)

    def _watch(self, sock: socket.socket, events: int) -> None:
        registered = sock.fileno() in self._selector.get_map()
        if events and registered:
            self._selector.modify(sock, events, None)
        elif events:
            self._selector.register(sock, events, None)
        elif registered:
            self._selector.unregister(sock)

    def _end_channel(self, number: int, ended: Pipe) -> None:
        main = self._sockets[number][:2]
        if ended.lost is not None:
            self._printer.note(self._now(), number, ended.lost)
        sockets = [ended.source, ended.sink]
        # Without the main socket the others have no meaning.
        if ended.source in main:
            sockets = list(self._sockets[number])
        for pipe in list(self._pipes[number]):
            if pipe.source in sockets:
                pipe.close()
                self._pipes[number].remove(pipe)
        for sock in sockets:
            if sock in self._sockets[number]:
                self._sockets[number].remove(sock)
                self._watch(sock, 0)
                sock.close()

    def close(self) -> None:
        """Close everything and remove the listening socket's file."""
        for pipes in self._pipes.values():
            for pipe in pipes:
                pipe.close()
        for sockets in self._sockets.values():
            for sock in sockets:
                sock.close()
        self._selector.close()
        self._listener.close()
        self._stop_read.close()
        self._stop_write.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path)


def _listen(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        try:
            sock.bind(path)
        except OSError:
            if not _stale(path):
                raise
            os.unlink(path)
            sock.bind(path)
        sock.listen()
    except OSError as error:
        sock.close()
        raise TraceError(f"cannot listen on {path}: {error.strerror or error}") from None
    return sock


def _stale(path: str) -> bool:
    """Whether ``path`` is a socket without a listener."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)  # a full queue of connections is a listener's
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False
