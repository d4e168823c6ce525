"""Answers, by the requests that get them.  Those without an entry here are answered with Ack."""

from __future__ import annotations

from struct import Struct
from typing import ClassVar

from .constants import (
    MAX_CONFIG_SIZE,
    MAX_SHMEM_REGIONS,
    NO_FD,
    FrontendRequest,
    ProtocolFeatures,
)
from .message import BIG, LITTLE, Converters, Message, Reply, Wire
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


class Ack(Reply, layout="Q"):
    """The u64 of REPLY_ACK and of requests that only report success: 0 is success."""

    value: int = 0


class EmptyReply(Reply, layout=""):
    """A reply without payload, where the descriptor is the answer (or none is)."""


class FeaturesReply(Reply, code=FrontendRequest.GET_FEATURES, layout="Q"):
    """Answer to GET_FEATURES: the VIRTIO feature bits that are offered."""

    features: int


class ProtocolFeaturesReply(Reply, code=FrontendRequest.GET_PROTOCOL_FEATURES, layout="Q"):
    """Answer to GET_PROTOCOL_FEATURES.  Bits we do not know are kept: newer peers have them."""

    features: ProtocolFeatures

    _convert: ClassVar[Converters] = {"features": known_protocol_features}


class VringBaseReply(Reply, code=FrontendRequest.GET_VRING_BASE, layout="II"):
    """Answer to GET_VRING_BASE and GET_VRING_BASE_SKIP_DRAIN.

    ``base``: next available index of a split ring (bits 0-15); of a packed ring, available index
    (bits 0-14) and wrap counter (15), used index (16-30) and wrap counter (31).
    """

    index: int
    base: int


class QueueNumReply(Reply, code=FrontendRequest.GET_QUEUE_NUM, layout="Q"):
    """Answer to GET_QUEUE_NUM: how many queues there can be."""

    num: int


class MaxMemSlotsReply(Reply, code=FrontendRequest.GET_MAX_MEM_SLOTS, layout="Q"):
    """Answer to GET_MAX_MEM_SLOTS."""

    slots: int


class StatusReply(Reply, code=FrontendRequest.GET_STATUS, layout="Q"):
    """Answer to GET_STATUS: the VIRTIO device status byte."""

    status: int

    def _check(self) -> None:
        if self.status > 0xFF:
            raise self._wrong("status", self.status, "the device status has 8 bits")


class ConfigReply(Reply, code=FrontendRequest.GET_CONFIG):
    """Answer to GET_CONFIG.  No data means that the back-end could not read it."""

    offset: int
    flags: int
    data: bytes

    _sizes = range(12 + MAX_CONFIG_SIZE + 1)

    def _check(self) -> None:
        check_config(self, self.offset, self.flags, len(self.data))

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        if not payload:
            return cls._build((0, 0, b""))
        if len(payload) < 12:
            raise cls._wrong("size", len(payload), "must be 0, or 12 and the data")
        offset, flags, data = decode_config(cls, payload, wire)
        return cls._build((offset, flags, data))

    def _encode(self, wire: Wire) -> bytes:
        # An answer of size 0 is how an error is told; a header that says "0 bytes" confuses QEMU.
        return encode_config(self.offset, self.flags, self.data, wire) if self.data else b""


class InflightReply(Reply, code=FrontendRequest.GET_INFLIGHT_FD, layout="QQHH4x"):
    """Answer to GET_INFLIGHT_FD: the area and its fd.  A size of 0 means that there is none."""

    mmap_size: int
    mmap_offset: int
    num_queues: int
    queue_size: int

    _sizes = (20, 24)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build(cls._structs[wire.order].unpack(payload.ljust(24, b"\0")))


class CryptoSessionReply(Reply, code=FrontendRequest.CREATE_CRYPTO_SESSION):
    """Answer to CREATE_CRYPTO_SESSION: the request with ``session_id`` filled in (negative: no)."""

    op_code: int
    session: SymmetricSession | AsymmetricSession
    session_id: int

    _sizes = (CRYPTO_SIZE,)

    def _check(self) -> None:
        check_crypto(self, self.op_code, self.session, self.session_id)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build(decode_crypto(cls, payload, wire))

    def _encode(self, wire: Wire) -> bytes:
        return encode_crypto(self.op_code, self.session, self.session_id, wire)


class DeviceStateReply(Reply, code=FrontendRequest.SET_DEVICE_STATE_FD, layout="Q"):
    """Answer to SET_DEVICE_STATE_FD.

    ``value``: bits 0-7 are an error code, bit 8 (NO_FD) says that no descriptor comes along and the
    front-end's own channel is used.
    """

    value: int = NO_FD

    def _check(self) -> None:
        if self.value > 0x1FF:
            raise self._wrong("value", self.value, "bits 9 to 63 are reserved")
        if self.value & 0xFF and not self.value & NO_FD:
            raise self._wrong("value", self.value, "an error must not come with a descriptor")

    @property
    def error(self) -> int:
        """The error code; 0 is success."""
        return self.value & 0xFF

    @property
    def no_fd(self) -> bool:
        """Whether the channel that the front-end passed is used."""
        return bool(self.value & NO_FD)

    @property
    def has_fd(self) -> bool:
        """Whether the back-end passes a channel of its own."""
        return not self.no_fd


_SHMEM = {o: Struct(f"{o}I4x{MAX_SHMEM_REGIONS}Q") for o in (LITTLE, BIG)}


class ShmemConfigReply(Reply, code=FrontendRequest.GET_SHMEM_CONFIG):
    """Answer to GET_SHMEM_CONFIG: the size of each shared memory region, by its id.

    ``sizes`` has as many entries as the highest id in use needs; 0 is an unused id.
    """

    sizes: tuple[int, ...]

    _sizes = (8 + 8 * MAX_SHMEM_REGIONS,)
    _convert: ClassVar[Converters] = {"sizes": tuple}

    def _check(self) -> None:
        if len(self.sizes) > MAX_SHMEM_REGIONS:
            raise self._wrong("sizes", len(self.sizes), f"at most {MAX_SHMEM_REGIONS} regions")
        for size in self.sizes:
            if not 0 <= size < 1 << 64:
                raise self._wrong("sizes", size, "must fit 64 bits")

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        num, *sizes = _SHMEM[wire.order].unpack(payload)
        used = sum(1 for size in sizes if size)
        if num != used:
            rule = f"must be the number of regions with a size ({used})"
            raise cls._wrong("num_regions", num, rule)
        while sizes and not sizes[-1]:
            sizes.pop()
        return cls._build((tuple(sizes),))

    def _encode(self, wire: Wire) -> bytes:
        padded = self.sizes + (0,) * (MAX_SHMEM_REGIONS - len(self.sizes))
        used = sum(1 for size in self.sizes if size)
        return _SHMEM[wire.order].pack(used, *padded)


class MemTableReply(Reply, code=FrontendRequest.SET_MEM_TABLE):
    """Answer to SET_MEM_TABLE in postcopy: the regions, with where the back-end has mapped them
    in ``user_address``."""

    regions: tuple[MemoryRegion, ...]

    _sizes = table_sizes()
    _convert: ClassVar[Converters] = {"regions": tuple}

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build((decode_regions(cls, payload, wire),))

    def _encode(self, wire: Wire) -> bytes:
        return encode_regions(self.regions, wire)


class MemRegReply(Reply, code=FrontendRequest.ADD_MEM_REG):
    """Answer to ADD_MEM_REG in postcopy: the region, with where the back-end has mapped it in
    ``user_address``."""

    region: MemoryRegion

    _sizes = region_sizes()

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build((decode_region(cls, payload, wire),))

    def _encode(self, wire: Wire) -> bytes:
        return encode_region(self.region, wire)


class SharedObjectReply(Reply, code=FrontendRequest.GET_SHARED_OBJECT, layout=""):
    """Answer to GET_SHARED_OBJECT: a dma-buf descriptor, or none when there is no such object.

    libvhost-user sends the request's payload back; it is ignored.
    """

    _sizes = (0, 16)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls()
