"""What both ends must remember of a connection to know which message is legal."""

from typing import NamedTuple

from ..messages import replies as a
from ..messages import requests as r
from ..messages.constants import VIRTIO_F_RING_PACKED, GpuProtocolFeatures, ProtocolFeatures
from ..messages.gpu import GpuFeaturesReply, GpuSetProtocolFeatures
from ..messages.message import NATIVE, Message, Wire
from .rules import REQUIRED_WITH, Answer, Rule, Table, fd_counts

_XEN_MMAP = int(ProtocolFeatures.XEN_MMAP)
_BACKEND_REQ = int(ProtocolFeatures.BACKEND_REQ)
_BACKEND_SEND_FD = int(ProtocolFeatures.BACKEND_SEND_FD)

# The messages that `Session` learns from; no message is an instance of another's class.
_CHANGING = frozenset(
    (
        r.SetFeatures,
        r.SetProtocolFeatures,
        r.SetOwner,
        r.ResetOwner,
        r.PostcopyListen,
        r.PostcopyEnd,
        GpuSetProtocolFeatures,
    )
)
_TELLING = frozenset((a.FeaturesReply, a.ProtocolFeaturesReply, GpuFeaturesReply))


class Violation(NamedTuple):
    """A broken rule.

    Attributes:
        field: what is wrong.
        value: what stood there.
        rule: what the specification asks for.
        tolerated: deployed peers do this and it does no harm; not an error when received.
        descriptors: it is about the descriptors passed.
    """

    field: str
    value: object
    rule: str
    tolerated: bool = False
    descriptors: bool = False


class Session:
    """The negotiated state of one connection; shared by its channels.

    Attributes:
        order: byte order of messages, ``"<"`` or ``">"``.
        offered_features: VIRTIO bits of the last GET_FEATURES answer, or None before it.
        features: VIRTIO bits of the last SET_FEATURES.
        features_set: SET_FEATURES was sent.
        offered_protocol_features: bits of the last GET_PROTOCOL_FEATURES answer, or None.
        protocol_features: bits of the last SET_PROTOCOL_FEATURES.
        owned: SET_OWNER was sent.
        postcopy: between POSTCOPY_LISTEN and POSTCOPY_END.
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

    def violations(
        self, table: Table, rule: Rule, message: Message, fds: int
    ) -> tuple[Violation, ...]:
        """Return the rules that sending ``message`` with ``fds`` descriptors breaks now."""
        found: list[Violation] = []
        # Plain numbers on this way, which every message takes: flags are slow to combine.
        having = int(self.protocol_features)
        missing = int(rule.needs) & ~having
        # The back-end may remove a notifier without being allowed to pass descriptors.
        if not fds:
            missing &= ~_BACKEND_SEND_FD
        if missing:
            names = _names(ProtocolFeatures(missing))
            found.append(Violation("request", rule.name, f"needs {names} negotiated"))
        if table.name == "back-end" and not having & _BACKEND_REQ:
            found.append(Violation("request", rule.name, "needs BACKEND_REQ negotiated"))
        if int(rule.gpu_needs) & ~int(self.gpu_features):
            found.append(
                Violation("request", rule.name, f"needs GPU {_names(rule.gpu_needs)} negotiated")
            )
        if rule.virtio is not None and not self.has_virtio(rule.virtio):
            found.append(
                Violation("request", rule.name, f"needs VIRTIO feature {rule.virtio} negotiated")
            )
        offered = self.offered_features
        if rule.offered is not None and offered is not None and not offered >> rule.offered & 1:
            found.append(
                Violation("request", rule.name, f"needs VIRTIO feature {rule.offered} offered")
            )
        if rule.kept is not None and self.features_set and not self.has_virtio(rule.kept):
            text = f"needs VIRTIO feature {rule.kept} kept by SET_FEATURES"
            found.append(Violation("request", rule.name, text, tolerated=True))
        if rule.after_owner and not self.owned:
            found.append(Violation("request", rule.name, "comes after SET_OWNER", tolerated=True))
        if rule.not_owned and self.owned:
            text = "comes once, or after RESET_OWNER"
            found.append(Violation("request", rule.name, text, tolerated=True))
        for field in rule.reserved:
            value = getattr(message, field)
            if value:
                found.append(Violation(field, value, "reserved, must be 0", tolerated=True))
        if rule.both_halves is not None and self.has_virtio(VIRTIO_F_RING_PACKED):
            value = getattr(message, rule.both_halves)
            if 0 < value <= 0xFFFF:
                text = "bits 16 to 31 are the device's half of a packed ring's position"
                found.append(Violation(rule.both_halves, value, text, tolerated=True))
        if int(rule.not_with) & having:
            names = _names(rule.not_with & self.protocol_features)
            found.append(
                Violation(
                    "request",
                    rule.name,
                    f"must not be sent with {names} negotiated",
                    tolerated=True,
                )
            )
        least, most = fd_counts(rule.fds, message)
        if not least <= fds <= most:
            found.append(_count(fds, least, most))
        elif isinstance(message, r.SetLogBase) and fds and not self.has(ProtocolFeatures.LOG_SHMFD):
            rule_text = "a descriptor needs LOG_SHMFD negotiated"
            found.append(Violation("fds", fds, rule_text, descriptors=True))
        if isinstance(message, r.SetProtocolFeatures):
            found += self._feature_violations(message.features)
        if isinstance(message, GpuSetProtocolFeatures) and self.offered_gpu_features is not None:
            # In plain integers: in Python 3.11 ~ drops the bits that a flag type has no name for.
            extra = int(message.features) & ~int(self.offered_gpu_features)
            if extra:
                found.append(Violation("features", message.features, f"not offered: {extra:#x}"))
        return tuple(found)

    def _feature_violations(self, features: ProtocolFeatures) -> list[Violation]:
        found = []
        offered = self.offered_protocol_features
        extra = 0 if offered is None else int(features) & ~int(offered)
        if extra:
            rule = f"not offered by the back-end: {_names(ProtocolFeatures(extra))}"
            found.append(Violation("features", features, rule))
        for feature, others in REQUIRED_WITH.items():
            if features & feature and others & ~features:
                rule = f"{_names(feature)} needs {_names(others)}"
                found.append(Violation("features", features, rule))
        return found

    def reply_violations(self, rule: Rule, message: Message, fds: int) -> tuple[Violation, ...]:
        """Return the rules that answering with ``message`` and ``fds`` descriptors breaks."""
        kind = rule.reply_fds
        least, most = fd_counts(kind, message)
        if kind.name == "OPTIONAL" and isinstance(message, a.Ack) and message.value:
            most = 0
        return () if least <= fds <= most else (_count(fds, least, most),)

    def answer_to(self, rule: Rule, message: Message, need_reply: bool) -> tuple[type, ...]:
        """Return the classes of the answer that ``message`` gets now; empty when it gets none.

        Args:
            rule: the row of the message.
            message: the request.
            need_reply: whether its header says NEED_REPLY.
        """
        answer = rule.answer
        if answer is Answer.ALWAYS:
            return rule.replies
        if answer is Answer.NEVER:
            return ()
        if (
            answer is Answer.WITH_LOG_SHMFD
            and self.has(ProtocolFeatures.LOG_SHMFD)
            and isinstance(message, r.SetLogBase)
        ):
            return rule.replies
        if answer is Answer.IN_POSTCOPY and self.postcopy and type(message) is rule.message:
            return rule.replies
        if need_reply and (answer is Answer.IF_FLAGGED or self.has(ProtocolFeatures.REPLY_ACK)):
            return (a.Ack,)
        return ()

    def tolerate(self, request: str, violation: Violation) -> None:
        """Count a broken rule that the peer is forgiven for."""
        key = request, violation.rule
        self.tolerated[key] = self.tolerated.get(key, 0) + 1

    def request_sent(self, message: Message) -> None:
        """Take over what a legal request changes.

        What POSTCOPY_LISTEN and POSTCOPY_END change, and what is negotiated, holds for the messages
        after them.
        """
        if type(message) not in _CHANGING:
            return
        if isinstance(message, r.SetFeatures):
            self.features = message.features
            self.features_set = True
        elif isinstance(message, r.SetProtocolFeatures):
            self.protocol_features = message.features
        elif isinstance(message, r.SetOwner):
            self.owned = True
        elif isinstance(message, r.ResetOwner):
            self.owned = False
        elif isinstance(message, r.PostcopyListen):
            self.postcopy = True
        elif isinstance(message, r.PostcopyEnd):
            self.postcopy = False
        elif isinstance(message, GpuSetProtocolFeatures):
            self.gpu_features = message.features

    def reply_sent(self, message: Message) -> None:
        """Take over what an answer tells."""
        if type(message) not in _TELLING:
            return
        if isinstance(message, a.FeaturesReply):
            self.offered_features = message.features
        elif isinstance(message, a.ProtocolFeaturesReply):
            self.offered_protocol_features = message.features
        elif isinstance(message, GpuFeaturesReply):
            self.offered_gpu_features = message.features


def _count(fds: int, least: int, most: int) -> Violation:
    wanted = str(least) if least == most else f"{least} or {most}"
    return Violation("fds", fds, f"must be {wanted} with this message", descriptors=True)


def _names(flags: ProtocolFeatures | GpuProtocolFeatures) -> str:
    return "|".join(member.name or "" for member in flags) or f"{int(flags):#x}"
