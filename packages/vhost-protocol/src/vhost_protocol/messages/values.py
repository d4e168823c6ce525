"""Values inside messages that several messages share, and how they lie in a payload."""

from __future__ import annotations

from struct import Struct
from typing import Any, ClassVar, Final

from .constants import (
    MAX_ASYMMETRIC_KEY,
    MAX_AUTH_KEY,
    MAX_CIPHER_KEY,
    MAX_CONFIG_SIZE,
    MAX_CONFIG_SPACE,
    MAX_TABLE_REGIONS,
    CryptoOpcode,
    ProtocolFeatures,
    XenMapFlags,
)
from .message import BIG, LITTLE, Converters, Message, Wire, known_bits

_ORDERS = (LITTLE, BIG)
_U64_END: Final = 1 << 64
_XEN_BITS: Final = 0x10B  # 8 is what rust-vmm and its front-ends send for NO_ADVANCE_MAP
_COUNT = {o: Struct(f"{o}I4x") for o in _ORDERS}
_CONFIG = {o: Struct(f"{o}III") for o in _ORDERS}
_XEN_REGION = {o: Struct(f"{o}QQQQII") for o in _ORDERS}
known_protocol_features = ProtocolFeatures


class MemoryRegion(Message, layout="QQQQII"):
    """A piece of guest memory (section "Memory region description").

    Addresses and sizes are in bytes.  ``guest_address`` is guest-physical, ``user_address`` is the
    front-end's virtual address (or repeats the guest address under GPA_ADDRESSES), ``mmap_offset``
    is where the region starts in the descriptor.  ``flags`` and ``domid`` travel only when XEN_MMAP
    is negotiated.
    """

    guest_address: int
    size: int
    user_address: int
    mmap_offset: int = 0
    flags: XenMapFlags = XenMapFlags(0)
    domid: int = 0

    _convert: ClassVar[Converters] = {"flags": known_bits(XenMapFlags, _XEN_BITS)}

    def _check(self) -> None:
        if not self.size:
            raise self._wrong("size", 0, "a region must not be empty")
        for name in ("guest_address", "user_address", "mmap_offset"):
            if getattr(self, name) + self.size > _U64_END:
                raise self._wrong(name, getattr(self, name), "the region ends beyond 64 bits")
        if self.flags & XenMapFlags.FOREIGN and self.flags & XenMapFlags.GRANT:
            raise self._wrong("flags", self.flags, "a mapping is foreign or grant, not both")


_PLAIN_REGION = {o: Struct(f"{o}QQQQ") for o in _ORDERS}


def _region_struct(wire: Wire) -> Struct:
    return (_XEN_REGION if wire.xen else _PLAIN_REGION)[wire.order]


def table_sizes() -> tuple[int, ...]:
    """Sizes of "multiple memory regions", without and with the Xen fields."""
    plain = [8 + 32 * n for n in range(MAX_TABLE_REGIONS + 1)]
    xen = [8 + 40 * n for n in range(MAX_TABLE_REGIONS + 1)]
    return tuple(sorted({*plain, *xen}))


def region_sizes() -> tuple[int, ...]:
    """Sizes of a "single memory region", without and with the Xen fields."""
    return (40, 48)


def decode_regions(cls: type[Message], payload: bytes, wire: Wire) -> tuple[MemoryRegion, ...]:
    """Read "multiple memory regions"; the size must be what the count says."""
    count = _COUNT[wire.order].unpack_from(payload)[0]
    layout = _region_struct(wire)
    if 8 + count * layout.size != len(payload):
        rule = f"{len(payload) - 8} bytes follow, of {layout.size} bytes a region"
        raise cls._wrong("num_regions", count, rule)
    return tuple(MemoryRegion._build(_pad(v)) for v in layout.iter_unpack(payload[8:]))  # type: ignore[misc]


def _pad(values: tuple[Any, ...]) -> tuple[Any, ...]:
    return values if len(values) == 6 else (*values, 0, 0)


def encode_regions(regions: tuple[MemoryRegion, ...], wire: Wire) -> bytes:
    """Write "multiple memory regions"."""
    return _COUNT[wire.order].pack(len(regions)) + b"".join(_put(r, wire) for r in regions)


def _put(region: MemoryRegion, wire: Wire) -> bytes:
    values = region._values()
    if wire.xen:
        return _XEN_REGION[wire.order].pack(*values)
    if values[4] or values[5]:
        raise region._wrong("flags", region.flags, "Xen fields need XEN_MMAP")
    return _PLAIN_REGION[wire.order].pack(*values[:4])


def decode_region(cls: type[Message], payload: bytes, wire: Wire) -> MemoryRegion:
    """Read a "single memory region"."""
    layout = _region_struct(wire)
    if 8 + layout.size != len(payload):
        raise cls._wrong("size", len(payload), f"must be {8 + layout.size} bytes")
    region = MemoryRegion._build(_pad(layout.unpack_from(payload, 8)))
    assert isinstance(region, MemoryRegion)
    return region


def encode_region(region: MemoryRegion, wire: Wire) -> bytes:
    """Write a "single memory region": 8 bytes of padding come first."""
    return bytes(8) + _put(region, wire)


def check_config(message: Message, offset: int, flags: int, size: int) -> None:
    """Check what GET_CONFIG and SET_CONFIG share."""
    if not 0 <= flags <= 1:
        raise message._wrong("flags", flags, "must be 0 (write) or 1 (live migration)")
    if size > MAX_CONFIG_SIZE:
        raise message._wrong("size", size, f"at most {MAX_CONFIG_SIZE} bytes in one message")
    if offset < 0 or offset + size > MAX_CONFIG_SPACE:
        raise message._wrong("offset", offset, f"must end within {MAX_CONFIG_SPACE} bytes")


def decode_config(cls: type[Message], payload: bytes, wire: Wire) -> tuple[int, int, bytes]:
    """Read "virtio device config space": offset, flags, data."""
    offset, size, flags = _CONFIG[wire.order].unpack_from(payload)
    if size != len(payload) - 12:
        raise cls._wrong("size", size, f"{len(payload) - 12} bytes follow")
    return offset, flags, payload[12:]


def encode_config(offset: int, flags: int, data: bytes, wire: Wire) -> bytes:
    """Write "virtio device config space"."""
    return _CONFIG[wire.order].pack(offset, len(data), flags) + data


class SymmetricSession(Message, layout="IIIIBBBB"):
    """Parameters of a symmetric crypto session, as virtio-crypto names them (lengths in bytes).

    The key lengths on the wire are the lengths of ``key`` and ``auth_key``.
    """

    cipher_algorithm: int
    hash_algorithm: int
    hash_result_length: int
    additional_length: int
    op_type: int
    direction: int
    hash_mode: int
    chain_order: int
    key: bytes = b""
    auth_key: bytes = b""

    _secret = frozenset(("key", "auth_key"))

    def _check(self) -> None:
        if len(self.key) > MAX_CIPHER_KEY:
            raise self._wrong("key", len(self.key), f"at most {MAX_CIPHER_KEY} bytes")
        if len(self.auth_key) > MAX_AUTH_KEY:
            raise self._wrong("auth_key", len(self.auth_key), f"at most {MAX_AUTH_KEY} bytes")


class AsymmetricSession(Message, layout="IIII"):
    """Parameters of an asymmetric crypto session (RSA), as virtio-crypto names them."""

    algorithm: int
    key_type: int
    padding_algorithm: int = 0
    hash_algorithm: int = 0
    key: bytes = b""

    _secret = frozenset(("key",))

    def _check(self) -> None:
        if len(self.key) > MAX_ASYMMETRIC_KEY:
            raise self._wrong("key", len(self.key), f"at most {MAX_ASYMMETRIC_KEY} bytes")


# QEMU's VhostUserCryptoSession: op_code, a union, session_id.  Both members of the union begin with
# QEMU's own structure of session parameters, with its padding and its pointers: the pointers are
# the sender's addresses, sent as zero and ignored when received.
_SYMMETRIC = {o: Struct(f"{o}IIIIIIBBBB4x16x64s512s") for o in _ORDERS}
_ASYMMETRIC = {o: Struct(f"{o}III4x8xII1024s") for o in _ORDERS}
_UNION_SIZE: Final = _ASYMMETRIC[LITTLE].size
_OP_CODE = {o: Struct(f"{o}Q") for o in _ORDERS}
_SESSION_ID = {o: Struct(f"{o}q") for o in _ORDERS}
CRYPTO_SIZE: Final = 8 + _UNION_SIZE + 8

Session = SymmetricSession | AsymmetricSession


def check_crypto(message: Message, op_code: int, session: Session, session_id: int) -> None:
    """Check what CREATE_CRYPTO_SESSION and its answer share."""
    known_op_code(message, op_code)
    asymmetric = op_code == CryptoOpcode.AKCIPHER_CREATE_SESSION
    kind = AsymmetricSession if asymmetric else SymmetricSession
    if not isinstance(session, kind):
        rule = f"operation {op_code:#x} takes a {kind.__name__}"
        raise message._wrong("session", type(session).__name__, rule)
    if not -(1 << 63) <= session_id < 1 << 63:
        raise message._wrong("session_id", session_id, "must fit 64 bits with a sign")


def known_op_code(message: Message | type[Message], op_code: int) -> None:
    """Refuse an operation that is not one of those that create a session."""
    if op_code not in CryptoOpcode._value2member_map_:
        known = ", ".join(f"{c:#x}" for c in CryptoOpcode)
        raise message._wrong("op_code", op_code, f"must be one of {known}")


def decode_crypto(cls: type[Message], payload: bytes, wire: Wire) -> tuple[int, Session, int]:
    """Read a crypto session: operation, parameters, session id."""
    op_code = _OP_CODE[wire.order].unpack_from(payload)[0]
    known_op_code(cls, op_code)
    session_id = _SESSION_ID[wire.order].unpack_from(payload, 8 + _UNION_SIZE)[0]
    session: Any
    if op_code == CryptoOpcode.AKCIPHER_CREATE_SESSION:
        algorithm, key_type, key_length, padding, hashing, key = _ASYMMETRIC[
            wire.order
        ].unpack_from(payload, 8)
        key = _cut(cls, "key", key, key_length)
        session = AsymmetricSession._build((algorithm, key_type, padding, hashing, key))
    else:
        values = _SYMMETRIC[wire.order].unpack_from(payload, 8)
        cipher, key_length, hashing, result, auth_length, additional, *modes, key, auth = values
        key = _cut(cls, "key", key, key_length)
        auth = _cut(cls, "auth_key", auth, auth_length)
        session = SymmetricSession._build((cipher, hashing, result, additional, *modes, key, auth))
    return op_code, session, session_id


def _cut(cls: type[Message], field: str, data: bytes, length: int) -> bytes:
    if length > len(data):
        raise cls._wrong(f"{field}_length", length, f"at most {len(data)} bytes")
    return data[:length]


def encode_crypto(op_code: int, session: Session, session_id: int, wire: Wire) -> bytes:
    """Write a crypto session."""
    order = wire.order
    if isinstance(session, AsymmetricSession):
        body = _ASYMMETRIC[order].pack(
            session.algorithm,
            session.key_type,
            len(session.key),
            session.padding_algorithm,
            session.hash_algorithm,
            session.key,
        )
    else:
        body = _SYMMETRIC[order].pack(
            session.cipher_algorithm,
            len(session.key),
            session.hash_algorithm,
            session.hash_result_length,
            len(session.auth_key),
            session.additional_length,
            session.op_type,
            session.direction,
            session.hash_mode,
            session.chain_order,
            session.key,
            session.auth_key,
        )
    return (
        _OP_CODE[order].pack(op_code)
        + body.ljust(_UNION_SIZE, b"\0")
        + _SESSION_ID[order].pack(session_id)
    )
