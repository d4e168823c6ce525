"""The rows of the three sockets; ``rule.py`` says how to read one."""

from typing import Any, Final

from ..messages import backend_requests as b
from ..messages import gpu as g
from ..messages import replies as a
from ..messages import requests as r
from ..messages.constants import (
    MAX_BACKEND_FDS,
    MAX_GPU_PAYLOAD_SIZE,
    MAX_PAYLOAD_SIZE,
    VHOST_USER_F_PROTOCOL_FEATURES,
    VIRTIO_F_IOMMU_PLATFORM,
    GpuProtocolFeatures,
    ProtocolFeatures,
)
from ..messages.message import Message, Reply, Request
from . import checks
from .rule import Answer, Check, Fds, Rule

_F = ProtocolFeatures
_NOTHING = ProtocolFeatures(0)


def row(
    message: type[Request[Any]],
    answer: Answer = Answer.IF_ASKED,
    replies: tuple[type[Reply], ...] = (a.Ack,),
    **columns: Any,
) -> Rule:
    """Return the row of the request that ``message`` names."""
    assert message._code is not None
    return Rule(message._code, message, answer, replies, **columns)


def _frontend() -> tuple[Rule, ...]:
    value = Answer.ALWAYS
    return (
        row(r.GetFeatures, value, (a.FeaturesReply,)),
        row(r.SetFeatures),
        row(r.SetOwner, not_owned=True),
        row(r.ResetOwner),
        row(
            r.SetMemTable,
            Answer.IN_POSTCOPY,
            (a.MemTableReply,),
            fds=Fds.PER_REGION,
            after_owner=True,
            variants=(r.MemTableAck,),
        ),
        row(
            r.SetLogBase,
            Answer.WITH_LOG_SHMFD,
            (a.Ack, a.EmptyReply),
            fds=Fds.OPTIONAL,
            fds_need=_F.LOG_SHMFD,
            after_owner=True,
            variants=(r.SetLogBaseAddress,),
        ),
        row(r.SetLogFd, fds=Fds.ONE, after_owner=True),
        row(r.SetVringNum, after_owner=True),
        row(r.SetVringAddr, after_owner=True),
        row(r.SetVringBase, after_owner=True, both_halves="base"),
        row(
            r.GetVringBase,
            value,
            (a.VringBaseReply,),
            after_owner=True,
            reserved=("num",),
        ),
        row(r.SetVringKick, fds=Fds.UNLESS_NO_FD, after_owner=True),
        row(r.SetVringCall, fds=Fds.UNLESS_NO_FD, after_owner=True),
        row(r.SetVringErr, fds=Fds.UNLESS_NO_FD, after_owner=True),
        row(
            r.GetProtocolFeatures,
            value,
            (a.ProtocolFeaturesReply,),
            offered=VHOST_USER_F_PROTOCOL_FEATURES,
        ),
        row(
            r.SetProtocolFeatures,
            offered=VHOST_USER_F_PROTOCOL_FEATURES,
            also=(checks.protocol_features_fit,),
        ),
        row(r.GetQueueNum, value, (a.QueueNumReply,), needs=_F.MQ),
        row(
            r.SetVringEnable,
            offered=VHOST_USER_F_PROTOCOL_FEATURES,
            kept=VHOST_USER_F_PROTOCOL_FEATURES,
            after_owner=True,
        ),
        row(r.SendRarp, needs=_F.RARP, after_owner=True),
        row(r.NetSetMtu, needs=_F.MTU),
        row(r.SetBackendReqFd, fds=Fds.ONE, needs=_F.BACKEND_REQ),
        row(r.IotlbMsg, value, virtio=VIRTIO_F_IOMMU_PLATFORM, after_owner=True),
        row(r.SetVringEndian, needs=_F.CROSS_ENDIAN, after_owner=True),
        row(r.GetConfig, value, (a.ConfigReply,), needs=_F.CONFIG),
        row(r.SetConfig, needs=_F.CONFIG),
        row(
            r.CreateCryptoSession,
            value,
            (a.CryptoSessionReply,),
            needs=_F.CRYPTO_SESSION,
            after_owner=True,
        ),
        row(
            r.CloseCryptoSession,
            needs=_F.CRYPTO_SESSION,
            after_owner=True,
        ),
        row(
            r.PostcopyAdvise,
            value,
            (a.EmptyReply,),
            reply_fds=Fds.ONE,
            needs=_F.PAGEFAULT,
            not_with=_F.CONFIGURE_MEM_SLOTS,
        ),
        row(
            r.PostcopyListen,
            Answer.IF_FLAGGED,
            needs=_F.PAGEFAULT,
            not_with=_F.CONFIGURE_MEM_SLOTS,
        ),
        row(
            r.PostcopyEnd,
            value,
            needs=_F.PAGEFAULT,
            not_with=_F.CONFIGURE_MEM_SLOTS,
        ),
        row(
            r.GetInflightFd,
            value,
            (a.InflightReply,),
            reply_fds=Fds.UNLESS_EMPTY,
            needs=_F.INFLIGHT_SHMFD,
        ),
        row(r.SetInflightFd, fds=Fds.ONE, needs=_F.INFLIGHT_SHMFD),
        row(r.GpuSetSocket, fds=Fds.ONE),
        row(r.ResetDevice, needs=_F.RESET_DEVICE),
        row(
            r.VringKick,
            needs=_F.INBAND_NOTIFICATIONS,
            after_owner=True,
            reserved=("num",),
        ),
        row(
            r.GetMaxMemSlots,
            value,
            (a.MaxMemSlotsReply,),
            needs=_F.CONFIGURE_MEM_SLOTS,
        ),
        row(
            r.AddMemReg,
            Answer.IN_POSTCOPY,
            (a.MemRegReply,),
            fds=Fds.ONE,
            needs=_F.CONFIGURE_MEM_SLOTS,
            after_owner=True,
            variants=(r.AddMemRegAck,),
        ),
        row(
            r.RemMemReg,
            fds=Fds.OPTIONAL,
            needs=_F.CONFIGURE_MEM_SLOTS,
            after_owner=True,
            variants=(r.RemMemRegAck,),
        ),
        row(r.SetStatus, needs=_F.STATUS),
        row(r.GetStatus, value, (a.StatusReply,), needs=_F.STATUS),
        row(
            r.GetSharedObject,
            value,
            (a.SharedObjectReply,),
            reply_fds=Fds.OPTIONAL,
            needs=_F.SHARED_OBJECT,
        ),
        row(
            r.SetDeviceStateFd,
            value,
            (a.DeviceStateReply,),
            fds=Fds.ONE,
            reply_fds=Fds.UNLESS_NO_FD,
            needs=_F.DEVICE_STATE,
            after_owner=True,
        ),
        row(
            r.CheckDeviceState,
            value,
            needs=_F.DEVICE_STATE,
            after_owner=True,
        ),
        row(r.GetShmemConfig, value, (a.ShmemConfigReply,), needs=_F.SHMEM),
        row(
            r.GetVringBaseSkipDrain,
            value,
            (a.VringBaseReply,),
            needs=_F.GET_VRING_BASE_SKIP_DRAIN,
            after_owner=True,
            reserved=("num",),
        ),
    )


def _backend() -> tuple[Rule, ...]:
    return (
        row(b.BackendIotlbMsg, virtio=VIRTIO_F_IOMMU_PLATFORM),
        row(b.BackendConfigChange, needs=_F.CONFIG),
        row(
            b.BackendVringHostNotifier,
            fds=Fds.UNLESS_NO_FD,
            needs=_F.HOST_NOTIFIER,
            fds_need=_F.BACKEND_SEND_FD,
        ),
        row(b.BackendVringCall, needs=_F.INBAND_NOTIFICATIONS, reserved=("num",)),
        row(b.BackendVringErr, needs=_F.INBAND_NOTIFICATIONS, reserved=("num",)),
        row(b.BackendSharedObjectAdd, needs=_F.SHARED_OBJECT),
        row(b.BackendSharedObjectRemove, needs=_F.SHARED_OBJECT),
        row(
            b.BackendSharedObjectLookup,
            Answer.ALWAYS,
            reply_fds=Fds.UNLESS_ERROR,
            needs=_F.SHARED_OBJECT,
        ),
        row(b.BackendShmemMap, fds=Fds.ONE, needs=_F.SHMEM, fds_need=_F.BACKEND_SEND_FD),
        row(b.BackendShmemUnmap, needs=_F.SHMEM),
    )


def _gpu() -> tuple[Rule, ...]:
    value, never = Answer.ALWAYS, Answer.NEVER
    return (
        row(g.GpuGetProtocolFeatures, value, (g.GpuFeaturesReply,)),
        row(g.GpuSetProtocolFeatures, never, (), also=(checks.gpu_features_are_offered,)),
        row(g.GpuGetDisplayInfo, value, (g.GpuDisplayInfoReply,)),
        row(g.GpuCursorPos, never, ()),
        row(g.GpuCursorPosHide, never, ()),
        row(g.GpuCursorUpdate, never, ()),
        row(g.GpuScanout, never, ()),
        row(g.GpuUpdate, never, ()),
        row(g.GpuDmabufScanout, never, (), fds=Fds.UNLESS_DISABLED),
        row(g.GpuDmabufUpdate, value, (a.EmptyReply,)),
        row(
            g.GpuGetEdid,
            value,
            (g.GpuEdidReply,),
            gpu_needs=GpuProtocolFeatures.EDID,
        ),
        row(
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
        name: ``"front-end"``, ``"back-end"`` or ``"gpu"``: the side that asks, or the protocol.
        needs: protocol features that every request needs.
        rules: rows by request code.
        by_message: rows by message class.
        checks: what must hold for each request, by request code.
        versioned: whether headers carry the version (the GPU protocol's do not).
        max_payload: no payload is larger, whatever its row says.
        max_fds: no message brings more descriptors.
    """

    def __init__(
        self,
        name: str,
        rows: tuple[Rule, ...],
        *,
        needs: ProtocolFeatures = _NOTHING,
        versioned: bool,
        max_payload: int,
        max_fds: int,
    ) -> None:
        self.name: str = name
        self.needs: ProtocolFeatures = needs
        self.rules: dict[int, Rule] = {int(row.code): row for row in rows}
        self.by_message: dict[type[Message], Rule] = {
            kind: row for row in rows for kind in row.messages
        }
        self.checks: dict[int, tuple[Check, ...]] = {
            int(row.code): checks.checks_of(row, needs) for row in rows
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
    needs=ProtocolFeatures.BACKEND_REQ,
    versioned=True,
    max_payload=MAX_PAYLOAD_SIZE,
    max_fds=MAX_BACKEND_FDS,
)
#: Requests of the back-end, on the socket of GPU_SET_SOCKET.
GPU_TABLE: Final = Table(
    "gpu", _gpu(), versioned=False, max_payload=MAX_GPU_PAYLOAD_SIZE, max_fds=1
)
