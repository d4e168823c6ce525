"""Messages of the vhost-user-gpu protocol (docs/interop/vhost-user-gpu.rst).

They travel on the socket of GPU_SET_SOCKET; the back-end asks, the front-end answers.  The header
has no version.  Parts of virtio-gpu (display information, EDID) are little-endian in any case; the
rest is in native order.
"""

from __future__ import annotations

from struct import Struct
from typing import ClassVar, Final

from .constants import (
    GPU_CURSOR_EDGE,
    GPU_MAX_EDID,
    GPU_MAX_SCANOUTS,
    MAX_GPU_PAYLOAD_SIZE,
    GpuProtocolFeatures,
    GpuRequest,
)
from .message import BIG, LITTLE, Converters, Message, Reply, Request, Wire
from .replies import Ack, EmptyReply

#: Types of the virtio-gpu answers that a front-end gives.
VIRTIO_GPU_RESP_OK_DISPLAY_INFO: Final = 0x1101
VIRTIO_GPU_RESP_OK_EDID: Final = 0x1104

_CURSOR_BYTES: Final = GPU_CURSOR_EDGE * GPU_CURSOR_EDGE * 4
_HEADER = Struct("<IIQI4x")
_DISPLAY = Struct("<6I")
_EDID = Struct(f"<II{GPU_MAX_EDID}s")
_UPDATE = {o: Struct(f"{o}5I") for o in (LITTLE, BIG)}


class GpuFeaturesReply(Reply, code=GpuRequest.GET_PROTOCOL_FEATURES, layout="Q"):
    """Answer to GPU GET_PROTOCOL_FEATURES."""

    features: GpuProtocolFeatures

    _convert: ClassVar[Converters] = {"features": GpuProtocolFeatures}


class GpuGetProtocolFeatures(
    Request[GpuFeaturesReply], code=GpuRequest.GET_PROTOCOL_FEATURES, layout=""
):
    """Ask for the protocol features the front-end offers."""


class GpuSetProtocolFeatures(Request[Ack], code=GpuRequest.SET_PROTOCOL_FEATURES, layout="Q"):
    """Set the negotiated protocol features."""

    features: GpuProtocolFeatures

    _convert: ClassVar[Converters] = {"features": GpuProtocolFeatures}


class GpuDisplay(Message, layout="IIIIII"):
    """One scanout of a display information reply; pixels."""

    x: int
    y: int
    width: int
    height: int
    enabled: int = 1
    flags: int = 0


class GpuDisplayInfoReply(Reply, code=GpuRequest.GET_DISPLAY_INFO):
    """Answer to GET_DISPLAY_INFO: up to 16 displays (virtio-gpu's ``resp_display_info``)."""

    displays: tuple[GpuDisplay, ...]
    type: int = VIRTIO_GPU_RESP_OK_DISPLAY_INFO

    _sizes = (_HEADER.size + GPU_MAX_SCANOUTS * _DISPLAY.size,)
    _convert: ClassVar[Converters] = {"displays": tuple}

    def _check(self) -> None:
        if len(self.displays) > GPU_MAX_SCANOUTS:
            rule = f"at most {GPU_MAX_SCANOUTS} displays"
            raise self._wrong("displays", len(self.displays), rule)
        _check_type(self, self.type)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        kind = _HEADER.unpack_from(payload)[0]
        displays = [GpuDisplay._build(v) for v in _DISPLAY.iter_unpack(payload[_HEADER.size :])]
        while displays and not any(displays[-1]._values()):
            displays.pop()
        return cls._build((tuple(displays), kind))

    def _encode(self, wire: Wire) -> bytes:
        parts = [_DISPLAY.pack(*d._values()) for d in self.displays]
        return (_HEADER.pack(self.type, 0, 0, 0) + b"".join(parts)).ljust(self._sizes[0], b"\0")


class GpuGetDisplayInfo(Request[GpuDisplayInfoReply], code=GpuRequest.GET_DISPLAY_INFO, layout=""):
    """Ask for the preferred display configuration."""


class GpuCursorPos(Request[Ack], code=GpuRequest.CURSOR_POS, layout="III"):
    """Show the cursor at a position, in pixels."""

    scanout_id: int
    x: int
    y: int


class GpuCursorPosHide(Request[Ack], code=GpuRequest.CURSOR_POS_HIDE, layout="III"):
    """Hide the cursor."""

    scanout_id: int
    x: int
    y: int


class GpuCursorUpdate(Request[Ack], code=GpuRequest.CURSOR_UPDATE, layout=f"IIIII{_CURSOR_BYTES}s"):
    """Set the cursor's shape: 64 x 64 pixels of 4 bytes (a8r8g8b8), and its hot spot."""

    scanout_id: int
    x: int
    y: int
    hot_x: int
    hot_y: int
    cursor: bytes


class GpuScanout(Request[Ack], code=GpuRequest.SCANOUT, layout="III"):
    """Set a scanout's size in pixels; 0 x 0 disables it."""

    scanout_id: int
    width: int
    height: int


class GpuUpdate(Request[Ack], code=GpuRequest.UPDATE, layout="IIIII"):
    """Replace a rectangle of a scanout; ``data`` has 4 bytes a pixel (x8r8g8b8)."""

    scanout_id: int
    x: int
    y: int
    width: int
    height: int
    data: bytes

    _sizes = range(20, MAX_GPU_PAYLOAD_SIZE + 1)

    def _check(self) -> None:
        need = self.width * self.height * 4
        if len(self.data) != need:
            rule = f"{self.width} x {self.height} pixels take {need} bytes"
            raise self._wrong("data", len(self.data), rule)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        return cls._build((*_UPDATE[wire.order].unpack_from(payload), payload[20:]))

    def _encode(self, wire: Wire) -> bytes:
        head = (self.scanout_id, self.x, self.y, self.width, self.height)
        return _UPDATE[wire.order].pack(*head) + self.data


class GpuDmabufScanout(Request[Ack], code=GpuRequest.DMABUF_SCANOUT, layout="IIIIIIIIIi"):
    """Set a scanout to a dma-buf (one descriptor), or disable it (0 x 0, no descriptor)."""

    scanout_id: int
    x: int
    y: int
    width: int
    height: int
    fd_width: int
    fd_height: int
    fd_stride: int
    fd_flags: int
    fourcc: int


class GpuDmabufUpdate(Request[EmptyReply], code=GpuRequest.DMABUF_UPDATE, layout="IIIII"):
    """Present a rectangle of a dma-buf scanout; answered when it has been shown."""

    scanout_id: int
    x: int
    y: int
    width: int
    height: int


class GpuEdidReply(Reply, code=GpuRequest.GET_EDID):
    """Answer to GET_EDID: up to 1024 bytes (virtio-gpu's ``resp_edid``)."""

    edid: bytes
    type: int = VIRTIO_GPU_RESP_OK_EDID

    _sizes = (_HEADER.size + _EDID.size,)

    def _check(self) -> None:
        if len(self.edid) > GPU_MAX_EDID:
            raise self._wrong("edid", len(self.edid), f"at most {GPU_MAX_EDID} bytes")
        _check_type(self, self.type)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        kind = _HEADER.unpack_from(payload)[0]
        size, _, edid = _EDID.unpack_from(payload, _HEADER.size)
        if size > GPU_MAX_EDID:
            raise cls._wrong("size", size, f"at most {GPU_MAX_EDID} bytes")
        return cls._build((edid[:size], kind))

    def _encode(self, wire: Wire) -> bytes:
        return _HEADER.pack(self.type, 0, 0, 0) + _EDID.pack(len(self.edid), 0, self.edid)


class GpuGetEdid(Request[GpuEdidReply], code=GpuRequest.GET_EDID, layout="I"):
    """Ask for the EDID of a scanout."""

    scanout_id: int


class GpuDmabufScanout2(Request[Ack], code=GpuRequest.DMABUF_SCANOUT2, layout="IIIIIIIIIiQ"):
    """DMABUF_SCANOUT with the dma-buf's format modifier."""

    scanout_id: int
    x: int
    y: int
    width: int
    height: int
    fd_width: int
    fd_height: int
    fd_stride: int
    fd_flags: int
    fourcc: int
    modifier: int


def _check_type(message: Message, kind: int) -> None:
    if not 0 <= kind < 1 << 32:
        raise message._wrong("type", kind, "must fit 32 bits")
