"""What each column of a row asks for, as a function of the connection's state and the message.

A column that a row leaves empty costs nothing: ``checks_of`` makes functions of the others, once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from ..messages import requests as r
from ..messages.constants import (
    VIRTIO_F_RING_PACKED,
    GpuProtocolFeatures,
    ProtocolFeatures,
)
from ..messages.gpu import GpuSetProtocolFeatures
from ..messages.message import Message
from .negotiated import Negotiated
from .rule import Check, Fds, Rule, Violation

_F = ProtocolFeatures
#: Protocol features that make sense only together with others: SET_PROTOCOL_FEATURES is refused
#: without them (sections "In-band notifications" and GET_VRING_BASE_SKIP_DRAIN).
REQUIRED_WITH: Final[dict[ProtocolFeatures, ProtocolFeatures]] = {
    _F.INBAND_NOTIFICATIONS: _F.BACKEND_REQ | _F.REPLY_ACK,
    _F.GET_VRING_BASE_SKIP_DRAIN: _F.GET_VRING_BASE_INFLIGHT | _F.INFLIGHT_SHMFD,
}


def checks_of(rule: Rule, needs: ProtocolFeatures) -> tuple[Check, ...]:
    """Return what must hold for the requests of a row.

    Args:
        rule: the row.
        needs: protocol features that every request of its table needs.
    """
    found = []
    if rule.needs | needs:
        found.append(_needs(rule, rule.needs | needs))
    for column, make in _COLUMNS.items():
        value = getattr(rule, column)
        if value != Rule._field_defaults[column]:
            found.append(make(rule, value))
    return (*found, _fds(rule), *rule.also)


# Checks compare plain numbers: every message takes this way, and flags are slow to combine.


def _needs(rule: Rule, features: ProtocolFeatures) -> Check:
    bits = int(features)

    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        missing = bits & ~int(state.protocol_features)
        return _request(rule, f"needs {_names(_F(missing))} negotiated") if missing else ()

    return check


def _fds_need(rule: Rule, features: ProtocolFeatures) -> Check:
    bits = int(features)

    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        missing = bits & ~int(state.protocol_features)
        if not fds or not missing:
            return ()
        text = f"a descriptor needs {_names(_F(missing))} negotiated"
        return (Violation("fds", fds, text, descriptors=True),)

    return check


def _gpu_needs(rule: Rule, features: GpuProtocolFeatures) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        missing = int(features) & ~int(state.gpu_features)
        return _request(rule, f"needs GPU {_names(features)} negotiated") if missing else ()

    return check


def _virtio(rule: Rule, bit: int) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        if state.has_virtio(bit):
            return ()
        return _request(rule, f"needs VIRTIO feature {bit} negotiated")

    return check


def _offered(rule: Rule, bit: int) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        offered = state.offered_features
        if offered is None or offered >> bit & 1:
            return ()
        return _request(rule, f"needs VIRTIO feature {bit} offered")

    return check


def _kept(rule: Rule, bit: int) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        if not state.features_set or state.has_virtio(bit):
            return ()
        return _request(rule, f"needs VIRTIO feature {bit} kept by SET_FEATURES", tolerated=True)

    return check


def _after_owner(rule: Rule, wanted: bool) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        return () if state.owned else _request(rule, "comes after SET_OWNER", tolerated=True)

    return check


def _not_owned(rule: Rule, wanted: bool) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        text = "comes once, or after RESET_OWNER"
        return _request(rule, text, tolerated=True) if state.owned else ()

    return check


def _not_with(rule: Rule, features: ProtocolFeatures) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        present = int(features) & int(state.protocol_features)
        text = f"must not be sent with {_names(_F(present))} negotiated"
        return _request(rule, text, tolerated=True) if present else ()

    return check


def _reserved(rule: Rule, fields: tuple[str, ...]) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        return tuple(
            [
                Violation(field, getattr(message, field), "reserved, must be 0", tolerated=True)
                for field in fields
                if getattr(message, field)
            ]
        )

    return check


def _both_halves(rule: Rule, field: str) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        value = getattr(message, field)
        if not 0 < value <= 0xFFFF or not state.has_virtio(VIRTIO_F_RING_PACKED):
            return ()
        text = "bits 16 to 31 are the device's half of a packed ring's position"
        return (Violation(field, value, text, tolerated=True),)

    return check


_COLUMNS: dict[str, Callable[[Rule, Any], Check]] = {
    "fds_need": _fds_need,
    "gpu_needs": _gpu_needs,
    "virtio": _virtio,
    "offered": _offered,
    "kept": _kept,
    "after_owner": _after_owner,
    "not_owned": _not_owned,
    "not_with": _not_with,
    "reserved": _reserved,
    "both_halves": _both_halves,
}


def _fds(rule: Rule) -> Check:
    def check(state: Negotiated, message: Any, fds: int) -> tuple[Violation, ...]:
        # Other payloads under the same code bring none.
        if type(message) is not rule.message:
            return counted(Fds.NONE, message, fds)
        return counted(rule.fds, message, fds)

    return check


def counted(kind: Fds, message: Message, fds: int) -> tuple[Violation, ...]:
    """Return what is wrong with the number of descriptors that a message or an answer brings."""
    least, most = _counts(kind, message)
    if least <= fds <= most:
        return ()
    wanted = str(least) if least == most else f"{least} or {most}"
    return (Violation("fds", fds, f"must be {wanted} with this message", descriptors=True),)


def _counts(kind: Fds, message: Any) -> tuple[int, int]:
    if kind is Fds.NONE:
        return 0, 0
    if kind is Fds.ONE:
        return 1, 1
    if kind is Fds.OPTIONAL:
        return 0, 1
    if kind is Fds.PER_REGION:
        return len(message.regions), len(message.regions)
    if kind is Fds.UNLESS_ERROR:
        return 0, 0 if message.value else 1
    if kind is Fds.UNLESS_NO_FD:
        wanted = not message.no_fd
    elif kind is Fds.UNLESS_DISABLED:
        wanted = bool(message.width or message.height)
    else:
        wanted = bool(message.mmap_size)
    return (1, 1) if wanted else (0, 0)


# -- the column "also" ----------------------------------------------------------------------------


def protocol_features_fit(
    state: Negotiated, message: r.SetProtocolFeatures, fds: int
) -> tuple[Violation, ...]:
    """SET_PROTOCOL_FEATURES takes what was offered, and no feature without what it needs."""
    features = message.features
    texts = []
    offered = state.offered_protocol_features
    extra = 0 if offered is None else int(features) & ~int(offered)
    if extra:
        texts.append(f"not offered by the back-end: {_names(_F(extra))}")
    for feature, others in REQUIRED_WITH.items():
        if features & feature and others & ~features:
            texts.append(f"{_names(feature)} needs {_names(others)}")
    return tuple([Violation("features", features, text) for text in texts])


def gpu_features_are_offered(
    state: Negotiated, message: GpuSetProtocolFeatures, fds: int
) -> tuple[Violation, ...]:
    """The GPU protocol's SET_PROTOCOL_FEATURES takes what was offered."""
    offered = state.offered_gpu_features
    # In plain integers: in Python 3.11 ~ drops the bits that a flag type has no name for.
    extra = 0 if offered is None else int(message.features) & ~int(offered)
    return (Violation("features", message.features, f"not offered: {extra:#x}"),) if extra else ()


def _request(rule: Rule, text: str, *, tolerated: bool = False) -> tuple[Violation, ...]:
    return (Violation("request", rule.name, text, tolerated),)


def _names(flags: ProtocolFeatures | GpuProtocolFeatures) -> str:
    return "|".join(member.name or "" for member in flags) or f"{int(flags):#x}"
