"""Bad input of every kind: which error, naming which field, value and rule, and what is left."""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from typing import Any

import protocol_samples
import pytest

from vhost_protocol import (
    BACKEND_TABLE,
    FRONTEND_TABLE,
    GPU_TABLE,
    Ack,
    AddMemReg,
    AddMemRegAck,
    AsymmetricSession,
    BackendConfigChange,
    BackendShmemMap,
    BackendVringHostNotifier,
    BadDescriptors,
    BadHeader,
    BadPayload,
    BadSize,
    ConfigReply,
    ConnectionClosed,
    CreateCryptoSession,
    CryptoOpcode,
    DescriptorsLost,
    DeviceStateReply,
    FeaturesReply,
    FrontendRequest,
    GetConfig,
    GetFeatures,
    GetInflightFd,
    GetProtocolFeatures,
    GetSharedObject,
    GpuCursorPos,
    GpuDisplay,
    GpuDisplayInfoReply,
    GpuEdidReply,
    GpuFeaturesReply,
    GpuGetEdid,
    GpuGetProtocolFeatures,
    GpuProtocolFeatures,
    GpuSetProtocolFeatures,
    GpuUpdate,
    IotlbAccess,
    IotlbMsg,
    IotlbType,
    LocalProtocolError,
    MaxMemSlotsReply,
    MemoryRegion,
    MemTableAck,
    MemTableReply,
    NotAllowed,
    PostcopyAdvise,
    PostcopyEnd,
    PostcopyListen,
    ProtocolFeatures,
    ProtocolFeaturesReply,
    QueueNumReply,
    Received,
    RemMemReg,
    RemoteProtocolError,
    Request,
    Requester,
    RequestFailed,
    ResetOwner,
    Responder,
    SendRarp,
    Session,
    SetConfig,
    SetDeviceStateFd,
    SetFeatures,
    SetLogBase,
    SetLogBaseAddress,
    SetMemTable,
    SetOwner,
    SetProtocolFeatures,
    SetStatus,
    SetVringAddr,
    SetVringEnable,
    SetVringKick,
    SetVringNum,
    SharedObjectReply,
    ShmemConfigReply,
    StatusReply,
    SymmetricSession,
    Timeout,
    TransferDirection,
    UnexpectedReply,
    UnknownRequest,
    VringFlags,
    XenMapFlags,
)

#: The codes that there are, as an error names them.
CODES = f"1 to {len(FrontendRequest)}"
ALL = protocol_samples.ALL & ~ProtocolFeatures.XEN_MMAP
REGION = MemoryRegion(0, 4096, 1 << 40)


def opened(protocol: ProtocolFeatures = ALL) -> Session:
    session = Session("<")
    session.features = (1 << 64) - 1
    session.protocol_features = protocol
    session.owned = True
    return session


def frame(code: int, payload: bytes = b"", flags: int = 1, size: int | None = None) -> bytes:
    return struct.pack("<III", code, flags, len(payload) if size is None else size) + payload


def feed(core: Requester | Responder, data: bytes, fds: Sequence[int] = ()) -> object:
    core.receive(data, fds)
    return core.next()


def due(received: Received) -> bool:
    return received.needs_reply


def devnull() -> int:
    return os.open(os.devnull, os.O_RDONLY)


# code, payload, descriptors, error, field, part of the rule
BAD_REQUESTS: list[tuple[bytes, int, type[RemoteProtocolError], str, str]] = [
    (frame(0), 0, UnknownRequest, "request", CODES),
    (frame(len(FrontendRequest) + 1), 0, UnknownRequest, "request", CODES),
    (frame(0xFFFF_FFFF), 0, UnknownRequest, "request", CODES),
    (frame(1, flags=0), 0, BadHeader, "version", "must be 1"),
    (frame(1, flags=2), 0, BadHeader, "version", "must be 1"),
    (frame(1, flags=3), 0, BadHeader, "version", "must be 1"),
    (frame(1, flags=0x11), 0, BadHeader, "flags", "reserved"),
    (frame(1, flags=0x8000_0001), 0, BadHeader, "flags", "reserved"),
    (frame(1, flags=5), 0, UnexpectedReply, "flags", "only requests"),
    (frame(5, size=0x1001), 0, BadSize, "size", "at most 4096"),
    (frame(1, size=0xFFFF_FFFF), 0, BadSize, "size", "at most 4096"),
    (frame(2, b"1234"), 0, BadSize, "size", "must be 8 bytes"),
    (frame(2, b""), 0, BadSize, "size", "must be 8 bytes"),
    (frame(1, b"12345678"), 0, BadSize, "size", "must be 0 bytes"),
    (frame(22, bytes(26)), 0, BadSize, "size", "must be 32 bytes"),
    (frame(26, bytes(632)), 0, BadSize, "size", "must be 1072 bytes"),
    (frame(37, bytes(32)), 1, BadSize, "size", "40 or 48 or 0 or 8"),
    (frame(5, bytes(9)), 0, BadSize, "size", "8 to 1288"),
    (frame(1), 1, BadDescriptors, "fds", "must be 0"),
    (frame(21), 0, BadDescriptors, "fds", "must be 1"),
    (frame(21), 2, BadDescriptors, "fds", "must be 1"),
    (frame(12, struct.pack("<Q", 0)), 0, BadDescriptors, "fds", "must be 1"),
    (frame(12, struct.pack("<Q", 0x100)), 1, BadDescriptors, "fds", "must be 0"),
    (frame(38, bytes(8) + struct.pack("<4Q", 0, 1, 0, 0)), 2, BadDescriptors, "fds", "0 or 1"),
    (frame(5, struct.pack("<II4Q", 1, 0, 0, 1, 0, 0)), 0, BadDescriptors, "fds", "must be 1"),
    (frame(1), 33, BadDescriptors, "fds", "at most 32"),
    (frame(6, struct.pack("<Q", 5)), 1, BadDescriptors, "fds", "must be 0"),
    (frame(5, struct.pack("<II", 1, 0)), 0, BadPayload, "num_regions", "0 bytes follow"),
    (frame(5, struct.pack("<II", 0xFFFF_FFFF, 0)), 0, BadPayload, "num_regions", "0 bytes"),
    (frame(5, struct.pack("<II5Q", 1, 0, 0, 1, 0, 0, 0)), 1, BadPayload, "num_regions", "40 bytes"),
    (frame(5, struct.pack("<II4Q", 1, 0, 0, 0, 0, 0)), 1, BadPayload, "size", "not be empty"),
    (
        frame(37, struct.pack("<5Q", 0, (1 << 64) - 1, 2, 0, 0)),
        1,
        BadPayload,
        "guest_address",
        "64",
    ),
    (frame(37, struct.pack("<5Q", 0, 0, 2, (1 << 64) - 1, 0)), 1, BadPayload, "user_address", "64"),
    (frame(37, struct.pack("<5Q", 0, 0, 2, 0, (1 << 64) - 1)), 1, BadPayload, "mmap_offset", "64"),
    (frame(37, bytes(48)), 1, BadPayload, "size", "must be 40 bytes"),
    (frame(9, struct.pack("<IIQQQQ", 0, 2, 0, 0, 0, 0)), 0, BadPayload, "flags", "reserved"),
    (frame(12, struct.pack("<Q", 0x200)), 0, BadPayload, "u64", "bits 9 to 63"),
    (frame(18, struct.pack("<II", 0, 2)), 0, BadPayload, "enable", "0 or 1"),
    (frame(23, struct.pack("<II", 0, 2)), 0, BadPayload, "big_endian", "0 or 1"),
    (frame(22, struct.pack("<QQQBB6x", 0, 0, 0, 4, 2)), 0, BadPayload, "access", "reserved"),
    (frame(22, struct.pack("<QQQBB6x", 0, 0, 0, 0, 5)), 0, BadPayload, "type", "1 (MISS)"),
    (frame(22, struct.pack("<QQQBB6x", 2**64 - 1, 2, 0, 0, 2)), 0, BadPayload, "iova", "64 bits"),
    (frame(24, struct.pack("<III", 0, 5, 0) + b"1234"), 0, BadPayload, "size", "4 bytes follow"),
    (frame(24, struct.pack("<III", 4093, 4, 0) + b"1234"), 0, BadPayload, "offset", "4096"),
    (frame(25, struct.pack("<III", 0, 4, 2) + b"1234"), 0, BadPayload, "flags", "reserved"),
    (frame(26, struct.pack("<Q", 1) + bytes(1064)), 0, BadPayload, "op_code", "0x402"),
    (frame(26, struct.pack("<QII", 2, 1, 65) + bytes(1056)), 0, BadPayload, "key_length", "64"),
    (
        frame(26, struct.pack("<QIII", 0x402, 1, 1, 1025) + bytes(1052)),
        0,
        BadPayload,
        "key_",
        "1024",
    ),
    (
        frame(26, struct.pack("<Q5I", 2, 1, 0, 0, 0, 513) + bytes(1044)),
        0,
        BadPayload,
        "auth_",
        "512",
    ),
    (frame(39, struct.pack("<Q", 256)), 0, BadPayload, "status", "8 bits"),
    (frame(42, struct.pack("<II", 2, 0)), 1, BadPayload, "direction", "0 (SAVE), 1 (LOAD)"),
    (frame(42, struct.pack("<II", 0, 1)), 1, BadPayload, "phase", "0 (STOPPED)"),
    (frame(6, struct.pack("<QQ", 1, 2**64 - 1)), 0, BadPayload, "mmap_offset", "64 bits"),
]


@pytest.mark.parametrize(("data", "fds", "error", "field", "rule"), BAD_REQUESTS)
@pytest.mark.usefixtures("no_fd_leak")
def test_bad_requests_are_typed_errors(
    data: bytes, fds: int, error: type[RemoteProtocolError], field: str, rule: str
) -> None:
    back = Responder(FRONTEND_TABLE, opened())
    with pytest.raises(error) as caught:
        feed(back, data, [devnull() for _ in range(fds)])
    assert type(caught.value) is error
    assert caught.value.field.startswith(field)
    assert rule in caught.value.rule
    assert rule in str(caught.value)
    # The state is defined: broken for good, with the first error.
    assert str(back.broken) == str(caught.value)
    assert back.broken is not None
    assert back.broken.__traceback__ is None, "frames and what they hold are not kept"
    with pytest.raises(error) as again:
        back.next()
    assert str(again.value) == str(caught.value)
    with pytest.raises(error):
        back.receive(b"x", [devnull()])


def test_an_oversize_payload_is_refused_before_it_is_read() -> None:
    back = Responder(FRONTEND_TABLE, opened())
    back.receive(frame(5, size=0x7FFF_FFFF))
    assert back.partial == 12
    with pytest.raises(BadSize):
        back.next()


@pytest.mark.usefixtures("no_fd_leak")
def test_descriptors_come_with_the_first_byte() -> None:
    back = Responder(FRONTEND_TABLE, opened())
    whole = frame(21)
    back.receive(whole[:1])
    with pytest.raises(BadDescriptors, match="first bytes of a header"):
        back.receive(whole[1:], [devnull()])
    assert back.broken is not None


@pytest.mark.usefixtures("no_fd_leak")
def test_descriptors_of_an_unfinished_message_are_closed() -> None:
    back = Responder(FRONTEND_TABLE, opened())
    back.receive(frame(21)[:5], [devnull()])
    assert back.next() is None
    back.close()


def test_rem_mem_reg_may_bring_a_descriptor_which_is_closed(fds: list[int]) -> None:
    before = len(os.listdir("/proc/self/fd"))
    back = Responder(FRONTEND_TABLE, opened())
    payload = bytes(8) + struct.pack("<4Q", 0, 4096, 1 << 40, 0)
    back.receive(frame(38, payload), [os.dup(fds[0])])
    received = back.next()
    assert received is not None
    with received:
        assert received.message == RemMemReg(REGION)
    assert len(os.listdir("/proc/self/fd")) == before


GATES = [
    (17, b"", 0, ProtocolFeatures.MQ),
    (19, bytes(8), 0, ProtocolFeatures.RARP),
    (20, bytes(8), 0, ProtocolFeatures.MTU),
    (21, b"", 1, ProtocolFeatures.BACKEND_REQ),
    (23, bytes(8), 0, ProtocolFeatures.CROSS_ENDIAN),
    (24, bytes(12), 0, ProtocolFeatures.CONFIG),
    (27, bytes(8), 0, ProtocolFeatures.CRYPTO_SESSION),
    (28, b"", 0, ProtocolFeatures.PAGEFAULT),
    (31, bytes(24), 0, ProtocolFeatures.INFLIGHT_SHMFD),
    (34, b"", 0, ProtocolFeatures.RESET_DEVICE),
    (35, bytes(8), 0, ProtocolFeatures.INBAND_NOTIFICATIONS),
    (36, b"", 0, ProtocolFeatures.CONFIGURE_MEM_SLOTS),
    (40, b"", 0, ProtocolFeatures.STATUS),
    (41, bytes(16), 0, ProtocolFeatures.SHARED_OBJECT),
    (43, b"", 0, ProtocolFeatures.DEVICE_STATE),
    (44, b"", 0, ProtocolFeatures.SHMEM),
    (45, bytes(8), 0, ProtocolFeatures.GET_VRING_BASE_SKIP_DRAIN),
]


@pytest.mark.parametrize(("code", "payload", "fds", "feature"), GATES)
@pytest.mark.usefixtures("no_fd_leak")
def test_a_request_needs_its_feature(
    code: int, payload: bytes, fds: int, feature: ProtocolFeatures
) -> None:
    without = Responder(FRONTEND_TABLE, opened(ALL & ~feature))
    with pytest.raises(NotAllowed, match=str(feature.name)):
        feed(without, frame(code, payload), [devnull() for _ in range(fds)])
    having = Responder(FRONTEND_TABLE, opened())
    having.receive(frame(code, payload), [devnull() for _ in range(fds)])
    received = having.next()
    assert received is not None
    received.close()


def test_virtio_features_gate_requests() -> None:
    session = opened()
    session.features = 0
    front = Requester(FRONTEND_TABLE, session)
    with pytest.raises(LocalProtocolError, match="VIRTIO feature 33"):
        front.request(IotlbMsg(0, 0, 0, IotlbAccess.READ, IotlbType.UPDATE))
    session.offered_features = 0
    with pytest.raises(LocalProtocolError, match="VIRTIO feature 30 offered"):
        front.request(GetProtocolFeatures())


def test_only_offered_protocol_features_may_be_set() -> None:
    session = opened(ProtocolFeatures(0))
    session.offered_protocol_features = ProtocolFeatures.MQ
    front = Requester(FRONTEND_TABLE, session)
    with pytest.raises(LocalProtocolError, match="not offered by the back-end: CONFIG"):
        front.request(SetProtocolFeatures(ProtocolFeatures.CONFIG))
    # A bit that has no name yet is no more allowed than one that has.
    with pytest.raises(LocalProtocolError, match=f"not offered by the back-end: {1 << 63:#x}"):
        front.request(SetProtocolFeatures(ProtocolFeatures(1 << 63)))


@pytest.mark.parametrize(
    ("features", "missing"),
    [
        (ProtocolFeatures.INBAND_NOTIFICATIONS, "REPLY_ACK|BACKEND_REQ"),
        (
            ProtocolFeatures.INBAND_NOTIFICATIONS | ProtocolFeatures.REPLY_ACK,
            "REPLY_ACK|BACKEND_REQ",
        ),
        (
            ProtocolFeatures.GET_VRING_BASE_SKIP_DRAIN | ProtocolFeatures.INFLIGHT_SHMFD,
            "INFLIGHT_SHMFD|GET_VRING_BASE_INFLIGHT",
        ),
    ],
)
def test_features_that_need_others_end_the_connection(
    features: ProtocolFeatures, missing: str
) -> None:
    back = Responder(FRONTEND_TABLE, opened(ProtocolFeatures(0)))
    back.receive(frame(16, struct.pack("<Q", features)))
    with pytest.raises(NotAllowed) as caught:
        back.next()
    assert missing in caught.value.rule


def test_what_deployed_peers_do_is_tolerated_and_told() -> None:
    # QEMU sends postcopy messages although memory slots are negotiated, and SET_OWNER late.
    session = opened()
    session.owned = False
    back = Responder(FRONTEND_TABLE, session)
    back.receive(frame(28))
    received = back.next()
    assert received is not None
    assert [v.tolerated for v in received.violations] == [True]
    assert "CONFIGURE_MEM_SLOTS" in received.violations[0].rule
    back.receive(frame(8, bytes(8)))
    received = back.next()
    assert received is not None
    assert "SET_OWNER" in received.violations[0].rule
    strict = Responder(FRONTEND_TABLE, opened(), strict=True)
    strict.receive(frame(28))
    with pytest.raises(NotAllowed):
        strict.next()
    front = Requester(FRONTEND_TABLE, opened())
    with pytest.raises(LocalProtocolError, match="CONFIGURE_MEM_SLOTS"):
        front.request(PostcopyAdvise())
    lenient = Requester(FRONTEND_TABLE, opened(), strict=False)
    assert lenient.request(PostcopyAdvise())[1]


def test_rings_are_enabled_once_bit_30_is_offered() -> None:
    """QEMU's virtio-net enables its rings when it is made, before SET_FEATURES."""
    session = Session("<")
    session.owned = True
    back, front = Responder(FRONTEND_TABLE, session), Requester(FRONTEND_TABLE, session)
    session.offered_features = 1 << 30
    received = feed(back, frame(18, struct.pack("<II", 0, 1)))
    assert isinstance(received, Received)
    assert received.violations == ()
    front.request(SetVringEnable(0, True))
    session.offered_features = 1
    with pytest.raises(LocalProtocolError, match="VIRTIO feature 30 offered"):
        front.request(SetVringEnable(0, True))
    with pytest.raises(NotAllowed, match="VIRTIO feature 30 offered"):
        feed(back, frame(18, struct.pack("<II", 0, 1)))


# what DPDK and SPDK send, the features negotiated, the field, part of the rule
TOLERATED: list[tuple[bytes, int, str, str]] = [
    (frame(3), 1 << 30, "request", "comes once"),
    (frame(18, struct.pack("<II", 0, 1)), 0, "request", "kept by SET_FEATURES"),
    (frame(11, struct.pack("<II", 0, 0xCB20)), 1 << 30, "num", "reserved"),
    (frame(45, struct.pack("<II", 0, 1)), 1 << 30, "num", "reserved"),
    (frame(35, struct.pack("<II", 0, 7)), 1 << 30, "num", "reserved"),
    (frame(10, struct.pack("<II", 0, 0x8000)), 1 << 34, "base", "device's half"),
]


@pytest.mark.parametrize(("data", "features", "field", "rule"), TOLERATED)
def test_what_dpdk_sends_is_tolerated_counted_and_told(
    data: bytes, features: int, field: str, rule: str
) -> None:
    session = opened()
    session.offered_features = 1 << 30
    session.request_sent(SetFeatures(features))
    back = Responder(FRONTEND_TABLE, session)
    feed(back, data)
    received = feed(back, data)
    assert isinstance(received, Received)
    assert [(v.field, v.tolerated) for v in received.violations] == [(field, True)]
    assert rule in received.violations[0].rule
    name = received.request.name
    assert session.tolerated == {(name, received.violations[0].rule): 2}
    strict = Responder(FRONTEND_TABLE, session, strict=True)
    with pytest.raises(NotAllowed, match=rule):
        feed(strict, data)
    # Our own front-end does none of it.
    front = Requester(FRONTEND_TABLE, session)
    message = received.message
    assert isinstance(message, Request)
    with pytest.raises(LocalProtocolError, match=rule):
        front.request(message)


@pytest.mark.parametrize("base", [0x8000_8000, 0, 0x0003_0003])
def test_a_packed_position_with_both_halves_breaks_no_rule(base: int) -> None:
    session = opened()
    received = feed(Responder(FRONTEND_TABLE, session), frame(10, struct.pack("<II", 0, base)))
    assert isinstance(received, Received)
    assert received.violations == ()


def test_the_back_ends_reserved_numbers_are_tolerated_too() -> None:
    for code in (4, 5):
        front = Responder(BACKEND_TABLE, opened())
        received = feed(front, frame(code, struct.pack("<II", 0, 9)))
        assert isinstance(received, Received)
        assert [v.field for v in received.violations] == ["num"]


def test_an_invalidation_has_any_access() -> None:
    """QEMU leaves the access of an invalidation as its stack has it: reserved bits are no error."""
    back = Responder(FRONTEND_TABLE, opened())
    received = feed(back, frame(22, struct.pack("<QQQBB6x", 4096, 4096, 0xDEAD, 0xC5, 3)))
    assert isinstance(received, Received)
    assert received.message == IotlbMsg(4096, 4096, 0xDEAD, IotlbAccess.READ, IotlbType.INVALIDATE)


def test_qemu_acknowledges_postcopy_addresses_with_an_add_mem_reg_without_descriptor(
    fds: list[int],
) -> None:
    session = opened()
    back = Responder(FRONTEND_TABLE, session)
    back.receive(frame(29, flags=9))
    received = back.next()
    assert received is not None
    assert received.needs_reply
    assert session.postcopy
    # The region itself: answered with an address, although NEED_REPLY is not set.
    payload = bytes(8) + struct.pack("<4Q", 0, 4096, 1 << 40, 0)
    back.receive(frame(37, payload), [os.dup(fds[0])])
    received = back.next()
    assert received is not None
    with received:
        assert received.message == AddMemReg(REGION)
        assert received.needs_reply
    # Then the acknowledgement: the same code, 8 bytes, no descriptor, no answer.
    back.receive(frame(37, bytes(8)))
    received = back.next()
    assert received is not None
    assert received.message == AddMemRegAck(0)
    assert not received.needs_reply
    # The same for SET_MEM_TABLE, in QEMU's form and in the specification's empty one.
    for payload in (bytes(8), b""):
        back.receive(frame(5, payload))
        received = back.next()
        assert received is not None
        assert received.message == MemTableAck(0)
        assert not received.needs_reply
    back.receive(frame(30))
    assert back.next() is not None
    back.receive(frame(5, bytes(8)))
    received = back.next()
    assert received is not None
    assert received.message == SetMemTable(())


def test_an_inflight_description_of_20_bytes_is_understood_and_24_are_sent() -> None:
    back = Responder(FRONTEND_TABLE, opened())
    back.receive(frame(31, struct.pack("<QQHH", 0, 0, 2, 128)))
    received = back.next()
    assert received is not None
    assert received.message == GetInflightFd(0, 0, 2, 128)
    front = Requester(FRONTEND_TABLE, opened())
    assert len(front.request(GetInflightFd(0, 0, 2, 128))[0].data) == 12 + 24


def test_padding_from_c_structures_is_ignored() -> None:
    back = Responder(FRONTEND_TABLE, opened())
    back.receive(frame(22, struct.pack("<QQQBB", 0, 1, 2, 3, 2) + b"\xee" * 6))
    received = back.next()
    assert received is not None
    assert received.message == IotlbMsg(0, 1, 2, IotlbAccess.READ_WRITE, IotlbType.UPDATE)


def test_replies_are_checked() -> None:
    def asking(session: Session | None = None) -> Requester:
        front = Requester(FRONTEND_TABLE, session or opened())
        front.request(GetFeatures())
        return front

    bad: list[tuple[bytes, type[RemoteProtocolError], str]] = [
        (frame(1, bytes(8), flags=1), BadHeader, "REPLY bit"),
        (frame(1, bytes(8), flags=4), BadHeader, "must be 1"),
        (frame(1, bytes(4), flags=5), BadSize, "must be 8"),
        (frame(15, bytes(8), flags=5), UnexpectedReply, "answer to GET_FEATURES is due"),
        (frame(99, bytes(8), flags=5), UnknownRequest, CODES),
    ]
    for data, error, rule in bad:
        front = asking()
        with pytest.raises(error, match=rule):
            feed(front, data)
        assert isinstance(front.broken, error)
        with pytest.raises(error):
            front.request(GetFeatures())
    idle = Requester(FRONTEND_TABLE, opened())
    idle.receive(frame(1, bytes(8), flags=5))
    with pytest.raises(UnexpectedReply, match="nothing was asked"):
        idle.next()
    front = asking()
    front.receive(frame(1, bytes(8), flags=5), [devnull()])
    with pytest.raises(BadDescriptors):
        front.next()
    # An answer of the wrong kind: 8 bytes where a configuration is due.
    front = Requester(FRONTEND_TABLE, opened())
    front.request(GetConfig(0, 4))
    front.receive(frame(24, bytes(8), flags=5))
    with pytest.raises(BadPayload):
        front.next()
    # NEED_REPLY in an answer means nothing and is let pass, as libvhost-user may leave it there.
    front = asking()
    front.receive(frame(1, bytes(8), flags=13))
    assert front.next() is not None


def test_an_answer_to_a_request_that_was_not_flagged_is_unexpected() -> None:
    front = Requester(FRONTEND_TABLE, opened())
    assert front.request(ResetOwner(), need_reply=False)[1] is False
    front.receive(frame(4, bytes(8), flags=5))
    with pytest.raises(UnexpectedReply):
        front.next()


def test_the_responder_refuses_wrong_answers(fds: list[int]) -> None:
    back = Responder(FRONTEND_TABLE, opened())
    back.receive(frame(1))
    received = back.next()
    assert received is not None
    assert received.needs_reply
    assert back.acknowledge(received, True) is None
    with pytest.raises(LocalProtocolError, match="must be a FeaturesReply"):
        back.reply(received, QueueNumReply(1))
    with pytest.raises(LocalProtocolError, match="must be 0"):
        back.reply(received, FeaturesReply(1), fds[:1])
    back.reply(received, FeaturesReply(1))
    assert not due(received)
    with pytest.raises(LocalProtocolError, match="answered already"):
        back.reply(received, FeaturesReply(1))
    back.receive(frame(3))
    received = back.next()
    assert received is not None
    assert back.acknowledge(received, True) is None
    with pytest.raises(LocalProtocolError, match="not answered"):
        back.reply(received, Ack(0))
    back.receive(frame(3, flags=9))
    received = back.next()
    assert received is not None
    outgoing = back.acknowledge(received, False)
    assert outgoing is not None
    assert outgoing.data == frame(3, struct.pack("<Q", 1), flags=5)
    assert back.acknowledge(received, False) is None


def test_need_reply_counts_only_with_reply_ack() -> None:
    back = Responder(FRONTEND_TABLE, opened(ALL & ~ProtocolFeatures.REPLY_ACK))
    back.receive(frame(3, flags=9))
    received = back.next()
    assert received is not None
    assert not received.needs_reply
    # ... except where QEMU waits all the same.
    back.receive(frame(29, flags=9))
    received = back.next()
    assert received is not None
    assert received.needs_reply


def test_set_protocol_features_decides_on_its_own_acknowledgement() -> None:
    front = Requester(FRONTEND_TABLE, opened(ProtocolFeatures(0)))
    back = Responder(FRONTEND_TABLE, opened(ProtocolFeatures(0)))
    outgoing, answered = front.request(
        SetProtocolFeatures(ProtocolFeatures.REPLY_ACK), need_reply=True
    )
    assert answered
    back.receive(outgoing.data)
    received = back.next()
    assert received is not None
    assert received.needs_reply
    outgoing, answered = front.request(SetProtocolFeatures(ProtocolFeatures(0)))
    assert not answered


def test_set_log_base_is_answered_with_log_shmfd() -> None:
    for feature, due in ((ALL, True), (ProtocolFeatures(0), False)):
        front = Requester(FRONTEND_TABLE, opened(feature))
        assert front.request(SetLogBase(1, 2))[1] is due
    front = Requester(FRONTEND_TABLE, opened(ProtocolFeatures(0)))
    with pytest.raises(LocalProtocolError, match="LOG_SHMFD"):
        front.request(SetLogBase(1, 2), [0])
    assert front.request(SetLogBaseAddress(5))[1] is False


def test_owner_is_tracked() -> None:
    session = opened()
    front = Requester(FRONTEND_TABLE, session)
    front.request(ResetOwner())
    assert not session.owned
    with pytest.raises(LocalProtocolError, match="after SET_OWNER"):
        front.request(SetVringNum(0, 1))
    front.request(SetOwner())
    front.request(SetVringNum(0, 1))


def test_the_back_end_channel_has_gates_of_its_own() -> None:
    session = opened(ALL & ~ProtocolFeatures.BACKEND_REQ)
    back = Requester(BACKEND_TABLE, session)
    with pytest.raises(LocalProtocolError, match="BACKEND_REQ"):
        back.request(BackendConfigChange())
    session.protocol_features = ALL & ~ProtocolFeatures.BACKEND_SEND_FD
    with pytest.raises(LocalProtocolError, match="BACKEND_SEND_FD"):
        back.request(BackendVringHostNotifier(0, 1, 2), [0])
    assert back.request(BackendVringHostNotifier(0, 0, 0, no_fd=True))
    with pytest.raises(LocalProtocolError, match="not one of the back-end requests"):
        back.request(GetFeatures())
    front = Responder(BACKEND_TABLE, opened())
    front.receive(frame(8, bytes(16)))
    received = front.next()
    assert received is not None
    with pytest.raises(LocalProtocolError, match="must be 0"):
        front.reply(received, Ack(1), [0])
    front.receive(frame(3, struct.pack("<QQQ", 0x200, 0, 0)))
    with pytest.raises(BadPayload, match="bits 9 to 63"):
        front.next()


def test_the_gpu_protocol_has_no_version_and_features_of_its_own() -> None:
    front = Responder(GPU_TABLE)
    with pytest.raises(BadHeader, match="GPU headers have none"):
        feed(front, frame(1))
    front = Responder(GPU_TABLE)
    with pytest.raises(BadHeader, match="NEED_REPLY"):
        feed(front, frame(1, flags=8))
    back = Requester(GPU_TABLE)
    with pytest.raises(LocalProtocolError, match="GPU EDID"):
        back.request(GpuGetEdid(0))
    back.request(GpuGetProtocolFeatures())
    back.receive(frame(1, struct.pack("<Q", 1), flags=4))
    answer = back.next()
    assert answer is not None
    assert answer.message == GpuFeaturesReply(GpuProtocolFeatures.EDID)
    with pytest.raises(LocalProtocolError, match="not offered"):
        back.request(GpuSetProtocolFeatures(GpuProtocolFeatures.DMABUF2))
    back.request(GpuSetProtocolFeatures(GpuProtocolFeatures.EDID))
    assert back.request(GpuGetEdid(0))[1]
    assert back.request(GpuCursorPos(0, 1, 2))[1] is False
    with pytest.raises(BadPayload, match="at most 1024"):
        feed(back, frame(11, bytes(24) + struct.pack("<II", 1025, 0) + bytes(1024), flags=4))
    front = Responder(GPU_TABLE)
    with pytest.raises(BadPayload, match="take 16 bytes"):
        feed(front, frame(8, struct.pack("<5I", 0, 0, 0, 2, 2) + bytes(12), flags=0))


BAD_VALUES: list[tuple[type[Any], tuple[Any, ...], str]] = [
    (SetFeatures, (-1,), "features"),
    (SetFeatures, (1 << 64,), "features"),
    (SetVringNum, (1 << 32, 0), "index"),
    (SetVringKick, (256,), "index"),
    (SetVringKick, (-1,), "index"),
    (SetVringAddr, (0, VringFlags(2), 0, 0, 0, 0), "flags"),
    (SetVringEnable, (0, 2), "enable"),
    (MemoryRegion, (0, 0, 0), "size"),
    (MemoryRegion, (1 << 64, 1, 0), "guest_address"),
    (MemoryRegion, (0, 1, 0, 0, XenMapFlags(4)), "flags"),
    (MemoryRegion, (0, 1, 0, 0, XenMapFlags.FOREIGN | XenMapFlags.GRANT), "flags"),
    (SetMemTable, ((REGION,) * 33,), "regions"),
    (SendRarp, (b"12345",), "mac"),
    (SetStatus, (256,), "status"),
    (StatusReply, (256,), "status"),
    (GetConfig, (0, -1), "size"),
    (GetConfig, (-1, 0), "offset"),
    (GetConfig, (0, 4085), "size"),
    (SetConfig, (4095, b"12"), "offset"),
    (ConfigReply, (0, 2, b""), "flags"),
    (SetDeviceStateFd, (2,), "direction"),
    (DeviceStateReply, (0x200,), "value"),
    (DeviceStateReply, (5,), "value"),
    (ShmemConfigReply, ((0,) * 257,), "sizes"),
    (ShmemConfigReply, ((-1,),), "sizes"),
    (BackendVringHostNotifier, (256, 0, 0), "index"),
    (BackendVringHostNotifier, (0, -1, 0), "size"),
    (BackendVringHostNotifier, (0, 0, 1 << 64), "offset"),
    (BackendShmemMap, (256, 0, 0, 0), "shmid"),
    (BackendShmemMap, (0, (1 << 64) - 1, 0, 2), "fd_offset"),
    (SymmetricSession, (1, 1, 1, 1, 1, 1, 1, 1, bytes(65)), "key"),
    (SymmetricSession, (1, 1, 1, 1, 256, 1, 1, 1), "op_type"),
    (SymmetricSession, (1, 1, 1, 1, 1, 1, 1, 1, b"", bytes(513)), "auth_key"),
    (AsymmetricSession, (1, 1, 1, 1, bytes(1025)), "key"),
    (CreateCryptoSession, (1, AsymmetricSession(1, 1)), "op_code"),
    (CreateCryptoSession, (2, AsymmetricSession(1, 1)), "session"),
    (CreateCryptoSession, (0x402, AsymmetricSession(1, 1), 1 << 63), "session_id"),
    (GpuUpdate, (0, 0, 0, 1, 1, b"123"), "data"),
    (GpuDisplayInfoReply, ((GpuDisplay(0, 0, 1, 1),) * 17,), "displays"),
    (GpuDisplayInfoReply, ((), 1 << 32), "type"),
    (GpuEdidReply, (bytes(1025),), "edid"),
    (IotlbMsg, ((1 << 64) - 1, 2, 0, 0, 2), "iova"),
    (SetLogBase, ((1 << 64) - 1, 1), "mmap_offset"),
]


@pytest.mark.parametrize(("kind", "arguments", "field"), BAD_VALUES)
def test_construction_checks_ranges(
    kind: type[Any], arguments: tuple[Any, ...], field: str
) -> None:
    with pytest.raises(LocalProtocolError) as caught:
        kind(*arguments)
    assert caught.value.field == field
    assert caught.value.rule


def test_every_error_names_the_request_as_the_specification_does() -> None:
    """A value that is made, a request that is refused, one that arrived, an answer: alike."""
    payload = struct.pack("<Q", 0x300)
    with pytest.raises(LocalProtocolError) as made:
        SetVringKick(0x300)
    with pytest.raises(BadPayload) as arrived:
        feed(Responder(FRONTEND_TABLE, opened()), frame(12, payload))
    with pytest.raises(LocalProtocolError) as refused:
        Requester(FRONTEND_TABLE, opened()).request(SetVringKick(0))
    with pytest.raises(LocalProtocolError) as answered:
        ConfigReply(0, 2, b"")
    names = [caught.value.request for caught in (made, arrived, refused, answered)]
    assert names == ["SET_VRING_KICK"] * 3 + ["GET_CONFIG"]
    assert str(made.value).startswith("SET_VRING_KICK.index is ")
    assert str(ConnectionClosed("gone", request="SET_OWNER")) == "SET_OWNER: gone"
    assert str(RequestFailed("SET_OWNER", 7)).startswith("SET_OWNER: the peer answered 0x7")
    for table in (FRONTEND_TABLE, BACKEND_TABLE, GPU_TABLE):
        for rule in table.rules.values():
            assert {kind.request_name for kind in rule.messages} == {rule.name}


def test_construction_takes_keywords_and_defaults() -> None:
    assert SetVringKick(index=1) == SetVringKick(1, False)
    assert MemoryRegion(1, size=2, user_address=3) == MemoryRegion(1, 2, 3)
    with pytest.raises(TypeError, match="missing num"):
        SetVringNum(1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="takes 2"):
        SetVringNum(1, 2, 3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="given twice"):
        SetVringNum(1, index=2)  # type: ignore[call-arg,misc]
    with pytest.raises(TypeError, match="unknown"):
        SetVringNum(1, number=2)  # type: ignore[call-arg]


def test_a_device_state_reply_says_whose_channel_is_used() -> None:
    for value, passed in ((0, True), (0x100, False), (0x101, False)):
        reply = DeviceStateReply(value)
        assert (reply.has_fd, reply.no_fd) == (passed, not passed)
        assert reply.error == value & 0xFF


def test_messages_are_immutable() -> None:
    message: Any = SetVringNum(1, 2)
    with pytest.raises(AttributeError, match="immutable"):
        message.index = 3
    with pytest.raises(AttributeError, match="immutable"):
        del message.index
    assert not hasattr(message, "__dict__")
    assert message != (1, 2)
    match message:
        case SetVringNum(index, num):
            assert (index, num) == (1, 2)


def test_keys_are_never_shown() -> None:
    session = SymmetricSession(1, 1, 1, 1, 1, 1, 1, 1, b"secret-key", b"other-secret")
    message = CreateCryptoSession(CryptoOpcode.CIPHER_CREATE_SESSION, session)
    assert "secret bytes" in repr(message)
    assert "secret-key" not in repr(message)
    assert b"secret-key".hex() not in repr(message)


def test_xen_fields_need_xen_mmap() -> None:
    region = MemoryRegion(0, 4096, 0, 0, XenMapFlags.FOREIGN, 3)
    front = Requester(FRONTEND_TABLE, opened())
    with pytest.raises(LocalProtocolError, match="XEN_MMAP"):
        front.request(AddMemReg(region), [0])
    assert front.waiting == 0


def test_shmem_counts_are_checked() -> None:
    front = Requester(FRONTEND_TABLE, opened())
    from vhost_protocol import GetShmemConfig

    front.request(GetShmemConfig())
    front.receive(frame(44, struct.pack("<II", 2, 0) + struct.pack("<256Q", 1, *(0,) * 255), 5))
    with pytest.raises(BadPayload, match="number of regions with a size"):
        front.next()


def test_short_config_answers() -> None:
    front = Requester(FRONTEND_TABLE, opened())
    front.request(GetConfig(0, 4))
    front.receive(frame(24, b"", flags=5))
    answer = front.next()
    assert answer is not None
    assert answer.message == ConfigReply(0, 0, b"")


def test_shared_object_answers_may_echo_the_request(fds: list[int]) -> None:
    from uuid import UUID

    front = Requester(FRONTEND_TABLE, opened())
    front.request(GetSharedObject(UUID(int=5)))
    front.receive(frame(41, bytes(16), flags=5), [os.dup(fds[0])])
    answer = front.next()
    assert answer is not None
    with answer:
        assert answer.message == SharedObjectReply()


def test_postcopy_answers_carry_addresses(fds: list[int]) -> None:
    session = opened()
    front = Requester(FRONTEND_TABLE, session, strict=False)
    front.request(PostcopyListen(), need_reply=True)
    front.receive(frame(29, bytes(8), flags=5))
    assert front.next() is not None
    outgoing, answered = front.request(SetMemTable((REGION,)), fds[:1])
    assert answered
    assert outgoing.data[4] == 1, "no NEED_REPLY"
    front.receive(frame(5, outgoing.data[12:], flags=5))
    answer = front.next()
    assert answer is not None
    assert answer.message == MemTableReply((REGION,))
    assert front.request(MemTableAck(), need_reply=False)[1] is False
    assert front.request(PostcopyEnd())[1]


def test_errors_can_be_pickled_and_cut_long_values() -> None:
    import pickle

    error = BadPayload("data", b"x" * 500, "too long", request="SET_CONFIG")
    copy = pickle.loads(pickle.dumps(error))
    assert (copy.field, copy.value, copy.rule, copy.request) == (
        error.field,
        error.value,
        error.rule,
        error.request,
    )
    assert len(str(error)) < 200
    late = pickle.loads(pickle.dumps(Timeout(2.5, request="SET_OWNER")))
    assert (late.seconds, late.request) == (2.5, "SET_OWNER")
    no = pickle.loads(pickle.dumps(RequestFailed("SET_OWNER", 7)))
    assert (no.value, no.request) == (7, "SET_OWNER")
    lost = pickle.loads(pickle.dumps(DescriptorsLost("lost", 24, request="SET_OWNER")))
    assert (type(lost), str(lost), lost.errno) == (DescriptorsLost, "SET_OWNER: lost", 24)
    assert lost.request == "SET_OWNER"
    gone = pickle.loads(pickle.dumps(ConnectionClosed("gone", partial=3)))
    assert gone.partial == 3
    assert "SET_CONFIG.data" in str(error)


def test_session_takes_over_what_answers_tell() -> None:
    session = Session("<")
    front = Requester(FRONTEND_TABLE, session)
    for message, reply in (
        (GetFeatures(), frame(1, struct.pack("<Q", 1 << 30), 5)),
        (GetProtocolFeatures(), frame(15, struct.pack("<Q", 3), 5)),
    ):
        front.request(message)
        front.receive(reply)
        assert front.next() is not None
    assert session.offered_features == 1 << 30
    assert session.offered_protocol_features == ProtocolFeatures(3)
    assert ProtocolFeaturesReply(ProtocolFeatures(1 << 40)).features == 1 << 40
    assert MaxMemSlotsReply(509).slots == 509
    assert int(TransferDirection.LOAD) == 1


def test_tables_show_themselves() -> None:
    assert repr(FRONTEND_TABLE) == f"<front-end table of {len(FrontendRequest)} requests>"


def test_headers_can_be_read_and_written_alone() -> None:
    from vhost_protocol import Header, decode_header, encode_header

    for order in "<>":
        header = Header(5, 0xD, 40)
        assert decode_header(encode_header(header, order), order) == header
        assert header.is_reply
        assert header.need_reply
    assert not Header(5, 1, 0).is_reply
    assert not Header(5, 1, 0).need_reply


def test_a_reply_of_another_kinds_size_is_refused() -> None:
    # SET_LOG_BASE may be answered with 8 bytes or none; GET_INFLIGHT_FD with 20 or 24, and an Ack's
    # size is let through by the header to be refused here.
    front = Requester(FRONTEND_TABLE, opened())
    front.request(GetInflightFd(0, 0, 1, 1))
    with pytest.raises(BadSize, match="20 or 24 bytes"):
        feed_reply(front, frame(31, bytes(8), flags=5))


def feed_reply(core: Requester, data: bytes) -> object:
    core.receive(data)
    return core.next()


def test_answers_show_themselves() -> None:
    front = Requester(FRONTEND_TABLE, opened())
    front.request(GetFeatures())
    front.receive(frame(1, bytes(8), flags=5))
    answer = front.next()
    assert repr(answer) == "<Answered FeaturesReply(features=0) fds=[]>"
