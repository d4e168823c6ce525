"""Bytes to headers, payloads and messages, and back; no sockets and no negotiated state."""

from struct import Struct
from typing import NamedTuple

from ..errors import (
    BadHeader,
    BadPayload,
    BadSize,
    LocalProtocolError,
    RemoteProtocolError,
    UnexpectedReply,
    UnknownRequest,
)
from ..messages.constants import HEADER_SIZE, VERSION, HeaderFlags
from ..messages.message import BIG, LITTLE, Message, Wire
from .rule import Rule
from .table import Table

_HEADER = {o: Struct(f"{o}III") for o in (LITTLE, BIG)}
_REPLY = int(HeaderFlags.REPLY)
_NEED_REPLY = int(HeaderFlags.NEED_REPLY)
_KNOWN_FLAGS = 0xF


class Header(NamedTuple):
    """The three words before every payload.

    Attributes:
        code: request code.
        flags: version, REPLY, NEED_REPLY.
        size: payload size in bytes.
    """

    code: int
    flags: int
    size: int

    @property
    def is_reply(self) -> bool:
        """Whether the REPLY bit is set."""
        return bool(self.flags & _REPLY)

    @property
    def need_reply(self) -> bool:
        """Whether the NEED_REPLY bit is set."""
        return bool(self.flags & _NEED_REPLY)


def decode_header(data: bytes | bytearray | memoryview, order: str) -> Header:
    """Read 12 bytes as a header, without judging it."""
    return Header._make(_HEADER[order].unpack(data))


def encode_header(header: Header, order: str) -> bytes:
    """Write a header."""
    return _HEADER[order].pack(*header)


def find_rule(table: Table, header: Header, *, reply: bool) -> Rule:
    """Judge a header alone, before any of its payload is read.

    Args:
        table: the rows of this socket.
        header: what arrived.
        reply: whether this side expects answers (else requests).

    Raises:
        RemoteProtocolError: version, reserved bits, direction, request code or size are wrong.
    """
    code, flags, size = header
    rule = table.rules.get(code)
    name = rule.name if rule is not None else None
    version = flags & 3
    if version != (VERSION if table.versioned else 0):
        wanted = f"must be {VERSION}" if table.versioned else "must be 0: GPU headers have none"
        raise BadHeader("version", version, wanted, request=name)
    if flags & ~_KNOWN_FLAGS:
        raise BadHeader("flags", flags, "bits 4 to 31 are reserved", request=name)
    if rule is None:
        known = f"{table.name} requests are 1 to {max(table.rules)}"
        raise UnknownRequest("request", code, known)
    if bool(flags & _REPLY) != reply:
        if reply:
            raise BadHeader("flags", flags, "an answer must have the REPLY bit", request=name)
        raise UnexpectedReply("flags", flags, "a reply where only requests come", request=name)
    if not table.versioned and flags & _NEED_REPLY:
        raise BadHeader("flags", flags, "the GPU protocol has no NEED_REPLY", request=name)
    if size > table.max_payload:
        raise BadSize("size", size, f"at most {table.max_payload} bytes", request=name)
    kinds = rule.replies if reply else rule.messages
    for kind in kinds:
        if size in kind._sizes:
            return rule
    # Any request can be acknowledged, whatever its own answer is.
    if reply and size in _ACK_SIZES:
        return rule
    raise BadSize("size", size, f"must be {describe_sizes(kinds)}", request=name)


_ACK_SIZES = (8,)


def describe_sizes(kinds: tuple[type[Message], ...]) -> str:
    """Say in words which payload sizes there are."""
    parts = []
    for kind in kinds:
        sizes = kind._sizes
        if len(sizes) > 3:
            parts.append(f"{sizes[0]} to {sizes[-1]}")
        else:
            parts += [str(size) for size in sizes]
    return " or ".join(dict.fromkeys(parts)) + " bytes"


def choose(rule: Rule, size: int, wire: Wire) -> type[Message]:
    """Return which of a request's payloads has this size.

    SET_MEM_TABLE with 0 or 8 bytes is the front-end's acknowledgement in postcopy, and an empty
    table otherwise; the other variants are told apart by size alone.
    """
    if not rule.variants:
        return rule.message
    for kind in rule.messages:
        if size in kind._sizes and not (
            wire.postcopy and kind is rule.message and size in rule.variants[0]._sizes
        ):
            return kind
    return rule.message


def decode_payload(kind: type[Message], payload: bytes, wire: Wire, name: str) -> Message:
    """Read a payload as ``kind``.

    Raises:
        RemoteProtocolError: it cannot be one.
    """
    if len(payload) not in kind._sizes:
        raise BadSize("size", len(payload), f"must be {describe_sizes((kind,))}", request=name)
    try:
        return kind._decode(payload, wire)
    except LocalProtocolError as error:
        raise BadPayload(error.field, error.value, error.rule, request=name) from None


def encode_message(
    table: Table, rule: Rule, message: Message, wire: Wire, *, reply: bool, need_reply: bool = False
) -> bytes:
    """Return header and payload of ``message``.

    Raises:
        LocalProtocolError: the message cannot be written in this state (Xen fields without
            XEN_MMAP).
    """
    payload = message._encode(wire)
    flags = VERSION if table.versioned else 0
    if reply:
        flags |= _REPLY
    elif need_reply:
        flags |= _NEED_REPLY
    return _HEADER[wire.order].pack(rule.code, flags, len(payload)) + payload


class Frame(NamedTuple):
    """A whole message before it is understood."""

    header: Header
    rule: Rule
    payload: bytes


class Framer:
    """Cuts a byte stream into frames, judging each header as soon as it is complete.

    It holds at most one payload more than it was told to read: ``wanted`` is how many bytes to read
    next, and reading no more than that keeps descriptors with the message they came with.
    """

    def __init__(self, table: Table, order: str, *, replies: bool) -> None:
        self._table = table
        self._order = order
        self._replies = replies
        self._buffer = bytearray()
        self._head: tuple[Header, Rule] | None = None
        self._error: RemoteProtocolError | None = None
        self._missing = HEADER_SIZE

    @property
    def wanted(self) -> int:
        """Bytes missing to the next header or frame; 0 when one is ready."""
        return self._missing

    @property
    def buffered(self) -> int:
        """Bytes received of what is not yet a frame that was taken."""
        return len(self._buffer)

    def feed(self, data: bytes) -> None:
        """Take received bytes."""
        self._buffer += data
        self._judge()

    def _judge(self) -> None:
        need, have = HEADER_SIZE, len(self._buffer)
        if self._head is None and self._error is None and have >= HEADER_SIZE:
            header = decode_header(self._buffer[:HEADER_SIZE], self._order)
            try:
                self._head = header, find_rule(self._table, header, reply=self._replies)
            except RemoteProtocolError as error:
                self._error = error.bare()
        if self._head is not None:
            need += self._head[0].size
        self._missing = need - have if need > have else 0

    def next(self) -> Frame | None:
        """Return the next whole frame, or None when bytes are missing.

        Raises:
            RemoteProtocolError: the header is wrong; the stream is unusable from here on.
        """
        if self._error is not None:
            raise self._error.bare()
        if self._head is None or self._missing:
            return None
        header, rule = self._head
        end = HEADER_SIZE + header.size
        payload = bytes(self._buffer[HEADER_SIZE:end])
        del self._buffer[:end]
        self._head = None
        self._judge()
        return Frame(header, rule, payload)
