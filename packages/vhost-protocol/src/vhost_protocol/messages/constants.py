"""Numbers of the vhost-user specification, with its names, and the limits enforced on input."""

from __future__ import annotations

from enum import IntEnum, IntFlag
from typing import Final


class FrontendRequest(IntEnum):
    """Requests a front-end sends to a back-end (section "Front-end message types")."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_LOG_BASE = 6
    SET_LOG_FD = 7
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SEND_RARP = 19
    NET_SET_MTU = 20
    SET_BACKEND_REQ_FD = 21
    IOTLB_MSG = 22
    SET_VRING_ENDIAN = 23
    GET_CONFIG = 24
    SET_CONFIG = 25
    CREATE_CRYPTO_SESSION = 26
    CLOSE_CRYPTO_SESSION = 27
    POSTCOPY_ADVISE = 28
    POSTCOPY_LISTEN = 29
    POSTCOPY_END = 30
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    GPU_SET_SOCKET = 33
    RESET_DEVICE = 34
    VRING_KICK = 35
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38
    SET_STATUS = 39
    GET_STATUS = 40
    GET_SHARED_OBJECT = 41
    SET_DEVICE_STATE_FD = 42
    CHECK_DEVICE_STATE = 43
    GET_SHMEM_CONFIG = 44
    GET_VRING_BASE_SKIP_DRAIN = 45


class BackendRequest(IntEnum):
    """Requests a back-end sends on the channel of SET_BACKEND_REQ_FD ("Back-end message types")."""

    IOTLB_MSG = 1
    CONFIG_CHANGE_MSG = 2
    VRING_HOST_NOTIFIER_MSG = 3
    VRING_CALL = 4
    VRING_ERR = 5
    SHARED_OBJECT_ADD = 6
    SHARED_OBJECT_REMOVE = 7
    SHARED_OBJECT_LOOKUP = 8
    SHMEM_MAP = 9
    SHMEM_UNMAP = 10


class GpuRequest(IntEnum):
    """Requests a back-end sends on the socket of GPU_SET_SOCKET (vhost-user-gpu.rst)."""

    GET_PROTOCOL_FEATURES = 1
    SET_PROTOCOL_FEATURES = 2
    GET_DISPLAY_INFO = 3
    CURSOR_POS = 4
    CURSOR_POS_HIDE = 5
    CURSOR_UPDATE = 6
    SCANOUT = 7
    UPDATE = 8
    DMABUF_SCANOUT = 9
    DMABUF_UPDATE = 10
    GET_EDID = 11
    DMABUF_SCANOUT2 = 12


class ProtocolFeatures(IntFlag):
    """``VHOST_USER_PROTOCOL_F_*`` (section "Protocol features").

    rust-vmm's ``vhost`` up to 0.16 puts SHMEM at bit 21, which the specification gives to
    GPA_ADDRESSES; these are the specification's positions.
    """

    MQ = 1 << 0
    LOG_SHMFD = 1 << 1
    RARP = 1 << 2
    REPLY_ACK = 1 << 3
    MTU = 1 << 4
    BACKEND_REQ = 1 << 5
    CROSS_ENDIAN = 1 << 6
    CRYPTO_SESSION = 1 << 7
    PAGEFAULT = 1 << 8
    CONFIG = 1 << 9
    BACKEND_SEND_FD = 1 << 10
    HOST_NOTIFIER = 1 << 11
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    INBAND_NOTIFICATIONS = 1 << 14
    CONFIGURE_MEM_SLOTS = 1 << 15
    STATUS = 1 << 16
    XEN_MMAP = 1 << 17
    SHARED_OBJECT = 1 << 18
    DEVICE_STATE = 1 << 19
    GET_VRING_BASE_INFLIGHT = 1 << 20
    GPA_ADDRESSES = 1 << 21
    SHMEM = 1 << 22
    GET_VRING_BASE_SKIP_DRAIN = 1 << 23


class GpuProtocolFeatures(IntFlag):
    """``VHOST_USER_GPU_PROTOCOL_F_*``."""

    EDID = 1 << 0
    DMABUF2 = 1 << 1


class HeaderFlags(IntFlag):
    """Bits of a message header's ``flags`` (section "Header")."""

    VERSION_1 = 1 << 0
    REPLY = 1 << 2
    NEED_REPLY = 1 << 3


class VringFlags(IntFlag):
    """Flags of SET_VRING_ADDR."""

    LOG = 1 << 0


class ConfigFlags(IntFlag):
    """Flags of the configuration space messages: 0 is a write by the guest."""

    WRITABLE = 0
    LIVE_MIGRATION = 1


class IotlbAccess(IntFlag):
    """Permissions of an IOTLB message."""

    NONE = 0
    READ = 1
    WRITE = 2
    READ_WRITE = 3


class IotlbType(IntEnum):
    """Kinds of IOTLB messages."""

    MISS = 1
    UPDATE = 2
    INVALIDATE = 3
    ACCESS_FAIL = 4


class TransferDirection(IntEnum):
    """Direction of SET_DEVICE_STATE_FD, seen from the back-end's state."""

    SAVE = 0
    LOAD = 1


class MigrationPhase(IntEnum):
    """Phase of SET_DEVICE_STATE_FD; only one is defined."""

    STOPPED = 0


class XenMapFlags(IntFlag):
    """How a Xen memory region is mapped (XEN_MMAP)."""

    FOREIGN = 1 << 0
    GRANT = 1 << 1
    NO_ADVANCE_MAP = 1 << 8


class ShmemMapFlags(IntFlag):
    """Flags of SHMEM_MAP: 0 is a read-only mapping."""

    READ_ONLY = 0
    READ_WRITE = 1


class CryptoOpcode(IntEnum):
    """Session-creating operations of virtio-crypto (``service << 8 | 2``)."""

    CIPHER_CREATE_SESSION = 0x002
    HASH_CREATE_SESSION = 0x102
    MAC_CREATE_SESSION = 0x202
    AEAD_CREATE_SESSION = 0x302
    AKCIPHER_CREATE_SESSION = 0x402


#: Bit of the VIRTIO feature word that announces protocol features (not a mask).
VHOST_USER_F_PROTOCOL_FEATURES: Final = 30
#: Bit of the VIRTIO feature word that starts dirty logging.
VHOST_F_LOG_ALL: Final = 26
#: Bit of the VIRTIO feature word that makes addresses I/O virtual (ACCESS_PLATFORM).
VIRTIO_F_IOMMU_PLATFORM: Final = 33
#: VIRTIO feature: rings are packed, and a ring's position has two halves.
VIRTIO_F_RING_PACKED: Final = 34

#: Protocol version in the two lowest header bits.
VERSION: Final = 1
#: Bytes of a message header: three u32.
HEADER_SIZE: Final = 12
#: Bits of the u64 of SET_VRING_KICK/CALL/ERR that hold the ring index.
VRING_INDEX_MASK: Final = 0xFF
#: Bit of those, of host notifiers and of the device state reply: no descriptor comes along.
NO_FD: Final = 1 << 8

#: Largest payload outside the GPU protocol: rust-vmm's MAX_MSG_SIZE; QEMU's largest is 2056 bytes.
MAX_PAYLOAD_SIZE: Final = 0x1000
#: Largest payload of the GPU protocol, which names none: a 4096 x 4096 update of 4 bytes a pixel,
#: with its header.
MAX_GPU_PAYLOAD_SIZE: Final = 4096 * 4096 * 4 + 20
#: Regions in one SET_MEM_TABLE.  The specification and QEMU send 8; rust-vmm front-ends up to 32.
MAX_TABLE_REGIONS: Final = 32
#: Regions the specification's message layout shows (VHOST_MEMORY_BASELINE_NREGIONS of QEMU).
BASELINE_REGIONS: Final = 8
#: Memory slots a back-end can have (libvhost-user's VHOST_USER_MAX_RAM_SLOTS).
MAX_MEM_SLOTS: Final = 509
#: Descriptors in one back-end request (section "Back-end communication").
MAX_BACKEND_FDS: Final = 8
#: Descriptors the Linux kernel passes in one message (SCM_MAX_FD); space for all is provided.
MAX_FDS: Final = 253
#: End of the configuration space that can be addressed (rust-vmm's VHOST_USER_CONFIG_SIZE;
#: QEMU stops at 256).
MAX_CONFIG_SPACE: Final = 0x1000
#: Data bytes in one configuration message: a full payload without its three u32.
MAX_CONFIG_SIZE: Final = MAX_PAYLOAD_SIZE - 12
#: VIRTIO shared memory regions a device can have (VIRTIO_MAX_SHMEM_REGIONS).
MAX_SHMEM_REGIONS: Final = 256
#: Key bytes in crypto sessions (QEMU's VHOST_CRYPTO_*_MAX_KEY_LEN).
MAX_CIPHER_KEY: Final = 64
MAX_AUTH_KEY: Final = 512
MAX_ASYMMETRIC_KEY: Final = 1024
#: Edge of the cursor image, in pixels of 4 bytes.
GPU_CURSOR_EDGE: Final = 64
#: Scanouts in a display information reply (VIRTIO_GPU_MAX_SCANOUTS).
GPU_MAX_SCANOUTS: Final = 16
#: Bytes of EDID in a reply (virtio-gpu).
GPU_MAX_EDID: Final = 1024
