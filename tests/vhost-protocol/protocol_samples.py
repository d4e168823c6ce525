"""Messages and their bytes, worked out from the specification and QEMU's C structures.

A payload is written as its fields: ``(bytes, value)`` for a number, ``bytes`` for the rest.
Nothing here uses the package's own layouts, so that an error in one of them shows.
"""

from __future__ import annotations

from typing import Literal, NamedTuple
from uuid import UUID

from vhost_protocol import (
    Ack,
    AddMemReg,
    AddMemRegAck,
    AsymmetricSession,
    BackendConfigChange,
    BackendIotlbMsg,
    BackendSharedObjectAdd,
    BackendSharedObjectLookup,
    BackendSharedObjectRemove,
    BackendShmemMap,
    BackendShmemUnmap,
    BackendVringCall,
    BackendVringErr,
    BackendVringHostNotifier,
    CheckDeviceState,
    CloseCryptoSession,
    ConfigFlags,
    ConfigReply,
    CreateCryptoSession,
    CryptoOpcode,
    CryptoSessionReply,
    DeviceStateReply,
    EmptyReply,
    FeaturesReply,
    GetConfig,
    GetFeatures,
    GetInflightFd,
    GetMaxMemSlots,
    GetProtocolFeatures,
    GetQueueNum,
    GetSharedObject,
    GetShmemConfig,
    GetStatus,
    GetVringBase,
    GetVringBaseSkipDrain,
    GpuCursorPos,
    GpuCursorPosHide,
    GpuCursorUpdate,
    GpuDisplay,
    GpuDisplayInfoReply,
    GpuDmabufScanout,
    GpuDmabufScanout2,
    GpuDmabufUpdate,
    GpuEdidReply,
    GpuFeaturesReply,
    GpuGetDisplayInfo,
    GpuGetEdid,
    GpuGetProtocolFeatures,
    GpuProtocolFeatures,
    GpuScanout,
    GpuSetProtocolFeatures,
    GpuSetSocket,
    GpuUpdate,
    InflightReply,
    IotlbAccess,
    IotlbMsg,
    IotlbType,
    MaxMemSlotsReply,
    MemoryRegion,
    MemRegReply,
    MemTableAck,
    MemTableReply,
    Message,
    MigrationPhase,
    NetSetMtu,
    PostcopyAdvise,
    PostcopyEnd,
    PostcopyListen,
    ProtocolFeatures,
    ProtocolFeaturesReply,
    QueueNumReply,
    RemMemReg,
    RemMemRegAck,
    ResetDevice,
    ResetOwner,
    SendRarp,
    SetBackendReqFd,
    SetConfig,
    SetDeviceStateFd,
    SetFeatures,
    SetInflightFd,
    SetLogBase,
    SetLogBaseAddress,
    SetLogFd,
    SetMemTable,
    SetOwner,
    SetProtocolFeatures,
    SetStatus,
    SetVringAddr,
    SetVringBase,
    SetVringCall,
    SetVringEnable,
    SetVringEndian,
    SetVringErr,
    SetVringKick,
    SetVringNum,
    SharedObjectReply,
    ShmemConfigReply,
    ShmemMapFlags,
    StatusReply,
    SymmetricSession,
    TransferDirection,
    VringBaseReply,
    VringFlags,
    VringKick,
    XenMapFlags,
)

Field = tuple[int, int] | bytes


class Vector(NamedTuple):
    """A message, its request code, its payload, and what comes along."""

    table: str
    code: int
    message: Message
    payload: tuple[Field, ...] = ()
    reply: bool = False
    fds: int = 0
    xen: bool = False
    postcopy: bool = False

    def bytes_of(self, byteorder: str) -> bytes:
        """The payload in one byte order; ``bytes`` fields are the same in both."""
        order: Literal["little", "big"] = "little" if byteorder == "little" else "big"
        return b"".join(
            field if isinstance(field, bytes) else field[1].to_bytes(field[0], order)
            for field in self.payload
        )

    def frame(self, byteorder: str) -> bytes:
        """Header and payload, as sent without NEED_REPLY."""
        order: Literal["little", "big"] = "little" if byteorder == "little" else "big"
        payload = self.bytes_of(byteorder)
        flags = (0 if self.table == "gpu" else 1) | (4 if self.reply else 0)
        words = (self.code, flags, len(payload))
        return b"".join(word.to_bytes(4, order) for word in words) + payload


def u8(value: int) -> Field:
    return 1, value


def u16(value: int) -> Field:
    return 2, value


def u32(value: int) -> Field:
    return 4, value


def u64(value: int) -> Field:
    return 8, value


PLAIN = MemoryRegion(0x1_0000_0000, 0x4000_0000, 0x7F12_3456_7000, 0x8000_0000)
OTHER = MemoryRegion(0, 0xA_0000, 0x7F00_0000_0000)
XEN = MemoryRegion(0x1000, 0x2000, 0x3000, 0, XenMapFlags.GRANT | XenMapFlags.NO_ADVANCE_MAP, 7)
PLAIN_FIELDS = (u64(0x1_0000_0000), u64(0x4000_0000), u64(0x7F12_3456_7000), u64(0x8000_0000))
OTHER_FIELDS = (u64(0), u64(0xA_0000), u64(0x7F00_0000_0000), u64(0))
XEN_FIELDS = (u64(0x1000), u64(0x2000), u64(0x3000), u64(0), u32(0x102), u32(7))
OBJECT = UUID("00112233-4455-6677-8899-aabbccddeeff")
OBJECT_BYTES = bytes.fromhex("00112233445566778899aabbccddeeff")
SYMMETRIC = SymmetricSession(
    cipher_algorithm=3,
    hash_algorithm=5,
    hash_result_length=32,
    additional_length=12,
    op_type=1,
    direction=2,
    hash_mode=4,
    chain_order=6,
    key=b"k" * 16,
    auth_key=b"a" * 20,
)
# op_code; CryptoDevBackendSymSessionInfo: six u32, four u8, 4 bytes to align, two pointers (48
# bytes); key[64]; auth_key[512]; up to the larger member of the union (32 + 1024 bytes); id.
SYMMETRIC_FIELDS = (
    u64(0x002),
    *(u32(n) for n in (3, 16, 5, 32, 20, 12)),
    *(u8(n) for n in (1, 2, 4, 6)),
    bytes(4 + 16),
    b"k" * 16 + bytes(48),
    b"a" * 20 + bytes(492),
    bytes(1056 - 624),
)
ASYMMETRIC = AsymmetricSession(
    algorithm=1, key_type=2, padding_algorithm=1, hash_algorithm=3, key=b"\x30" * 300
)
# op_code; CryptoDevBackendAsymSessionInfo: three u32, 4 bytes to align, a pointer, two u32 of the
# RSA parameters (32 bytes); key[1024]; id.
ASYMMETRIC_FIELDS = (
    u64(0x402),
    *(u32(n) for n in (1, 2, 300)),
    bytes(4 + 8),
    *(u32(n) for n in (1, 3)),
    b"\x30" * 300 + bytes(724),
)
CURSOR = bytes(range(256)) * 64
EDID = b"\x00\xff\xff\xff\xff\xff\xff\x00" + bytes(120)
#: Every feature that has a name.
ALL = ProtocolFeatures(sum(ProtocolFeatures))


def _control(kind: int) -> bytes:
    """virtio_gpu_ctrl_hdr, little-endian in any case."""
    return kind.to_bytes(4, "little") + bytes(20)


def _little(*words: int) -> bytes:
    return b"".join(word.to_bytes(4, "little") for word in words)


def _frontend() -> list[Vector]:
    fe = "front-end"
    return [
        Vector(fe, 1, GetFeatures()),
        Vector(fe, 1, FeaturesReply(0x1_4000_0046), (u64(0x1_4000_0046),), reply=True),
        Vector(fe, 2, SetFeatures(0x1_4000_0046), (u64(0x1_4000_0046),)),
        Vector(fe, 3, SetOwner()),
        Vector(fe, 4, ResetOwner()),
        Vector(
            fe,
            5,
            SetMemTable((PLAIN, OTHER)),
            (u32(2), u32(0), *PLAIN_FIELDS, *OTHER_FIELDS),
            fds=2,
        ),
        Vector(fe, 5, SetMemTable(()), (u32(0), u32(0))),
        Vector(fe, 5, SetMemTable((XEN,)), (u32(1), u32(0), *XEN_FIELDS), fds=1, xen=True),
        Vector(fe, 5, MemTableAck(0), (u64(0),), postcopy=True),
        Vector(
            fe,
            5,
            MemTableReply((PLAIN,)),
            (u32(1), u32(0), *PLAIN_FIELDS),
            reply=True,
            postcopy=True,
        ),
        Vector(fe, 6, SetLogBase(0x8000, 0x1000), (u64(0x8000), u64(0x1000)), fds=1),
        Vector(fe, 6, SetLogBaseAddress(0x7F00_0000_1000), (u64(0x7F00_0000_1000),)),
        Vector(fe, 6, Ack(0), (u64(0),), reply=True),
        Vector(fe, 6, EmptyReply(), (), reply=True),
        Vector(fe, 7, SetLogFd(), fds=1),
        Vector(fe, 8, SetVringNum(1, 256), (u32(1), u32(256))),
        Vector(
            fe,
            9,
            SetVringAddr(2, VringFlags.LOG, 0x1111_0000, 0x2222_0000, 0x3333_0000, 0x4444_0000),
            (u32(2), u32(1), *(u64(n << 16) for n in (0x1111, 0x2222, 0x3333, 0x4444))),
        ),
        Vector(fe, 10, SetVringBase(1, 0x8001_7FFF), (u32(1), u32(0x8001_7FFF))),
        Vector(fe, 11, GetVringBase(3), (u32(3), u32(0))),
        Vector(fe, 11, VringBaseReply(3, 0xFFFE), (u32(3), u32(0xFFFE)), reply=True),
        Vector(fe, 12, SetVringKick(255), (u64(0xFF),), fds=1),
        Vector(fe, 12, SetVringKick(1, no_fd=True), (u64(0x101),)),
        Vector(fe, 13, SetVringCall(2), (u64(2),), fds=1),
        Vector(fe, 14, SetVringErr(0, no_fd=True), (u64(0x100),)),
        Vector(fe, 15, GetProtocolFeatures()),
        Vector(
            fe,
            15,
            ProtocolFeaturesReply(ProtocolFeatures(0xFF_FFFF)),
            (u64(0xFF_FFFF),),
            reply=True,
        ),
        Vector(fe, 16, SetProtocolFeatures(ProtocolFeatures(0xFF_FFFF)), (u64(0xFF_FFFF),)),
        Vector(fe, 17, GetQueueNum()),
        Vector(fe, 17, QueueNumReply(8), (u64(8),), reply=True),
        Vector(fe, 18, SetVringEnable(4, True), (u32(4), u32(1))),
        Vector(fe, 19, SendRarp(b"\x52\x54\0\x12\x34\x56"), (b"\x52\x54\0\x12\x34\x56\0\0",)),
        Vector(fe, 20, NetSetMtu(9000), (u64(9000),)),
        Vector(fe, 21, SetBackendReqFd(), fds=1),
        Vector(
            fe,
            22,
            IotlbMsg(0x1000, 0x2000, 0x7F00_0000_0000, IotlbAccess.READ_WRITE, IotlbType.UPDATE),
            (u64(0x1000), u64(0x2000), u64(0x7F00_0000_0000), u8(3), u8(2), bytes(6)),
        ),
        Vector(fe, 22, Ack(1), (u64(1),), reply=True),
        Vector(fe, 23, SetVringEndian(1, True), (u32(1), u32(1))),
        Vector(fe, 24, GetConfig(4, 8), (u32(4), u32(8), u32(0), bytes(8))),
        Vector(
            fe,
            24,
            ConfigReply(4, 0, b"configur"),
            (u32(4), u32(8), u32(0), b"configur"),
            reply=True,
        ),
        Vector(fe, 24, ConfigReply(0, 0, b""), (), reply=True),
        Vector(
            fe,
            25,
            SetConfig(32, b"\x01", ConfigFlags.LIVE_MIGRATION),
            (u32(32), u32(1), u32(1), b"\x01"),
        ),
        Vector(
            fe,
            26,
            CreateCryptoSession(CryptoOpcode.CIPHER_CREATE_SESSION, SYMMETRIC),
            (*SYMMETRIC_FIELDS, u64(0)),
        ),
        Vector(
            fe,
            26,
            CreateCryptoSession(CryptoOpcode.AKCIPHER_CREATE_SESSION, ASYMMETRIC, 5),
            (*ASYMMETRIC_FIELDS, u64(5)),
        ),
        Vector(
            fe,
            26,
            CryptoSessionReply(CryptoOpcode.CIPHER_CREATE_SESSION, SYMMETRIC, -1),
            (*SYMMETRIC_FIELDS, u64((1 << 64) - 1)),
            reply=True,
        ),
        Vector(fe, 27, CloseCryptoSession(9), (u64(9),)),
        Vector(fe, 28, PostcopyAdvise()),
        Vector(fe, 28, EmptyReply(), (), reply=True, fds=1),
        Vector(fe, 29, PostcopyListen()),
        Vector(fe, 30, PostcopyEnd()),
        Vector(fe, 30, Ack(0), (u64(0),), reply=True),
        Vector(fe, 31, GetInflightFd(0, 0, 2, 128), (u64(0), u64(0), u16(2), u16(128), bytes(4))),
        Vector(
            fe,
            31,
            InflightReply(0x3000, 0x1000, 2, 128),
            (u64(0x3000), u64(0x1000), u16(2), u16(128), bytes(4)),
            reply=True,
            fds=1,
        ),
        Vector(
            fe,
            32,
            SetInflightFd(0x3000, 0, 2, 128),
            (u64(0x3000), u64(0), u16(2), u16(128), bytes(4)),
            fds=1,
        ),
        Vector(fe, 33, GpuSetSocket(), fds=1),
        Vector(fe, 34, ResetDevice()),
        Vector(fe, 35, VringKick(6), (u32(6), u32(0))),
        Vector(fe, 36, GetMaxMemSlots()),
        Vector(fe, 36, MaxMemSlotsReply(509), (u64(509),), reply=True),
        Vector(fe, 37, AddMemReg(PLAIN), (u64(0), *PLAIN_FIELDS), fds=1),
        Vector(fe, 37, AddMemReg(XEN), (u64(0), *XEN_FIELDS), fds=1, xen=True),
        Vector(fe, 37, AddMemRegAck(0), (u64(0),), postcopy=True),
        Vector(fe, 37, MemRegReply(PLAIN), (u64(0), *PLAIN_FIELDS), reply=True, postcopy=True),
        Vector(fe, 38, RemMemReg(OTHER), (u64(0), *OTHER_FIELDS)),
        Vector(fe, 38, RemMemReg(OTHER), (u64(0), *OTHER_FIELDS), fds=1),
        Vector(fe, 38, RemMemRegAck(0), (u64(0),), postcopy=True),
        Vector(fe, 39, SetStatus(0x0F), (u64(15),)),
        Vector(fe, 40, GetStatus()),
        Vector(fe, 40, StatusReply(0x0F), (u64(15),), reply=True),
        Vector(fe, 41, GetSharedObject(OBJECT), (OBJECT_BYTES,)),
        Vector(fe, 41, SharedObjectReply(), (), reply=True, fds=1),
        Vector(
            fe,
            42,
            SetDeviceStateFd(TransferDirection.LOAD, MigrationPhase.STOPPED),
            (u32(1), u32(0)),
            fds=1,
        ),
        Vector(fe, 42, DeviceStateReply(0x100), (u64(0x100),), reply=True),
        Vector(fe, 42, DeviceStateReply(0), (u64(0),), reply=True, fds=1),
        Vector(fe, 42, DeviceStateReply(0x105), (u64(0x105),), reply=True),
        Vector(fe, 43, CheckDeviceState()),
        Vector(fe, 43, Ack(0), (u64(0),), reply=True),
        Vector(fe, 44, GetShmemConfig()),
        Vector(
            fe,
            44,
            ShmemConfigReply((0x1000, 0, 0x20_0000)),
            (u32(2), u32(0), u64(0x1000), u64(0), u64(0x20_0000), bytes(253 * 8)),
            reply=True,
        ),
        Vector(fe, 45, GetVringBaseSkipDrain(1), (u32(1), u32(0))),
        Vector(fe, 45, VringBaseReply(1, 9), (u32(1), u32(9)), reply=True),
    ]


def _backend() -> list[Vector]:
    be = "back-end"
    area = (bytes(7), u64(0x1000), u64(0x2000), u64(0x3000))
    return [
        Vector(
            be,
            1,
            BackendIotlbMsg(0xDEAD000, 0, 0, IotlbAccess.WRITE, IotlbType.MISS),
            (u64(0xDEAD000), u64(0), u64(0), u8(2), u8(1), bytes(6)),
        ),
        Vector(be, 1, Ack(0), (u64(0),), reply=True),
        Vector(be, 2, BackendConfigChange()),
        Vector(
            be,
            3,
            BackendVringHostNotifier(1, 0x1000, 0x2000),
            (u64(1), u64(0x1000), u64(0x2000)),
            fds=1,
        ),
        Vector(be, 3, BackendVringHostNotifier(1, 0, 0, no_fd=True), (u64(0x101), u64(0), u64(0))),
        Vector(be, 4, BackendVringCall(2), (u32(2), u32(0))),
        Vector(be, 5, BackendVringErr(3), (u32(3), u32(0))),
        Vector(be, 6, BackendSharedObjectAdd(OBJECT), (OBJECT_BYTES,)),
        Vector(be, 7, BackendSharedObjectRemove(OBJECT), (OBJECT_BYTES,)),
        Vector(be, 8, BackendSharedObjectLookup(OBJECT), (OBJECT_BYTES,)),
        Vector(be, 8, Ack(0), (u64(0),), reply=True, fds=1),
        Vector(
            be,
            9,
            BackendShmemMap(5, 0x1000, 0x2000, 0x3000, ShmemMapFlags.READ_WRITE),
            (u8(5), *area, u64(1)),
            fds=1,
        ),
        Vector(be, 10, BackendShmemUnmap(5, 0x1000, 0x2000, 0x3000), (u8(5), *area, u64(0))),
    ]


def _gpu() -> list[Vector]:
    gpu = "gpu"
    dmabuf = (1, 2, 3, 640, 480, 1024, 768, 4096, 1)
    words = tuple(u32(n) for n in dmabuf)
    display = (0, 0, 1920, 1080, 1, 0)
    return [
        Vector(gpu, 1, GpuGetProtocolFeatures()),
        Vector(
            gpu,
            1,
            GpuFeaturesReply(GpuProtocolFeatures.EDID | GpuProtocolFeatures.DMABUF2),
            (u64(3),),
            reply=True,
        ),
        Vector(gpu, 2, GpuSetProtocolFeatures(GpuProtocolFeatures.EDID), (u64(1),)),
        Vector(gpu, 3, GpuGetDisplayInfo()),
        Vector(
            gpu,
            3,
            GpuDisplayInfoReply((GpuDisplay(*display),)),
            (_control(0x1101), _little(*display), bytes(15 * 24)),
            reply=True,
        ),
        Vector(gpu, 4, GpuCursorPos(1, 20, 30), (u32(1), u32(20), u32(30))),
        Vector(gpu, 5, GpuCursorPosHide(1, 20, 30), (u32(1), u32(20), u32(30))),
        Vector(
            gpu,
            6,
            GpuCursorUpdate(1, 20, 30, 4, 5, CURSOR),
            (u32(1), u32(20), u32(30), u32(4), u32(5), CURSOR),
        ),
        Vector(gpu, 7, GpuScanout(0, 640, 480), (u32(0), u32(640), u32(480))),
        Vector(
            gpu,
            8,
            GpuUpdate(0, 1, 2, 2, 1, b"12345678"),
            (u32(0), u32(1), u32(2), u32(2), u32(1), b"12345678"),
        ),
        Vector(gpu, 9, GpuDmabufScanout(*dmabuf, 0x3432_5258), (*words, u32(0x3432_5258)), fds=1),
        Vector(gpu, 9, GpuDmabufScanout(*(0,) * 10), tuple([u32(0)] * 10)),
        Vector(
            gpu,
            10,
            GpuDmabufUpdate(0, 1, 2, 3, 4),
            tuple(u32(n) for n in (0, 1, 2, 3, 4)),
        ),
        Vector(gpu, 10, EmptyReply(), (), reply=True),
        Vector(gpu, 11, GpuGetEdid(2), (u32(2),)),
        Vector(
            gpu,
            11,
            GpuEdidReply(EDID),
            (_control(0x1104), _little(128, 0), EDID, bytes(1024 - 128)),
            reply=True,
        ),
        Vector(
            gpu,
            12,
            GpuDmabufScanout2(*dmabuf, 0x3432_5258, 0x0100_0000_0000_0001),
            (*words, u32(0x3432_5258), u64(0x0100_0000_0000_0001)),
            fds=1,
        ),
    ]


VECTORS = [*_frontend(), *_backend(), *_gpu()]
