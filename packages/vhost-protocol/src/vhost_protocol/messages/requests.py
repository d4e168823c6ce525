"""Requests of the front-end, each a class with the specification's name.

A descriptor that a message brings is never part of the value: it travels beside it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .constants import (
    MAX_CONFIG_SIZE,
    MAX_TABLE_REGIONS,
    NO_FD,
    ConfigFlags,
    FrontendRequest,
    IotlbType,
    MigrationPhase,
    ProtocolFeatures,
    TransferDirection,
    VringFlags,
)
from .message import (
    Converters,
    Message,
    ReplyT,
    Request,
    Wire,
    known_bits,
    member,
    to_bool,
)
from .replies import (
    Ack,
    ConfigReply,
    CryptoSessionReply,
    DeviceStateReply,
    EmptyReply,
    FeaturesReply,
    InflightReply,
    MaxMemSlotsReply,
    MemRegReply,
    MemTableReply,
    ProtocolFeaturesReply,
    QueueNumReply,
    SharedObjectReply,
    ShmemConfigReply,
    StatusReply,
    VringBaseReply,
)
from .shapes import Iotlb, RingOnly, SharedObject
from .values import (
    CRYPTO_SIZE,
    AsymmetricSession,
    MemoryRegion,
    SymmetricSession,
    check_config,
    check_crypto,
    decode_config,
    decode_crypto,
    decode_region,
    decode_regions,
    encode_config,
    encode_crypto,
    encode_region,
    encode_regions,
    known_protocol_features,
    region_sizes,
    table_sizes,
)

if TYPE_CHECKING:
    pass


class GetFeatures(Request[FeaturesReply], code=FrontendRequest.GET_FEATURES, layout=""):
    """Ask for the VIRTIO features the back-end offers."""


class SetFeatures(Request[Ack], code=FrontendRequest.SET_FEATURES, layout="Q"):
    """Set the negotiated VIRTIO feature bits."""

    features: int


class SetOwner(Request[Ack], code=FrontendRequest.SET_OWNER, layout=""):
    """Start a session: the sender owns the device."""


class ResetOwner(Request[Ack], code=FrontendRequest.RESET_OWNER, layout=""):
    """Deprecated; back-ends ignore it or disable all rings."""


class SetMemTable(Request[MemTableReply], code=FrontendRequest.SET_MEM_TABLE):
    """Replace the memory table; one descriptor for each region, in the same order.

    Answered with the mapped addresses in postcopy, otherwise with an Ack if one is asked for.
    """

    regions: tuple[MemoryRegion, ...]

    _sizes = table_sizes()
    _convert: ClassVar[Converters] = {"regions": tuple}

    def _check(self) -> None:
        if len(self.regions) > MAX_TABLE_REGIONS:
            rule = f"at most {MAX_TABLE_REGIONS} regions in one message"
            raise self._wrong("regions", len(self.regions), rule)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build((decode_regions(cls, payload, wire),))

    def _encode(self, wire: Wire) -> bytes:
        return encode_regions(self.regions, wire)


class _BasesTaken(Request[Ack], layout="Q"):
    _abstract = True

    value: int = 0

    _sizes = (0, 8)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build(cls._structs[wire.order].unpack(payload.ljust(8, b"\0")))


class MemTableAck(_BasesTaken, code=FrontendRequest.SET_MEM_TABLE):
    """Postcopy: the front-end has taken the addresses of SET_MEM_TABLE's answer; faults may come.

    The specification calls this an empty SET_MEM_TABLE; QEMU sends a u64, 0 for success.
    """


class AddMemRegAck(_BasesTaken, code=FrontendRequest.ADD_MEM_REG):
    """Postcopy with memory slots, as QEMU does it: the ADD_MEM_REG answers have been taken."""


class RemMemRegAck(_BasesTaken, code=FrontendRequest.REM_MEM_REG):
    """The same as AddMemRegAck, when regions were only removed."""


class SetLogBase(Request[Ack], code=FrontendRequest.SET_LOG_BASE, layout="QQ"):
    """Set the dirty log: size of the area and offset in the descriptor, in bytes."""

    mmap_size: int
    mmap_offset: int

    def _check(self) -> None:
        if self.mmap_size + self.mmap_offset >= 1 << 64:
            raise self._wrong("mmap_offset", self.mmap_offset, "the area ends beyond 64 bits")


class SetLogBaseAddress(Request[Ack], code=FrontendRequest.SET_LOG_BASE, layout="Q"):
    """SET_LOG_BASE without LOG_SHMFD in the specification's form: only an address."""

    address: int


class SetLogFd(Request[Ack], code=FrontendRequest.SET_LOG_FD, layout=""):
    """Set the descriptor that is signalled when the log is written."""


class SetVringNum(Request[Ack], code=FrontendRequest.SET_VRING_NUM, layout="II"):
    """Set the size of a ring, in descriptors."""

    index: int
    num: int


class SetVringAddr(Request[Ack], code=FrontendRequest.SET_VRING_ADDR, layout="IIQQQQ"):
    """Set where a ring lies: user addresses, or IOVAs with VIRTIO_F_IOMMU_PLATFORM, or guest
    addresses with GPA_ADDRESSES.  ``log`` is the guest address logged for the used ring."""

    index: int
    flags: VringFlags
    descriptor: int
    used: int
    available: int
    log: int = 0

    _convert: ClassVar[Converters] = {"flags": known_bits(VringFlags, 1)}


class SetVringBase(Request[Ack], code=FrontendRequest.SET_VRING_BASE, layout="II"):
    """Set where a ring starts; ``base`` as in VringBaseReply."""

    index: int
    base: int


class GetVringBase(RingOnly[VringBaseReply], code=FrontendRequest.GET_VRING_BASE):
    """Stop a ring once its requests are done and ask where it stands.  ``num`` is reserved."""


class GetVringBaseSkipDrain(
    RingOnly[VringBaseReply], code=FrontendRequest.GET_VRING_BASE_SKIP_DRAIN
):
    """Stop a ring at once; unfinished requests stay in the in-flight area."""


class _VringFile(Request[Ack]):
    """A ring index (bits 0-7) and whether no descriptor comes along (bit 8)."""

    _abstract = True

    index: int
    no_fd: bool = False

    _sizes = (8,)
    _convert: ClassVar[Converters] = {"no_fd": bool}

    def _check(self) -> None:
        if not 0 <= self.index <= 0xFF:
            raise self._wrong("index", self.index, "must fit 8 bits")

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        value = Ack._structs[wire.order].unpack(payload)[0]
        if value > 0x1FF:
            raise cls._wrong("u64", value, "bits 9 to 63 are reserved")
        return cls._build((value & 0xFF, value & NO_FD))

    def _encode(self, wire: Wire) -> bytes:
        return Ack._structs[wire.order].pack(self.index | (NO_FD if self.no_fd else 0))


class SetVringKick(_VringFile, code=FrontendRequest.SET_VRING_KICK):
    """Start a ring and set the descriptor that the driver kicks; ``no_fd``: poll instead."""


class SetVringCall(_VringFile, code=FrontendRequest.SET_VRING_CALL):
    """Set the descriptor that the back-end signals for used buffers; ``no_fd``: none."""


class SetVringErr(_VringFile, code=FrontendRequest.SET_VRING_ERR):
    """Set the descriptor that the back-end signals for errors; ``no_fd``: none."""


class GetProtocolFeatures(
    Request[ProtocolFeaturesReply], code=FrontendRequest.GET_PROTOCOL_FEATURES, layout=""
):
    """Ask for the protocol features the back-end offers."""


class SetProtocolFeatures(Request[Ack], code=FrontendRequest.SET_PROTOCOL_FEATURES, layout="Q"):
    """Set the negotiated protocol features."""

    features: ProtocolFeatures

    _convert: ClassVar[Converters] = {"features": known_protocol_features}


class GetQueueNum(Request[QueueNumReply], code=FrontendRequest.GET_QUEUE_NUM, layout=""):
    """Ask how many queues the back-end can have."""


class SetVringEnable(Request[Ack], code=FrontendRequest.SET_VRING_ENABLE, layout="II"):
    """Enable or disable a ring."""

    index: int
    enable: bool

    _convert: ClassVar[Converters] = {"enable": to_bool}


class SendRarp(Request[Ack], code=FrontendRequest.SEND_RARP, layout="6s2x"):
    """Announce a migrated guest's MAC address (6 bytes) on the network."""

    mac: bytes


class NetSetMtu(Request[Ack], code=FrontendRequest.NET_SET_MTU, layout="Q"):
    """Tell the host's MTU, in bytes."""

    mtu: int


class SetBackendReqFd(Request[Ack], code=FrontendRequest.SET_BACKEND_REQ_FD, layout=""):
    """Pass the socket for requests of the back-end."""


class IotlbMsg(Iotlb, code=FrontendRequest.IOTLB_MSG):
    """Update or invalidate entries of the device IOTLB; addresses and sizes in bytes.

    The access of an invalidation means nothing.
    """

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        *where, access, kind = cls._structs[wire.order].unpack(payload)
        if kind == IotlbType.INVALIDATE:
            access &= 3  # QEMU sends what lies on its stack there
        return cls._build((*where, access, kind))


class SetVringEndian(Request[Ack], code=FrontendRequest.SET_VRING_ENDIAN, layout="II"):
    """Set the byte order of a ring of a legacy device."""

    index: int
    big_endian: bool

    _convert: ClassVar[Converters] = {"big_endian": to_bool}


class GetConfig(Request[ConfigReply], code=FrontendRequest.GET_CONFIG):
    """Read ``size`` bytes at ``offset`` of the configuration space."""

    offset: int
    size: int
    flags: ConfigFlags = ConfigFlags.WRITABLE

    _sizes = range(12, 12 + MAX_CONFIG_SIZE + 1)
    _convert: ClassVar[Converters] = {"flags": known_bits(ConfigFlags, 1)}

    def _check(self) -> None:
        if self.size < 0:
            raise self._wrong("size", self.size, "must not be negative")
        check_config(self, self.offset, self.flags, self.size)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        offset, flags, data = decode_config(cls, payload, wire)
        return cls._build((offset, len(data), flags))

    def _encode(self, wire: Wire) -> bytes:
        return encode_config(self.offset, self.flags, bytes(self.size), wire)


class SetConfig(Request[Ack], code=FrontendRequest.SET_CONFIG):
    """Write to the configuration space."""

    offset: int
    data: bytes
    flags: ConfigFlags = ConfigFlags.WRITABLE

    _sizes = range(12, 12 + MAX_CONFIG_SIZE + 1)
    _convert: ClassVar[Converters] = {"flags": known_bits(ConfigFlags, 1)}

    def _check(self) -> None:
        check_config(self, self.offset, self.flags, len(self.data))

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        offset, flags, data = decode_config(cls, payload, wire)
        return cls._build((offset, data, flags))

    def _encode(self, wire: Wire) -> bytes:
        return encode_config(self.offset, self.flags, self.data, wire)


class CreateCryptoSession(Request[CryptoSessionReply], code=FrontendRequest.CREATE_CRYPTO_SESSION):
    """Create a crypto session (the layout of QEMU 8.1 and newer).

    The operation decides between symmetric and asymmetric parameters.
    """

    op_code: int
    session: SymmetricSession | AsymmetricSession
    session_id: int = 0

    _sizes = (CRYPTO_SIZE,)

    def _check(self) -> None:
        check_crypto(self, self.op_code, self.session, self.session_id)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build(decode_crypto(cls, payload, wire))

    def _encode(self, wire: Wire) -> bytes:
        return encode_crypto(self.op_code, self.session, self.session_id, wire)


class CloseCryptoSession(Request[Ack], code=FrontendRequest.CLOSE_CRYPTO_SESSION, layout="Q"):
    """Close a crypto session."""

    session_id: int


class PostcopyAdvise(Request[EmptyReply], code=FrontendRequest.POSTCOPY_ADVISE, layout=""):
    """A postcopy migration may come; answered with a userfaultfd."""


class PostcopyListen(Request[Ack], code=FrontendRequest.POSTCOPY_LISTEN, layout=""):
    """Postcopy starts: register the memory with the userfaultfd."""


class PostcopyEnd(Request[Ack], code=FrontendRequest.POSTCOPY_END, layout=""):
    """Postcopy is done: close the userfaultfd."""


class _Inflight(Request[ReplyT], layout="QQHH4x"):
    # The specification shows 20 bytes; QEMU, DPDK and rust-vmm send a C structure of 24.
    _abstract = True

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    _sizes = (20, 24)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build(cls._structs[wire.order].unpack(payload.ljust(24, b"\0")))


class GetInflightFd(_Inflight[InflightReply], code=FrontendRequest.GET_INFLIGHT_FD):
    """Ask for an area to track in-flight requests in.

    Front-ends leave ``mmap_size`` and ``mmap_offset`` 0.
    """


class SetInflightFd(_Inflight[Ack], code=FrontendRequest.SET_INFLIGHT_FD):
    """Give an area of an earlier connection back; sizes and offsets in bytes."""


class GpuSetSocket(Request[Ack], code=FrontendRequest.GPU_SET_SOCKET, layout=""):
    """Pass the socket of the GPU protocol."""


class ResetDevice(Request[Ack], code=FrontendRequest.RESET_DEVICE, layout=""):
    """Disable all rings and reset the device."""


class VringKick(RingOnly[Ack], code=FrontendRequest.VRING_KICK):
    """In-band kick of a ring.  ``num`` is reserved."""


class GetMaxMemSlots(Request[MaxMemSlotsReply], code=FrontendRequest.GET_MAX_MEM_SLOTS, layout=""):
    """Ask how many memory regions the back-end can have."""


class _OneRegion(Request[ReplyT]):
    _abstract = True

    region: MemoryRegion

    _sizes = region_sizes()

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build((decode_region(cls, payload, wire),))

    def _encode(self, wire: Wire) -> bytes:
        return encode_region(self.region, wire)


class AddMemReg(_OneRegion[MemRegReply], code=FrontendRequest.ADD_MEM_REG):
    """Add a region to the memory table; one descriptor."""


class RemMemReg(_OneRegion[Ack], code=FrontendRequest.REM_MEM_REG):
    """Remove the region of this guest address, user address and size.

    Some front-ends pass a descriptor; it has no meaning and must be closed.
    """


class SetStatus(Request[Ack], code=FrontendRequest.SET_STATUS, layout="Q"):
    """Set the VIRTIO device status byte."""

    status: int

    def _check(self) -> None:
        if self.status > 0xFF:
            raise self._wrong("status", self.status, "the device status has 8 bits")


class GetStatus(Request[StatusReply], code=FrontendRequest.GET_STATUS, layout=""):
    """Ask for the VIRTIO device status byte."""


class GetSharedObject(SharedObject[SharedObjectReply], code=FrontendRequest.GET_SHARED_OBJECT):
    """Ask for the dma-buf of a shared object."""


class SetDeviceStateFd(
    Request[DeviceStateReply], code=FrontendRequest.SET_DEVICE_STATE_FD, layout="II"
):
    """Pass a channel for the device's state in migration."""

    direction: TransferDirection
    phase: MigrationPhase = MigrationPhase.STOPPED

    _convert: ClassVar[Converters] = {
        "direction": member(TransferDirection),
        "phase": member(MigrationPhase),
    }


class CheckDeviceState(Request[Ack], code=FrontendRequest.CHECK_DEVICE_STATE, layout=""):
    """Ask whether the state was transferred completely."""


class GetShmemConfig(Request[ShmemConfigReply], code=FrontendRequest.GET_SHMEM_CONFIG, layout=""):
    """Ask for the sizes of the device's shared memory regions."""
