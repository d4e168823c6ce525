"""Every request of the front-end, wrong in every way: an answer or a closed connection.

The table of the protocol package says which requests there are. Each is sent raw, in the wrong
state, of the wrong size, with too few or too many descriptors, and with values that mean nothing;
afterwards the daemon serves the next front-end, and holds no descriptor more than before.
"""

import os
import socket
import struct
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

import pytest

import vhost_protocol as vp
from vhost_backend import DeviceBackend, Listener, QueueInfo, Request, VhostUserDaemon, VirtioDevice
from vhost_backend.testing import DriverSession, serving

HEADER = struct.Struct("<III")
VERSION, REPLY, NEED_REPLY = 1, 4, 8
EVERYTHING = 1 << 30 | 1 << 32 | 1 << 33


class Shape(NamedTuple):
    """A request's payload size and the descriptors that belong to it."""

    size: int
    fds: int = 0


SHAPES = {
    1: Shape(0), 2: Shape(8), 3: Shape(0), 4: Shape(0), 5: Shape(40, 1), 6: Shape(16, 1),
    7: Shape(0, 1), 8: Shape(8), 9: Shape(40), 10: Shape(8), 11: Shape(8), 12: Shape(8, 1),
    13: Shape(8, 1), 14: Shape(8, 1), 15: Shape(0), 16: Shape(8), 17: Shape(0), 18: Shape(8),
    19: Shape(8), 20: Shape(8), 21: Shape(0, 1), 22: Shape(32), 23: Shape(8), 24: Shape(20),
    25: Shape(20), 26: Shape(1072), 27: Shape(8), 28: Shape(0), 29: Shape(0), 30: Shape(0),
    31: Shape(24), 32: Shape(24, 1), 33: Shape(0, 1), 34: Shape(0), 35: Shape(8), 36: Shape(0),
    37: Shape(40, 1), 38: Shape(40), 39: Shape(8), 40: Shape(0), 41: Shape(16), 42: Shape(8, 1),
    43: Shape(0), 44: Shape(0), 45: Shape(8),
}  # fmt: skip
CODES = sorted(vp.FRONTEND_TABLE.rules)


class Everything(VirtioDevice):
    """Has every hook there is, so that every message that can be offered is."""

    device_id = 40
    num_queues = 2
    config = b"configuration"

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())

    def save_state(self) -> bytes:
        return b"state"

    def load_state(self, version: int, state: bytes) -> None:
        pass

    def send_rarp(self, mac: bytes) -> None:
        pass

    def net_set_mtu(self, mtu: int) -> None:
        pass

    def create_crypto_session(self, op_code: int, session: object) -> int:
        return 1

    def close_crypto_session(self, session_id: int) -> None:
        pass

    def get_shared_object(self, uuid: bytes) -> int | None:
        return None

    def get_shmem_config(self) -> list[int]:
        return []

    def set_gpu_socket(self, channel: vp.GpuBackendChannel) -> None:
        channel.close()


@pytest.fixture(scope="module", params=[True, False], ids=["slots", "postcopy"])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    """One daemon for all of it."""
    with (
        tempfile.TemporaryDirectory(prefix="vhost-") as folder,
        Listener(os.path.join(folder, "s")) as listener,
        VhostUserDaemon(
            "test", DeviceBackend.of(Everything()), memory_slots=request.param, drain_warning=1.0
        ) as daemon,
    ):
        assert listener.path is not None
        with serving(daemon, listener):
            yield listener.path


def message(code: int, payload: bytes, flags: int = VERSION | NEED_REPLY) -> bytes:
    return HEADER.pack(code, flags, len(payload)) + payload


class Raw:
    """A front-end that knows no rules."""

    def __init__(self, path: str) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(60)
        self.socket.connect(path)

    def negotiate(self) -> None:
        """Accept all that is offered."""
        self.send(message(3, b"", VERSION))
        (offered,) = struct.unpack("<Q", self.ask(15, b""))
        (features,) = struct.unpack("<Q", self.ask(1, b""))
        # Without what forbids other messages, or makes a connection do without answers.
        offered &= ~(int(vp.ProtocolFeatures.XEN_MMAP))
        self.send(message(16, struct.pack("<Q", offered), VERSION))
        self.send(message(2, struct.pack("<Q", features & EVERYTHING), VERSION))

    def send(self, data: bytes, fds: int = 0) -> None:
        files = [os.memfd_create("anything") for _ in range(fds)]
        for file in files:
            os.ftruncate(file, 1 << 16)
        try:
            socket.send_fds(self.socket, [data], files)
        finally:
            for file in files:
                os.close(file)

    def answer(self) -> tuple[int, int, bytes] | None:
        """The next (code, flags, payload), or None when the connection was closed."""
        try:
            head = self._exactly(HEADER.size)
            if head is None:
                return None
            code, flags, size = HEADER.unpack(head)
            payload = self._exactly(size)
        except ConnectionResetError:
            return None
        assert payload is not None
        return code, flags, payload

    def _exactly(self, size: int) -> bytes | None:
        data = b""
        while len(data) < size:
            piece, fds, _, _ = socket.recv_fds(self.socket, size - len(data), 8)
            for fd in fds:
                os.close(fd)
            if not piece:
                return None
            data += piece
        return data

    def ask(self, code: int, payload: bytes) -> bytes:
        self.send(message(code, payload, VERSION))
        answer = self.answer()
        assert answer is not None
        assert answer[0] == code
        return answer[2]

    def outcome(self, data: bytes, fds: int = 0) -> str:
        """Send `data`: "closed", "silent", or "answered" before a question that is legal."""
        try:
            self.send(data, fds)
            self.send(message(1, b"", VERSION))
        except (BrokenPipeError, ConnectionResetError):
            return "closed"
        answer = self.answer()
        if answer is None:
            return "closed"
        code = HEADER.unpack_from(data)[0]
        assert answer[1] & (VERSION | REPLY) == VERSION | REPLY
        if code == 1:
            return "answered"
        if answer[0] == 1:
            return "silent"
        assert answer[0] == code
        return "answered"

    def __enter__(self) -> "Raw":
        return self

    def __exit__(self, *exc: object) -> None:
        self.socket.close()


def next_front_end(path: str) -> None:
    with DriverSession.connect(path) as session:
        source, target = session.allocate(4), session.allocate(4)
        session.memory.write(source, b"next")
        session.vrings[0].submit([(source, 4)], [(target, 4)])
        session.vrings[0].kick()
        session.vrings[0].completions()
        assert session.memory.read(target, 4) == b"next"


def test_there_is_a_shape_for_every_request() -> None:
    assert sorted(SHAPES) == CODES


def held(path: str) -> int:
    """Descriptors of this process while one front-end is served that has sent nothing.

    It is served when all those before it have been let go of.
    """
    with Raw(path) as raw:
        raw.ask(1, b"")
        return len(os.listdir("/proc/self/fd"))


def check(path: str, wrong: "list[tuple[int, bytes, int, set[str]]]", negotiate: bool) -> None:
    next_front_end(path)
    before = held(path)
    found = []
    for code, data, fds, expected in wrong:
        with Raw(path) as raw:
            if negotiate:
                raw.negotiate()
            outcome = raw.outcome(data, fds)
        if outcome not in expected:
            found.append((vp.FRONTEND_TABLE.rules[code].name, outcome, expected))
    next_front_end(path)
    assert found == []
    assert held(path) <= before


def test_before_anything_is_negotiated(path: str) -> None:
    """What needs a feature ends the connection; what brings nonsense is refused or ends it."""
    wrong = []
    for code in CODES:
        rule, shape = vp.FRONTEND_TABLE.rules[code], SHAPES[code]
        expected = {"closed"} if rule.needs else {"closed", "answered", "silent"}
        wrong.append((code, message(code, bytes(shape.size)), shape.fds, expected))
    check(path, wrong, negotiate=False)


@pytest.mark.parametrize("change", [1, -1])
def test_of_the_wrong_size(path: str, change: int) -> None:
    wrong = []
    for code in CODES:
        shape = SHAPES[code]
        if shape.size + change >= 0:
            data = message(code, bytes(shape.size + change))
            wrong.append((code, data, shape.fds, {"closed"}))
    check(path, wrong, negotiate=True)


def test_with_descriptors_that_are_missing(path: str) -> None:
    wrong = []
    for code in CODES:
        shape = SHAPES[code]
        if shape.fds:
            payload = bytes(shape.size)
            if code == 5:
                payload = struct.pack("<II4Q", 1, 0, 0, 4096, 0, 0)
            # Without a descriptor SET_LOG_BASE is one for a log that is no shared memory.
            expected = {"closed", "answered"} if code == 6 else {"closed"}
            wrong.append((code, message(code, payload), 0, expected))
    check(path, wrong, negotiate=True)


def test_with_descriptors_that_are_too_many(path: str) -> None:
    wrong = []
    for code in CODES:
        shape = SHAPES[code]
        wrong.append((code, message(code, bytes(shape.size)), shape.fds + 3, {"closed"}))
    check(path, wrong, negotiate=True)


@pytest.mark.parametrize("flags", [0, 2, 3, VERSION | REPLY, VERSION | 16, VERSION | 1 << 31])
def test_with_wrong_flags(path: str, flags: int) -> None:
    wrong = [
        (code, message(code, bytes(SHAPES[code].size), flags), SHAPES[code].fds, {"closed"})
        for code in CODES
    ]
    check(path, wrong, negotiate=True)


@pytest.mark.parametrize("fill", [b"\0", b"\1", b"\x7f", b"\xff"], ids=lambda fill: fill.hex())
def test_with_values_that_mean_nothing(path: str, fill: bytes) -> None:
    """Where an answer was asked for there is one, or the connection ends: never silence."""
    wrong = []
    for code in CODES:
        shape = SHAPES[code]
        data = message(code, fill * shape.size)
        expected = {"closed", "answered"}
        if code == 16 and fill == b"\0":
            expected.add("silent")  # it takes the answers away
        wrong.append((code, data, shape.fds, expected))
        if shape.fds:
            wrong.append((code, data, 0, expected))
    check(path, wrong, negotiate=True)


@pytest.mark.parametrize("index", [2, 255, 256, 0xFFFF_FFFF])
def test_for_a_ring_that_is_not_there(path: str, index: int) -> None:
    wrong = []
    for code in (8, 9, 10, 11, 18, 23, 35, 45):
        payload = struct.pack("<I", index).ljust(SHAPES[code].size, b"\0")
        wrong.append((code, message(code, payload), 0, {"closed", "answered"}))
    for code in (12, 13, 14):
        payload = struct.pack("<Q", index & 0xFF)
        expected = {"closed", "answered"}
        wrong.append((code, message(code, payload), int(index & 0xFF != 0), expected))
    check(path, wrong, negotiate=True)


def test_codes_that_do_not_exist(path: str) -> None:
    for code in (0, 46, 47, 1000, 0xFFFF_FFFF):
        with Raw(path) as raw:
            raw.negotiate()
            assert raw.outcome(message(code, b"")) == "closed"
    next_front_end(path)
