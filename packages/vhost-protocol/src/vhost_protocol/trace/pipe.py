"""One direction of one socket of a traced connection."""

from __future__ import annotations

import os
import socket
import stat
from collections.abc import Callable

from ..errors import ConnectionClosed, DescriptorsLost
from ..fds import OwnedFd, close_all
from ..messages.constants import HEADER_SIZE, MAX_FDS, MAX_GPU_PAYLOAD_SIZE
from ..messages.message import NATIVE
from ..rules.codec import decode_header
from ..sockets.raw import try_receive, try_send, whose


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


class Pipe:
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
        self.ended: bool = False
        self.lost: str | None = None

    @property
    def sending(self) -> bool:
        """Whether something waits to be passed on; nothing is read meanwhile."""
        return bool(self._out)

    def pump(self) -> None:
        """Read and write until the sockets would block.

        Errors of the sockets end the pipe; errors of showing a message are raised.
        """
        more = True
        while more and not self.ended:
            more = self._flush() if self._out else self._read()

    def _flush(self) -> bool:
        numbers = [fd.fileno() for fd in self._out_fds]
        try:
            sent = try_send(self.sink, self._out, numbers)
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(whose(error))
            return False
        self._out = self._out[sent:]
        close_all(self._out_fds)
        return True

    def _end(self, error: Exception) -> None:
        self.ended = True
        # A peer that leaves is no news; any other end is.
        if not isinstance(error, ConnectionClosed):
            self.lost = str(error)

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
        except BlockingIOError:
            return False
        except OSError as error:
            self._end(whose(error))
            return False
        except DescriptorsLost as error:
            self._end(error)
            return False
        self._fds += [OwnedFd(fd) for fd in fds]
        if not data:
            self.ended = True
            if self._in:
                self._pass_on()
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
        """Close the descriptors held; the proxy closes the sockets."""
        close_all(self._fds)
        close_all(self._out_fds)


_Show = Callable[[bytes, list[OwnedFd]], list[OwnedFd]]
