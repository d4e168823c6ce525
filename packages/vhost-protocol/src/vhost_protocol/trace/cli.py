"""``vhost-trace``: look at the traffic between a front-end and a back-end, live or recorded."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import selectors
import signal
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, Any, NamedTuple, TextIO

from ..errors import DescriptorsLost
from ..fds import OwnedFd, close_all
from ..messages.constants import HEADER_SIZE, MAX_FDS, MAX_GPU_PAYLOAD_SIZE, FrontendRequest
from ..messages.message import BIG, LITTLE, NATIVE
from ..rules.codec import decode_header
from ..sockets.raw import try_receive, try_send
from .tracer import CHANNELS, Tracer, format_text, to_json

_FORMAT = "vhost-trace"
_VERSION = 1
_ORDERS = {"little": LITTLE, "big": BIG}
#: Requests that pass another socket, which is traced too.
_SOCKETS = {
    FrontendRequest.SET_BACKEND_REQ_FD: "backend",
    FrontendRequest.GPU_SET_SOCKET: "gpu",
}


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


def describe_fd(fd: int) -> str:
    """Say in a word what a descriptor is."""
    try:
        target = os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return "?"
    mode = os.fstat(fd).st_mode
    if stat.S_ISSOCK(mode):
        return "socket"
    if stat.S_ISFIFO(mode):
        return "pipe"
    return target.removeprefix("anon_inode:").removeprefix("/").removesuffix(" (deleted)")


class _Pipe:
    """One direction of one socket: reads a message, shows it, passes it on whole."""

    def __init__(self, source: socket.socket, sink: socket.socket, show: _Show) -> None:
        self.source = source
        self.sink = sink
        self._show = show
        self._in = bytearray()
        self._fds: list[OwnedFd] = []
        self._out = memoryview(b"")
        self._out_fds: list[OwnedFd] = []
        self._opaque = False
        self.ended = False
        self.lost: str | None = None

    @property
    def sending(self) -> bool:
        """Whether something waits to be passed on; nothing is read meanwhile."""
        return bool(self._out)

    def pump(self) -> None:
        """Read and write until the sockets would block."""
        try:
            while not self.ended:
                if self._out:
                    self._flush()
                elif not self._read():
                    return
        except BlockingIOError:
            return
        except OSError:
            self.ended = True

    def _flush(self) -> None:
        numbers = [fd.fileno() for fd in self._out_fds]
        sent = try_send(self.sink, self._out, numbers)
        self._out = self._out[sent:]
        close_all(self._out_fds)

    def _read(self) -> bool:
        if self._opaque:
            wanted = 65536
        elif len(self._in) < HEADER_SIZE:
            wanted = HEADER_SIZE - len(self._in)
        else:
            wanted = HEADER_SIZE + self._size() - len(self._in)
        try:
            # Descriptors inside a message are against the rules, but passed on all the same.
            data, fds = try_receive(self.source, min(wanted, 1 << 20))
        except DescriptorsLost as error:
            self.lost = str(error)
            self.ended = True
            return False
        self._fds += [OwnedFd(fd) for fd in fds]
        if not data:
            self.ended = True
            if self._in:
                self._pass_on()
                with contextlib.suppress(OSError):
                    self._flush()
            return False
        self._in += data
        if self._opaque:
            self._pass_on()
        elif len(self._in) >= HEADER_SIZE:
            size = self._size()
            if size > MAX_GPU_PAYLOAD_SIZE:
                # Not a message of any protocol we know: no use in waiting for its end.
                self._show_now(bytes(self._in))
                self._opaque = True
                self._pass_on()
            elif len(self._in) == HEADER_SIZE + size:
                self._show_now(bytes(self._in))
                self._pass_on()
        return True

    def _size(self) -> int:
        return decode_header(self._in[:HEADER_SIZE], NATIVE).size

    def _show_now(self, data: bytes) -> None:
        self._fds = self._show(data, self._fds)

    def _pass_on(self) -> None:
        self._out = memoryview(bytes(self._in))
        self._in.clear()
        self._out_fds, self._fds = self._fds[:MAX_FDS], []

    def close(self) -> None:
        """Close what is held; the sockets are closed by their owner."""
        close_all(self._fds)
        close_all(self._out_fds)


_Show = Callable[[bytes, list[OwnedFd]], list[OwnedFd]]


class Proxy:
    """Sits between front-ends that connect to one path and a back-end that listens on another."""

    def __init__(
        self, listen: str, connect: str, printer: Printer, recording: TextIO | None
    ) -> None:
        self._connect = connect
        self._printer = printer
        self._recording = recording
        self._start = time.monotonic()
        self._selector = selectors.DefaultSelector()
        self._pipes: dict[int, list[_Pipe]] = {}
        self._sockets: dict[int, list[socket.socket]] = {}
        self._connections = 0
        self._path = listen
        self._listener = _listen(listen)
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
            for key, _ in self._selector.select():
                if key.fileobj is self._stop_read:
                    return
                if key.fileobj is self._listener:
                    self._accept()
            for number in list(self._pipes):
                self._work(number)
                if once and not self._pipes and self._connections:
                    return

    def _now(self) -> float:
        # In whole microseconds, as recordings have it: what is printed live and later is the same.
        return round(time.monotonic() - self._start, 6)

    def _accept(self) -> None:
        front, _ = self._listener.accept()
        self._connections += 1
        number = self._connections
        back = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            back.connect(self._connect)
        except OSError as error:
            front.close()
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

            self._pipes[number].append(_Pipe(source, sink, show))

    def _show(
        self, number: int, channel: str, from_frontend: bool, data: bytes, fds: list[OwnedFd]
    ) -> list[OwnedFd]:
        words = tuple([describe_fd(fd.fileno()) for fd in fds])
        record = Record(self._now(), number, channel, from_frontend, data, words)
        if self._recording is not None:
            write_record(self._recording, record)
            self._recording.flush()
        self._printer.record(record)
        if channel == "main" and from_frontend and len(fds) == 1 and words[0] == "socket":
            code = decode_header(data[:HEADER_SIZE], NATIVE).code
            other = _SOCKETS.get(FrontendRequest(code)) if code in _SOCKETS else None
            if other is not None:
                return [self._interpose(number, other, fds[0])]
        return fds

    def _interpose(self, number: int, channel: str, fd: OwnedFd) -> OwnedFd:
        """Keep the socket that was passed and pass one of ours instead."""
        front = socket.socket(fileno=fd.detach())
        ours, theirs = socket.socketpair()
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

    def _end_channel(self, number: int, ended: _Pipe) -> None:
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
    """Whether ``path`` is a socket nobody listens on any more."""
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.connect(path)
    except ConnectionRefusedError:
        return True
    except OSError:
        return False
    return False


def replay(file: IO[str], out: TextIO, *, as_json: bool) -> int:
    """Print a recording; return how many rules were broken.

    Raises:
        TraceError: it is not a recording, or is damaged.
    """
    order, records = read_records(file)
    printer = Printer(out, as_json=as_json, order=order)
    for record in records:
        printer.record(record)
    return printer.violations


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="vhost-trace",
        description="Show the vhost-user messages between a front-end and a back-end.",
        epilog="The front-end connects to --listen; the back-end listens on --connect.  With"
        " --read the exit status is 1 when a rule was broken, 2 when the recording cannot be read,"
        " else 0.",
    )
    made.add_argument("--listen", metavar="SOCKET", help="socket to make for the front-end")
    made.add_argument("--connect", metavar="SOCKET", help="socket of the back-end")
    made.add_argument("--write", metavar="FILE", help="record the traffic as well")
    made.add_argument("--read", metavar="FILE", help="show a recording (- is standard input)")
    made.add_argument("--json", action="store_true", help="print a line of JSON for each message")
    made.add_argument("--once", action="store_true", help="end with the first connection")
    return made


def main(argv: list[str] | None = None) -> int:
    """Run ``vhost-trace``; return its exit status."""
    arguments = parser()
    options = arguments.parse_args(argv)
    live = options.listen is not None and options.connect is not None
    if live == (options.read is not None) or (options.read and (options.listen or options.connect)):
        arguments.error("either --listen and --connect, or --read")
    if live and options.listen == options.connect:
        arguments.error("--listen and --connect are two sockets")
    if options.read and options.write:
        arguments.error("--write records live traffic; it does not go with --read")
    try:
        if options.read is None:
            return _trace(options)
        if options.read == "-":
            return 1 if replay(sys.stdin, sys.stdout, as_json=options.json) else 0
        with open(options.read, encoding="utf-8") as file:
            return 1 if replay(file, sys.stdout, as_json=options.json) else 0
    except BrokenPipeError:
        # Whoever read our output has enough; keep the interpreter from writing more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        what = f"{error.filename}: {error.strerror}" if error.filename else f"{error}"
        print(f"vhost-trace: {what}", file=sys.stderr)
        return 2
    except (TraceError, UnicodeDecodeError) as error:
        print(f"vhost-trace: {error}", file=sys.stderr)
        return 2


def _trace(options: argparse.Namespace) -> int:
    with contextlib.ExitStack() as stack:
        recording = None
        if options.write is not None:
            recording = stack.enter_context(open(options.write, "w", encoding="utf-8"))
        printer = Printer(sys.stdout, as_json=options.json)
        proxy = Proxy(options.listen, options.connect, printer, recording)
        stack.callback(proxy.close)
        for number in (signal.SIGTERM, signal.SIGINT):
            old = signal.signal(number, lambda *_: proxy.stop())
            stack.callback(signal.signal, number, old)
        proxy.run(once=options.once)
    return 0
