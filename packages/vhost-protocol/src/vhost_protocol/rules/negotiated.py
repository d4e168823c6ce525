"""What both ends must remember of a connection to know which message is legal."""

from __future__ import annotations

from ..messages.constants import GpuProtocolFeatures, ProtocolFeatures
from ..messages.message import NATIVE, Wire

_XEN_MMAP = int(ProtocolFeatures.XEN_MMAP)


class Negotiated:
    """The state of one connection.

    Attributes:
        order: byte order of messages, ``"<"`` or ``">"``.
        offered_features: VIRTIO bits of the last GET_FEATURES answer, or None before it.
        features: VIRTIO bits of the last SET_FEATURES.
        features_set: SET_FEATURES was sent.
        offered_protocol_features: bits of the last GET_PROTOCOL_FEATURES answer, or None.
        protocol_features: bits of the last SET_PROTOCOL_FEATURES.
        owned: SET_OWNER was sent.
        postcopy: between POSTCOPY_LISTEN and POSTCOPY_END.
        offered_gpu_features: bits of the GPU protocol's GET_PROTOCOL_FEATURES answer, or None.
        gpu_features: bits of the GPU protocol's SET_PROTOCOL_FEATURES.
        tolerated: how often the peer broke which rule that deployed peers are forgiven for, by the
            request's name and the rule's text.
    """

    __slots__ = (
        "features",
        "features_set",
        "gpu_features",
        "offered_features",
        "offered_gpu_features",
        "offered_protocol_features",
        "order",
        "owned",
        "postcopy",
        "protocol_features",
        "tolerated",
    )

    def __init__(self, order: str = NATIVE) -> None:
        self.order: str = order
        self.offered_features: int | None = None
        self.features: int = 0
        self.features_set: bool = False
        self.offered_protocol_features: ProtocolFeatures | None = None
        self.protocol_features: ProtocolFeatures = ProtocolFeatures(0)
        self.owned: bool = False
        self.postcopy: bool = False
        self.offered_gpu_features: GpuProtocolFeatures | None = None
        self.gpu_features: GpuProtocolFeatures = GpuProtocolFeatures(0)
        self.tolerated: dict[tuple[str, str], int] = {}

    def has(self, feature: ProtocolFeatures) -> bool:
        """Whether every bit of ``feature`` is negotiated."""
        return not int(feature) & ~int(self.protocol_features)

    def has_virtio(self, bit: int) -> bool:
        """Whether VIRTIO feature ``bit`` was set by SET_FEATURES."""
        return bool(self.features >> bit & 1)

    @property
    def wire(self) -> Wire:
        """What decoding depends on at this moment."""
        return Wire(self.order, bool(int(self.protocol_features) & _XEN_MMAP), self.postcopy)
