"""Which message may be sent when, with what, and what answers it: one row for each request.

Everything that knows the protocol reads these rows: both endpoints, the tracer, the documentation's
table and the tests.  A rule that lives in an ``if`` of one endpoint is one that the other endpoint
and the tracer do not know; so the few rules that are not a plain fact of a row (a table of regions
brings as many descriptors as regions; an answer that exists only once a feature is negotiated) are
small functions at the end of this file, next to the rows that use them.

Reading a row:

``message``       the value class; ``variants`` are other payloads under the same code
``answer``        when an answer comes: see Answer
``replies``       the classes an answer can have
``fds``           how many descriptors come along: see Fds; ``reply_fds`` for the answer
``needs``         protocol features that must be negotiated
``virtio``        VIRTIO feature bit that must be negotiated with SET_FEATURES
``offered``       VIRTIO feature bit that the back-end must have offered in GET_FEATURES
``kept``          * VIRTIO feature bit that SET_FEATURES, once it was sent, must have set
``after_owner``   * front-ends send SET_OWNER first
``not_owned``     * not between SET_OWNER and RESET_OWNER
``not_with``      * protocol features that exclude the message
``reserved``      * fields that must be 0
``both_halves``   * field that holds a driver's and a device's half on a packed ring

A broken row is an error.  The columns with a * are not fatal when the peer breaks them, because
deployed peers do and mean no harm; the breach is reported beside the message and counted
(``Session.tolerated``), and our own end refuses to do the same.

``kept``: DPDK's virtio-user before 20.11 enables rings without having negotiated bit 30.  QEMU's
virtio-net enables them before SET_FEATURES, which breaks nothing: the bit has been offered.
``after_owner``: the specification gives SET_OWNER no place in the sequence.
``not_owned``: DPDK before 20.11 sends SET_OWNER again at each start of a port.
``not_with``: QEMU up to 10 sends the postcopy messages although CONFIGURE_MEM_SLOTS is negotiated.
``reserved``: DPDK and SPDK leave the last ring's state in GET_VRING_BASE's second field.
``both_halves``: DPDK gives a packed ring's base as the driver's half alone; both are meant.
"""

from enum import Enum, IntEnum
from typing import Any, Final, NamedTuple

from ..messages import gpu as g
from ..messages import replies as a
from ..messages import requests as r
from ..messages.constants import (
    MAX_BACKEND_FDS,
    MAX_GPU_PAYLOAD_SIZE,
    MAX_PAYLOAD_SIZE,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_IOMMU_PLATFORM,
    BackendRequest,
    FrontendRequest,
    GpuProtocolFeatures,
    GpuRequest,
    ProtocolFeatures,
)
from ..messages.message import Message, Reply, Request


class Answer(Enum):
    """When a request is answered."""

    #: With an Ack, if REPLY_ACK is negotiated and the request says NEED_REPLY.
    IF_ASKED = "if asked"
    #: With an Ack, if the request says NEED_REPLY, negotiated or not: front-ends wait for it.
    IF_FLAGGED = "if flagged"
    #: Always.
    ALWAYS = "always"
    #: Always once LOG_SHMFD is negotiated, else as IF_ASKED.
    WITH_LOG_SHMFD = "with LOG_SHMFD"
    #: With the mapped addresses between POSTCOPY_LISTEN and POSTCOPY_END, else as IF_ASKED.
    IN_POSTCOPY = "in postcopy, else if asked"
    #: Never: the protocol has no acknowledgement (GPU).
    NEVER = "never"


class Fds(Enum):
    """How many descriptors a message brings."""

    NONE = "0"
    ONE = "1"
    OPTIONAL = "0 or 1"
    UNLESS_NO_FD = "1 unless no_fd"
    PER_REGION = "1 a region"
    UNLESS_DISABLED = "1 unless 0 x 0"
    UNLESS_EMPTY = "1 unless size 0"


class Rule(NamedTuple):
    """One row; see the head of this file."""

    code: IntEnum
    message: type[Request[Any]]
    answer: Answer = Answer.IF_ASKED
    replies: tuple[type[Reply], ...] = (a.Ack,)
    fds: Fds = Fds.NONE
    reply_fds: Fds = Fds.NONE
    needs: ProtocolFeatures = ProtocolFeatures(0)
    virtio: int | None = None
    offered: int | None = None
    kept: int | None = None
    after_owner: bool = False
    not_owned: bool = False
    not_with: ProtocolFeatures = ProtocolFeatures(0)
    reserved: tuple[str, ...] = ()
    both_halves: str | None = None
    variants: tuple[type[Request[Any]], ...] = ()
    gpu_needs: GpuProtocolFeatures = GpuProtocolFeatures(0)

    @property
    def name(self) -> str:
        """The specification's name of the request, without its prefix."""
        return self.code._name_  # what the property `name` returns, which takes five times as long

    @property
    def messages(self) -> tuple[type[Request[Any]], ...]:
        """Every class that this request's payload can be."""
        return (self.message, *self.variants)


_F = ProtocolFeatures


def _frontend() -> tuple[Rule, ...]:
    c = FrontendRequest
    value = Answer.ALWAYS
    return (
        Rule(c.GET_FEATURES, r.GetFeatures, value, (a.FeaturesReply,)),
        Rule(c.SET_FEATURES, r.SetFeatures),
        Rule(c.SET_OWNER, r.SetOwner, not_owned=True),
        Rule(c.RESET_OWNER, r.ResetOwner),
        Rule(
            c.SET_MEM_TABLE,
            r.SetMemTable,
            Answer.IN_POSTCOPY,
            (a.MemTableReply,),
            fds=Fds.PER_REGION,
            after_owner=True,
            variants=(r.MemTableAck,),
        ),
        Rule(
            c.SET_LOG_BASE,
            r.SetLogBase,
            Answer.WITH_LOG_SHMFD,
            (a.Ack, a.EmptyReply),
            fds=Fds.OPTIONAL,
            after_owner=True,
            variants=(r.SetLogBaseAddress,),
        ),
        Rule(c.SET_LOG_FD, r.SetLogFd, fds=Fds.ONE, after_owner=True),
        Rule(c.SET_VRING_NUM, r.SetVringNum, after_owner=True),
        Rule(c.SET_VRING_ADDR, r.SetVringAddr, after_owner=True),
        Rule(c.SET_VRING_BASE, r.SetVringBase, after_owner=True, both_halves="base"),
        Rule(
            c.GET_VRING_BASE,
            r.GetVringBase,
            value,
            (a.VringBaseReply,),
            after_owner=True,
            reserved=("num",),
        ),
        Rule(c.SET_VRING_KICK, r.SetVringKick, fds=Fds.UNLESS_NO_FD, after_owner=True),
        Rule(c.SET_VRING_CALL, r.SetVringCall, fds=Fds.UNLESS_NO_FD, after_owner=True),
        Rule(c.SET_VRING_ERR, r.SetVringErr, fds=Fds.UNLESS_NO_FD, after_owner=True),
        Rule(
            c.GET_PROTOCOL_FEATURES,
            r.GetProtocolFeatures,
            value,
            (a.ProtocolFeaturesReply,),
            offered=VHOST_USER_F_PROTOCOL_FEATURES,
        ),
        Rule(
            c.SET_PROTOCOL_FEATURES,
            r.SetProtocolFeatures,
            offered=VHOST_USER_F_PROTOCOL_FEATURES,
        ),
        Rule(c.GET_QUEUE_NUM, r.GetQueueNum, value, (a.QueueNumReply,), needs=_F.MQ),
        Rule(
            c.SET_VRING_ENABLE,
            r.SetVringEnable,
            offered=VHOST_USER_F_PROTOCOL_FEATURES,
            kept=VHOST_USER_F_PROTOCOL_FEATURES,
            after_owner=True,
        ),
        Rule(c.SEND_RARP, r.SendRarp, needs=_F.RARP, after_owner=True),
        Rule(c.NET_SET_MTU, r.NetSetMtu, needs=_F.MTU),
        Rule(c.SET_BACKEND_REQ_FD, r.SetBackendReqFd, fds=Fds.ONE, needs=_F.BACKEND_REQ),
        Rule(c.IOTLB_MSG, r.IotlbMsg, value, virtio=VIRTIO_F_IOMMU_PLATFORM, after_owner=True),
        Rule(c.SET_VRING_ENDIAN, r.SetVringEndian, needs=_F.CROSS_ENDIAN, after_owner=True),
        Rule(c.GET_CONFIG, r.GetConfig, value, (a.ConfigReply,), needs=_F.CONFIG),
        Rule(c.SET_CONFIG, r.SetConfig, needs=_F.CONFIG),
        Rule(
            c.CREATE_CRYPTO_SESSION,
            r.CreateCryptoSession,
            value,
            (a.CryptoSessionReply,),
            needs=_F.CRYPTO_SESSION,
            after_owner=True,
        ),
        Rule(
            c.CLOSE_CRYPTO_SESSION,
            r.CloseCryptoSession,
            needs=_F.CRYPTO_SESSION,
            after_owner=True,
        ),
        Rule(
            c.POSTCOPY_ADVISE,
            r.PostcopyAdvise,
            value,
            (a.EmptyReply,),
            reply_fds=Fds.ONE,
            needs=_F.PAGEFAULT,
            not_with=_F.CONFIGURE_MEM_SLOTS,
        ),
        Rule(
            c.POSTCOPY_LISTEN,
            r.PostcopyListen,
            Answer.IF_FLAGGED,
            needs=_F.PAGEFAULT,
            not_with=_F.CONFIGURE_MEM_SLOTS,
        ),
        Rule(
            c.POSTCOPY_END,
            r.PostcopyEnd,
            value,
            needs=_F.PAGEFAULT,
            not_with=_F.CONFIGURE_MEM_SLOTS,
        ),
        Rule(
            c.GET_INFLIGHT_FD,
            r.GetInflightFd,
            value,
            (a.InflightReply,),
            reply_fds=Fds.UNLESS_EMPTY,
            needs=_F.INFLIGHT_SHMFD,
        ),
        Rule(c.SET_INFLIGHT_FD, r.SetInflightFd, fds=Fds.ONE, needs=_F.INFLIGHT_SHMFD),
        Rule(c.GPU_SET_SOCKET, r.GpuSetSocket, fds=Fds.ONE),
        Rule(c.RESET_DEVICE, r.ResetDevice, needs=_F.RESET_DEVICE),
        Rule(
            c.VRING_KICK,
            r.VringKick,
            needs=_F.INBAND_NOTIFICATIONS,
            after_owner=True,
            reserved=("num",),
        ),
        Rule(
            c.GET_MAX_MEM_SLOTS,
            r.GetMaxMemSlots,
            value,
            (a.MaxMemSlotsReply,),
            needs=_F.CONFIGURE_MEM_SLOTS,
        ),
        Rule(
            c.ADD_MEM_REG,
            r.AddMemReg,
            Answer.IN_POSTCOPY,
            (a.MemRegReply,),
            fds=Fds.ONE,
            needs=_F.CONFIGURE_MEM_SLOTS,
            after_owner=True,
            variants=(r.AddMemRegAck,),
        ),
        Rule(
            c.REM_MEM_REG,
            r.RemMemReg,
            fds=Fds.OPTIONAL,
            needs=_F.CONFIGURE_MEM_SLOTS,
            after_owner=True,
            variants=(r.RemMemRegAck,),
        ),
        Rule(c.SET_STATUS, r.SetStatus, needs=_F.STATUS),
        Rule(c.GET_STATUS, r.GetStatus, value, (a.StatusReply,), needs=_F.STATUS),
        Rule(
            c.GET_SHARED_OBJECT,
            r.GetSharedObject,
            value,
            (a.SharedObjectReply,),
            reply_fds=Fds.OPTIONAL,
            needs=_F.SHARED_OBJECT,
        ),
        Rule(
            c.SET_DEVICE_STATE_FD,
            r.SetDeviceStateFd,
            value,
            (a.DeviceStateReply,),
            fds=Fds.ONE,
            reply_fds=Fds.UNLESS_NO_FD,
            needs=_F.DEVICE_STATE,
            after_owner=True,
        ),
        Rule(
            c.CHECK_DEVICE_STATE,
            r.CheckDeviceState,
            value,
            needs=_F.DEVICE_STATE,
            after_owner=True,
        ),
        Rule(c.GET_SHMEM_CONFIG, r.GetShmemConfig, value, (a.ShmemConfigReply,), needs=_F.SHMEM),
        Rule(
            c.GET_VRING_BASE_SKIP_DRAIN,
            r.GetVringBaseSkipDrain,
            value,
            (a.VringBaseReply,),
            needs=_F.GET_VRING_BASE_SKIP_DRAIN,
            after_owner=True,
            reserved=("num",),
        ),
    )


def _backend() -> tuple[Rule, ...]:
    c = BackendRequest
    send = _F.BACKEND_SEND_FD
    return (
        Rule(c.IOTLB_MSG, r.BackendIotlbMsg, virtio=VIRTIO_F_IOMMU_PLATFORM),
        Rule(c.CONFIG_CHANGE_MSG, r.BackendConfigChange, needs=_F.CONFIG),
        Rule(
            c.VRING_HOST_NOTIFIER_MSG,
            r.BackendVringHostNotifier,
            fds=Fds.UNLESS_NO_FD,
            needs=_F.HOST_NOTIFIER | send,
        ),
        Rule(c.VRING_CALL, r.BackendVringCall, needs=_F.INBAND_NOTIFICATIONS, reserved=("num",)),
        Rule(c.VRING_ERR, r.BackendVringErr, needs=_F.INBAND_NOTIFICATIONS, reserved=("num",)),
        Rule(c.SHARED_OBJECT_ADD, r.BackendSharedObjectAdd, needs=_F.SHARED_OBJECT),
        Rule(c.SHARED_OBJECT_REMOVE, r.BackendSharedObjectRemove, needs=_F.SHARED_OBJECT),
        Rule(
            c.SHARED_OBJECT_LOOKUP,
            r.BackendSharedObjectLookup,
            Answer.ALWAYS,
            reply_fds=Fds.OPTIONAL,
            needs=_F.SHARED_OBJECT,
        ),
        Rule(c.SHMEM_MAP, r.BackendShmemMap, fds=Fds.ONE, needs=_F.SHMEM | send),
        Rule(c.SHMEM_UNMAP, r.BackendShmemUnmap, needs=_F.SHMEM),
    )


def _gpu() -> tuple[Rule, ...]:
    c = GpuRequest
    value, never = Answer.ALWAYS, Answer.NEVER
    return (
        Rule(c.GET_PROTOCOL_FEATURES, g.GpuGetProtocolFeatures, value, (g.GpuFeaturesReply,)),
        Rule(c.SET_PROTOCOL_FEATURES, g.GpuSetProtocolFeatures, never, ()),
        Rule(c.GET_DISPLAY_INFO, g.GpuGetDisplayInfo, value, (g.GpuDisplayInfoReply,)),
        Rule(c.CURSOR_POS, g.GpuCursorPos, never, ()),
        Rule(c.CURSOR_POS_HIDE, g.GpuCursorPosHide, never, ()),
        Rule(c.CURSOR_UPDATE, g.GpuCursorUpdate, never, ()),
        Rule(c.SCANOUT, g.GpuScanout, never, ()),
        Rule(c.UPDATE, g.GpuUpdate, never, ()),
        Rule(c.DMABUF_SCANOUT, g.GpuDmabufScanout, never, (), fds=Fds.UNLESS_DISABLED),
        Rule(c.DMABUF_UPDATE, g.GpuDmabufUpdate, value, (a.EmptyReply,)),
        Rule(
            c.GET_EDID,
            g.GpuGetEdid,
            value,
            (g.GpuEdidReply,),
            gpu_needs=GpuProtocolFeatures.EDID,
        ),
        Rule(
            c.DMABUF_SCANOUT2,
            g.GpuDmabufScanout2,
            never,
            (),
            fds=Fds.UNLESS_DISABLED,
            gpu_needs=GpuProtocolFeatures.DMABUF2,
        ),
    )


class Table:
    """The rows of one kind of socket.

    Attributes:
        name: ``"front-end"``, ``"back-end"`` or ``"gpu"``: who asks, or which protocol.
        rules: rows by request code.
        by_message: rows by message class.
        versioned: whether headers carry the version (the GPU protocol's do not).
        max_payload: no payload is larger, whatever its row says.
        max_fds: no message brings more descriptors.
    """

    def __init__(
        self, name: str, rows: tuple[Rule, ...], *, versioned: bool, max_payload: int, max_fds: int
    ) -> None:
        self.name: str = name
        self.rules: dict[int, Rule] = {int(row.code): row for row in rows}
        self.by_message: dict[type[Message], Rule] = {
            kind: row for row in rows for kind in row.messages
        }
        self.versioned: bool = versioned
        self.max_payload: int = max_payload
        self.max_fds: int = max_fds

    def __repr__(self) -> str:
        return f"<{self.name} table of {len(self.rules)} requests>"


#: Requests of the front-end.
FRONTEND_TABLE: Final = Table(
    "front-end", _frontend(), versioned=True, max_payload=MAX_PAYLOAD_SIZE, max_fds=32
)
#: Requests of the back-end, on the channel of SET_BACKEND_REQ_FD.
BACKEND_TABLE: Final = Table(
    "back-end",
    _backend(),
    versioned=True,
    max_payload=MAX_PAYLOAD_SIZE,
    max_fds=MAX_BACKEND_FDS,
)
#: Requests of the back-end, on the socket of GPU_SET_SOCKET.
GPU_TABLE: Final = Table(
    "gpu", _gpu(), versioned=False, max_payload=MAX_GPU_PAYLOAD_SIZE, max_fds=1
)

#: Protocol features that make sense only together with others: SET_PROTOCOL_FEATURES is refused
#: without them (sections "In-band notifications" and GET_VRING_BASE_SKIP_DRAIN).
REQUIRED_WITH: Final[dict[ProtocolFeatures, ProtocolFeatures]] = {
    _F.INBAND_NOTIFICATIONS: _F.BACKEND_REQ | _F.REPLY_ACK,
    _F.GET_VRING_BASE_SKIP_DRAIN: _F.GET_VRING_BASE_INFLIGHT | _F.INFLIGHT_SHMFD,
}


def fd_counts(kind: Fds, message: Message) -> tuple[int, int]:
    """Return the least and the most descriptors that may come with ``message``."""
    if kind is Fds.NONE or isinstance(message, _NEVER_FDS):
        return 0, 0
    if kind is Fds.ONE:
        return 1, 1
    if kind is Fds.OPTIONAL:
        return 0, 1
    if kind is Fds.PER_REGION:
        assert isinstance(message, r.SetMemTable)
        return len(message.regions), len(message.regions)
    wanted = True
    if kind is Fds.UNLESS_NO_FD:
        wanted = message.has_fd if isinstance(message, a.DeviceStateReply) else not message.no_fd  # type: ignore[attr-defined]
    elif kind is Fds.UNLESS_DISABLED:
        wanted = bool(message.width or message.height)  # type: ignore[attr-defined]
    else:
        wanted = bool(message.mmap_size)  # type: ignore[attr-defined]
    return (1, 1) if wanted else (0, 0)


_NEVER_FDS = (r.MemTableAck, r.AddMemRegAck, r.RemMemRegAck, r.SetLogBaseAddress)
