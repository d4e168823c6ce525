"""A file whose reads and writes can be held up, as storage that hangs would hold them.

It is a FUSE file system of one file, mounted over a file that exists already, and served by a
process of its own: what waits for it is let go when that process ends, whatever a test does.
Mounting needs root and /dev/fuse.
"""

import contextlib
import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

# The part of the kernel's FUSE interface (linux/fuse.h, version 7.31) that one file needs.
IN_HEADER = struct.Struct("<IIQQIIIHH")  # length, opcode, unique, node, uid, gid, pid, ...
OUT_HEADER = struct.Struct("<IiQ")  # length, error, unique
ATTRIBUTES = struct.Struct("<QII6Q10I")  # how long it is valid, and the attributes
INIT_OUT = struct.Struct("<IIIIHHIIHHI7I")
OPEN_OUT = struct.Struct("<QII")
TRANSFER_IN = struct.Struct("<QQIIQII")  # handle, offset, size, ...
FORGET, GETATTR, SETATTR, OPEN, READ, WRITE, STATFS, RELEASE = 2, 3, 4, 14, 15, 16, 17, 18
FSYNC, FLUSH, INIT, INTERRUPT, DESTROY, BATCH_FORGET = 20, 25, 26, 36, 38, 42
DIRECT_IO = 1
BUFFER = 1 << 20
MNT_DETACH = 2

LARGEST_WRITE = 1 << 17


class HeldFile:
    """Such a file at `path`, full of `content`, for as long as the context lasts."""

    def __init__(self, path: Path, content: bytes) -> None:
        self.path = path
        path.write_bytes(content)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.ask("ready")

    @staticmethod
    def reason_against() -> str | None:
        """Why there can be none here, or None."""
        if os.geteuid():
            return "mounting a FUSE file needs root"
        try:
            os.close(os.open("/dev/fuse", os.O_RDWR))
        except OSError as error:
            return f"/dev/fuse: {error.strerror}"
        return None

    def ask(self, command: str) -> str:
        """Send a command to the server; its answer."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(command + "\n")
        self._server.stdin.flush()
        answer = self._server.stdout.readline()
        if not answer:
            raise OSError("the file's server has ended")
        return answer.strip()

    def hold(self) -> None:
        """Hold up reads and writes from here on."""
        self.ask("hold")

    def release(self) -> None:
        """Let go what was held up, and whatever comes."""
        self.ask("release")

    def held(self) -> int:
        """How many reads and writes are held up."""
        return int(self.ask("held"))

    def wait_held(self, count: int = 1) -> None:
        """Wait until so many reads and writes are held up."""
        deadline = time.monotonic() + 60
        while self.held() < count:
            assert time.monotonic() < deadline, "nothing reached the file"
            time.sleep(0.01)

    def peek(self, offset: int, length: int) -> bytes:
        """What the file holds, past the file system."""
        return bytes.fromhex(self.ask(f"peek {offset} {length}"))

    def close(self) -> None:
        """Unmount; what is held up fails."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        with contextlib.suppress(OSError):
            self._server.stdin.close()
        self._server.wait(60)
        self._server.stdout.close()

    def __enter__(self) -> "HeldFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


# -- the server's process --------------------------------------------------------------------------


class Server:
    """Answers the kernel on /dev/fuse, and commands on standard input."""

    def __init__(self, path: str) -> None:
        with open(path, "rb") as file:
            self.content = bytearray(file.read())
        self.holding = False
        self.waiting: list[tuple[int, int, bytes]] = []
        self.fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)

    def serve(self) -> None:
        poller = select.poll()
        poller.register(self.fuse, select.POLLIN)
        poller.register(0, select.POLLIN)
        while True:
            for fd, events in poller.poll():
                if fd == self.fuse:
                    if not events & select.POLLIN:
                        return
                    self.answer_kernel()
                elif not self.answer_test():
                    return

    def answer_test(self) -> bool:
        line = sys.stdin.readline()
        command, *rest = line.split() or [""]
        answer = "done"
        if command == "hold":
            self.holding = True
        elif command == "release":
            self.holding = False
            waiting, self.waiting = self.waiting, []
            for unique, opcode, body in waiting:
                self.transfer(unique, opcode, body)
        elif command == "held":
            answer = str(len(self.waiting))
        elif command == "peek":
            offset, length = map(int, rest)
            answer = self.content[offset : offset + length].hex()
        elif command != "ready":
            return False
        print(answer, flush=True)
        return True

    def answer_kernel(self) -> None:
        message = os.read(self.fuse, BUFFER)
        _, opcode, unique, *_ = IN_HEADER.unpack_from(message)
        body = message[IN_HEADER.size :]
        if opcode in (READ, WRITE):
            if self.holding:
                self.waiting.append((unique, opcode, body))
            else:
                self.transfer(unique, opcode, body)
        elif opcode == INIT:
            zeroes = [0] * 7
            self.reply(
                unique, INIT_OUT.pack(7, 31, 0, 0, 16, 12, LARGEST_WRITE, 1, 0, 0, 0, *zeroes)
            )
        elif opcode in (GETATTR, SETATTR):
            size = len(self.content)
            times = [0] * 3
            mode = 0o100644
            self.reply(
                unique,
                ATTRIBUTES.pack(
                    *(1, 0, 0), *(1, size, -(-size // 512), *times), *times, mode, *([1] + [0] * 5)
                ),
            )
        elif opcode == OPEN:
            self.reply(unique, OPEN_OUT.pack(0, DIRECT_IO, 0))
        elif opcode in (FLUSH, FSYNC, RELEASE, DESTROY):
            self.reply(unique, b"")
        elif opcode == STATFS:
            self.reply(unique, bytes(80))
        elif opcode == INTERRUPT:
            # Whoever waits is being killed: let it go, as a network's storage does.
            (killed,) = struct.unpack_from("<Q", body)
            for entry in self.waiting:
                if entry[0] == killed:
                    self.waiting.remove(entry)
                    self.reply(killed, b"", -errno.EINTR)
                    break
        elif opcode not in (FORGET, BATCH_FORGET):
            self.reply(unique, b"", -errno.ENOSYS)

    def transfer(self, unique: int, opcode: int, body: bytes) -> None:
        _, offset, size, *_ = TRANSFER_IN.unpack_from(body)
        if opcode == READ:
            self.reply(unique, bytes(self.content[offset : offset + size]))
        else:
            self.content[offset : offset + size] = body[TRANSFER_IN.size : TRANSFER_IN.size + size]
            self.reply(unique, struct.pack("<II", size, 0))

    def reply(self, unique: int, data: bytes, error: int = 0) -> None:
        with contextlib.suppress(FileNotFoundError):  # whoever asked has been killed
            os.write(self.fuse, OUT_HEADER.pack(OUT_HEADER.size + len(data), error, unique) + data)


@contextlib.contextmanager
def mounted(path: str, fuse: int) -> Iterator[None]:
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={fuse},rootmode=100000,user_id=0,group_id=0"
    if libc.mount(b"held", path.encode(), b"fuse", 0, options.encode()):
        raise OSError(ctypes.get_errno(), "mount")
    try:
        yield
    finally:
        libc.umount2(path.encode(), MNT_DETACH)


def main() -> None:
    path = sys.argv[1]
    server = Server(path)
    with mounted(path, server.fuse):
        server.serve()


if __name__ == "__main__":
    main()
