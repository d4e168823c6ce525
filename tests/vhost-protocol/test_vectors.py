"""Every message against bytes worked out by hand, in both byte orders."""

from __future__ import annotations

import os
import pickle
from typing import Any

import pytest
from protocol_samples import ALL, VECTORS, Vector

from vhost_protocol import (
    BACKEND_TABLE,
    FRONTEND_TABLE,
    GPU_TABLE,
    Ack,
    BackendRequest,
    FrontendRequest,
    GpuRequest,
    Message,
    ProtocolFeatures,
    Reply,
    Request,
    Requester,
    Responder,
    Session,
    Table,
)

TABLES = {table.name: table for table in (FRONTEND_TABLE, BACKEND_TABLE, GPU_TABLE)}
SIGN = {"little": "<", "big": ">"}


def name(vector: Vector) -> str:
    return f"{vector.table}-{vector.code}-{type(vector.message).__name__}-{vector.fds}"


def everything(vector: Vector, byteorder: str) -> Session:
    """A session in which every message is legal."""
    session = Session(SIGN[byteorder])
    session.features = (1 << 64) - 1
    session.offered_features = session.features
    without = 0 if vector.xen else ProtocolFeatures.XEN_MMAP
    session.protocol_features = ALL & ~without
    session.owned = True
    session.postcopy = vector.postcopy
    session.gpu_features = type(session.gpu_features)(3)
    return session


@pytest.mark.parametrize("byteorder", ["little", "big"])
@pytest.mark.parametrize("vector", VECTORS, ids=name)
def test_bytes_are_the_specifications(
    vector: Vector, byteorder: str, fds: list[int], no_fd_leak: None
) -> None:
    table = TABLES[vector.table]
    session = everything(vector, byteorder)
    frame = vector.frame(byteorder)
    if vector.reply:
        asked = next(v for v in VECTORS if (v.table, v.code) == (table.name, vector.code))
        session.postcopy = vector.postcopy
        front = Requester(table, session, strict=False)
        outgoing, answered = front.request(as_request(asked.message), fds[: asked.fds])
        assert answered
        back = Responder(table, everything(vector, byteorder))
        back.session.postcopy = vector.postcopy
        back.receive(outgoing.data, [dup(fd) for fd in outgoing.fds])
        received = back.next()
        assert received is not None
        with received:
            reply = back.reply(received, as_reply(vector.message), fds[: vector.fds])
        assert reply.data == frame
        front.receive(reply.data, [dup(fd) for fd in reply.fds])
        answer = front.next()
        assert answer is not None
        with answer:
            assert answer.message == vector.message
            assert len(answer.fds) == vector.fds
    else:
        front = Requester(table, session, strict=False)
        outgoing, _ = front.request(as_request(vector.message), fds[: vector.fds], need_reply=False)
        assert outgoing.data == frame
        back = Responder(table, everything(vector, byteorder))
        back.receive(frame, [dup(fd) for fd in outgoing.fds])
        received = back.next()
        assert received is not None
        with received:
            assert received.message == vector.message
            assert len(received.fds) == vector.fds
            assert int(received.request) == vector.code
    assert pickle.loads(pickle.dumps(vector.message)) == vector.message
    assert hash(vector.message) == hash(pickle.loads(pickle.dumps(vector.message)))
    assert type(vector.message).__name__ in repr(vector.message)


def as_request(message: Message) -> Request[Any]:
    assert isinstance(message, Request)
    return message


def as_reply(message: Message) -> Reply:
    assert isinstance(message, Reply)
    return message


def dup(fd: int) -> int:

    return os.dup(fd)


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_every_request_and_answer_has_a_vector(table: Table) -> None:
    ours = [vector for vector in VECTORS if vector.table == table.name]
    for rule in table.rules.values():
        asked = {type(v.message) for v in ours if v.code == rule.code and not v.reply}
        assert asked == set(rule.messages), rule.name
        answered = {type(v.message) for v in ours if v.code == rule.code and v.reply}
        # The plain acknowledgement has one vector for each table, not for each request.
        assert set(rule.replies) - {Ack} <= answered, rule.name


def test_the_tables_are_complete() -> None:
    """Each code has its row; `SIZES` holds them against the specification."""
    for table, codes in (
        (FRONTEND_TABLE, FrontendRequest),
        (BACKEND_TABLE, BackendRequest),
        (GPU_TABLE, GpuRequest),
    ):
        assert sorted(table.rules) == [int(code) for code in codes]
        assert sorted(table.rules) == list(range(1, len(table.rules) + 1))


def test_every_protocol_feature_bit_has_its_place() -> None:
    names = [
        "MQ",
        "LOG_SHMFD",
        "RARP",
        "REPLY_ACK",
        "MTU",
        "BACKEND_REQ",
        "CROSS_ENDIAN",
        "CRYPTO_SESSION",
        "PAGEFAULT",
        "CONFIG",
        "BACKEND_SEND_FD",
        "HOST_NOTIFIER",
        "INFLIGHT_SHMFD",
        "RESET_DEVICE",
        "INBAND_NOTIFICATIONS",
        "CONFIGURE_MEM_SLOTS",
        "STATUS",
        "XEN_MMAP",
        "SHARED_OBJECT",
        "DEVICE_STATE",
        "GET_VRING_BASE_INFLIGHT",
        "GPA_ADDRESSES",
        "SHMEM",
        "GET_VRING_BASE_SKIP_DRAIN",
    ]
    assert {feature.name: int(feature) for feature in ProtocolFeatures} == {
        word: 1 << bit for bit, word in enumerate(names)
    }
    # rust-vmm's vhost up to 0.16 disagrees about this one.
    assert ProtocolFeatures.SHMEM == 1 << 22


SIZES = {
    "front-end": {
        1: 0, 2: 8, 3: 0, 4: 0, 7: 0, 8: 8, 9: 40, 10: 8, 11: 8, 12: 8, 13: 8, 14: 8, 15: 0, 16: 8,
        17: 0, 18: 8, 19: 8, 20: 8, 21: 0, 22: 32, 23: 8, 26: 1072, 27: 8, 28: 0, 29: 0, 30: 0,
        33: 0, 34: 0, 35: 8, 36: 0, 39: 8, 40: 0, 41: 16, 42: 8, 43: 0, 44: 0, 45: 8,
    },
    "back-end": {1: 32, 2: 0, 3: 24, 4: 8, 5: 8, 6: 16, 7: 16, 8: 16, 9: 40, 10: 40},
    "gpu": {1: 0, 2: 8, 3: 0, 4: 12, 5: 12, 6: 16404, 7: 12, 9: 40, 10: 20, 11: 4, 12: 48},
}  # fmt: skip


@pytest.mark.parametrize("table", TABLES.values(), ids=lambda table: table.name)
def test_payload_sizes(table: Table) -> None:
    for code, size in SIZES[table.name].items():
        assert tuple(table.rules[code].message._sizes) == (size,), table.rules[code].name
    variable = set(table.rules) - set(SIZES[table.name])
    expected = {"front-end": {5, 6, 24, 25, 31, 32, 37, 38}, "back-end": set(), "gpu": {8}}
    assert variable == expected[table.name]
    if table is FRONTEND_TABLE:
        sizes = {code: tuple(table.rules[code].message._sizes) for code in (5, 6, 31, 32, 37, 38)}
        assert sizes[6] == (16,)
        assert table.rules[6].variants[0]._sizes == (8,)
        assert sizes[31] == sizes[32] == (20, 24)
        assert sizes[37] == sizes[38] == (40, 48)
        assert {8 + 32 * n for n in range(33)} | {8 + 40 * n for n in range(33)} == set(sizes[5])
