"""The stream cut anywhere gives the same messages; random values survive both ways."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import protocol_fuzz
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from protocol_samples import ALL, VECTORS, Vector

from vhost_protocol import (
    BACKEND_TABLE,
    FRONTEND_TABLE,
    GPU_TABLE,
    AddMemReg,
    AsymmetricSession,
    CreateCryptoSession,
    GpuUpdate,
    MemoryRegion,
    Message,
    ProtocolFeatures,
    Request,
    Requester,
    Responder,
    Session,
    SetConfig,
    SetMemTable,
    ShmemConfigReply,
    SymmetricSession,
    Wire,
    XenMapFlags,
)
from vhost_protocol.messages.message import MessageType

TABLES = {table.name: table for table in (FRONTEND_TABLE, BACKEND_TABLE, GPU_TABLE)}


def everything(order: str = "<", *, xen: bool = False, postcopy: bool = False) -> Session:
    session = Session(order)
    session.features = (1 << 64) - 1
    session.protocol_features = ALL if xen else ALL & ~ProtocolFeatures.XEN_MMAP
    session.owned = True
    session.gpu_features = type(session.gpu_features)(3)
    session.postcopy = postcopy
    return session


REQUESTS = [v for v in VECTORS if not v.reply]


@pytest.mark.parametrize("vector", REQUESTS, ids=lambda v: f"{v.table}-{v.code}")
@pytest.mark.usefixtures("no_fd_leak")
def test_a_message_cut_at_every_byte(vector: Vector, fds: list[int]) -> None:
    frame = vector.frame("little")
    cuts = range(1, len(frame))
    if len(frame) > 200:
        cuts = range(1, len(frame), 97)
    for cut in cuts:
        back = Responder(TABLES[vector.table], everything(xen=vector.xen, postcopy=vector.postcopy))
        back.receive(frame[:cut], [os.dup(fd) for fd in fds[: vector.fds]])
        assert back.next() is None
        assert 0 < back.wanted <= len(frame) - cut
        back.receive(frame[cut:])
        received = back.next()
        assert received is not None
        with received:
            assert received.message == vector.message
            assert len(received.fds) == vector.fds
        assert back.wanted == 12


@pytest.mark.usefixtures("no_fd_leak")
def test_all_messages_in_one_piece_and_byte_by_byte() -> None:
    plain = [v for v in REQUESTS if v.table == "front-end" and not (v.fds or v.xen or v.postcopy)]
    stream = b"".join(v.frame("little") for v in plain)
    for size in (1, 5, 12, 4096, len(stream)):
        back = Responder(FRONTEND_TABLE, everything())
        seen: list[Message] = []
        for at in range(0, len(stream), size):
            back.receive(stream[at : at + size])
            while (received := back.next()) is not None:
                seen.append(received.message)
                # What the vectors negotiate on the way must not change the rest.
                back.session.protocol_features = everything().protocol_features
                back.session.owned = True
                back.session.postcopy = False
                back.session.features = (1 << 64) - 1
        assert seen == [v.message for v in plain]


u8 = st.integers(0, 0xFF)
u32 = st.integers(0, (1 << 32) - 1)
u64 = st.integers(0, (1 << 64) - 1)


@st.composite
def regions(draw: st.DrawFn, *, xen: bool = False) -> MemoryRegion:
    size = draw(st.integers(1, 1 << 48))
    places = [draw(st.integers(0, (1 << 64) - size)) for _ in range(3)]
    if not xen:
        return MemoryRegion(places[0], size, places[1], places[2])
    flags = draw(st.sampled_from([0, 1, 2, 0x100, 0x101, 0x102]))
    return MemoryRegion(places[0], size, places[1], places[2], XenMapFlags(flags), draw(u32))


def simple(kind: type[Message]) -> st.SearchStrategy[Message | None]:
    """Values of a class whose fields are numbers and enums of its layout."""
    drawn: dict[str, st.SearchStrategy[Any]] = {}
    for name, low, high in kind._limits:
        convert = kind._convert.get(name)
        numbers = st.integers(low, high) | st.integers(low, min(high, 0x1FF))
        if convert is not None:
            good = [n for n in range(300) if _accepts(convert, n)]
            numbers = st.sampled_from(good)
        drawn[name] = numbers
    for name, size in kind._bytes:
        drawn[name] = blocks(size)
    return st.builds(_build(kind), **drawn).filter(bool)


def _accepts(convert: object, number: int) -> bool:
    assert callable(convert)
    try:
        convert(number)
    except ValueError:
        return False
    return True


def blocks(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=6, max_size=6).map(lambda some: (some * size)[:size])


def _build(kind: type[Message]) -> Callable[..., Message | None]:
    from vhost_protocol import LocalProtocolError

    def build(**values: object) -> Message | None:
        try:
            return kind(**values)
        except LocalProtocolError:
            # Values that fit their fields but not together: an area that ends beyond 64 bits.
            return None

    return build


SIMPLE = sorted(
    {
        kind
        for table in TABLES.values()
        for rule in table.rules.values()
        for kind in (*rule.messages, *rule.replies)
        if isinstance(kind, MessageType)
        and "_structs" in dir(kind)
        and kind._limits
        and len(kind._limits) + len(kind._bytes) == len(kind._fields)
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", SIMPLE, ids=lambda kind: kind.__name__)
@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.large_base_example, HealthCheck.filter_too_much],
)
@given(data=st.data())
def test_simple_messages_round_trip(kind: type[Message], data: st.DataObject) -> None:
    message = data.draw(simple(kind))
    assert message is not None
    for order in "<>":
        wire = Wire(order)
        payload = message._encode(wire)
        assert len(payload) in kind._sizes
        assert kind._decode(payload, wire) == message


keys = st.builds(
    SymmetricSession, u32, u32, u32, u32, u8, u8, u8, u8, st.binary(max_size=64),
    st.binary(max_size=512),
)  # fmt: skip


def sized(size: int) -> st.SearchStrategy[bytes]:
    return st.binary(min_size=size, max_size=size)


rsa = st.builds(AsymmetricSession, u32, u32, u32, u32, st.binary(max_size=1024))
session_ids = st.integers(-(1 << 63), (1 << 63) - 1)
composed = st.one_of(
    st.builds(SetMemTable, st.lists(regions(), max_size=32)),
    st.builds(AddMemReg, regions()),
    st.builds(CreateCryptoSession, st.sampled_from([0x2, 0x102, 0x202, 0x302]), keys, session_ids),
    st.builds(CreateCryptoSession, st.just(0x402), rsa, session_ids),
    st.builds(SetConfig, st.integers(0, 12), st.binary(max_size=4084), st.sampled_from([0, 1])),
    st.builds(ShmemConfigReply, st.lists(st.integers(1, 1 << 40), max_size=256)),
    st.integers(0, 20).flatmap(
        lambda w: st.builds(
            GpuUpdate,
            u32,
            u32,
            u32,
            st.just(w),
            st.just(2),
            sized(8 * w),
        )
    ),
)


@settings(max_examples=100, deadline=None, derandomize=True)
@given(message=composed, order=st.sampled_from("<>"))
def test_composed_messages_round_trip(message: Message, order: str) -> None:
    wire = Wire(order)
    payload = message._encode(wire)
    assert len(payload) in type(message)._sizes
    assert type(message)._decode(payload, wire) == message


@settings(max_examples=50, deadline=None, derandomize=True)
@given(table=st.lists(regions(xen=True), max_size=32), order=st.sampled_from("<>"))
def test_xen_regions_round_trip(table: list[MemoryRegion], order: str) -> None:
    wire = Wire(order, xen=True)
    message = SetMemTable(tuple(table))
    assert SetMemTable._decode(message._encode(wire), wire) == message


def test_both_sides_agree_on_who_answers() -> None:
    for vector in REQUESTS:
        table = TABLES[vector.table]
        for need_reply in (None, True, False):
            session = everything(xen=vector.xen, postcopy=vector.postcopy)
            front = Requester(table, session, strict=False)
            assert isinstance(vector.message, Request)
            if table is GPU_TABLE and need_reply:
                continue
            outgoing, answered = front.request(
                vector.message, [0] * vector.fds, need_reply=need_reply
            )
            back = Responder(table, everything(xen=vector.xen, postcopy=vector.postcopy))
            back.receive(outgoing.data, [os.dup(0) for _ in range(vector.fds)])
            received = back.next()
            assert received is not None
            with received:
                assert received.needs_reply is answered, vector


def test_fuzz_short() -> None:
    protocol_fuzz.one_input(b"")
    before = protocol_fuzz.open_fds()
    protocol_fuzz.run_random(10_000, seed=7)
    assert protocol_fuzz.open_fds() == before
