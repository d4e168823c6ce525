"""Features, ownership, queue number ("Front-end message types", "Protocol features")."""

from __future__ import annotations

import logging
from collections.abc import Callable

import vhost_protocol as vp

from ..errors import Refused
from ..features import VirtioFeature
from .context import Context
from .outcome import Answer, Descriptors, Outcome

log: logging.Logger = logging.getLogger("vhost_backend")

_ALWAYS = int(VirtioFeature.PROTOCOL_FEATURES | VirtioFeature.LOG_ALL)


class Negotiation:
    """The features that both sides use.

    `offered` collects the protocol features of all sections. `stop_rings` finishes requests in
    flight, stops the rings and then calls its argument. `features_changed` tells the sections of
    SET_FEATURES.
    """

    def __init__(
        self,
        context: Context,
        offered: Callable[[], vp.ProtocolFeatures],
        stop_rings: Callable[[Callable[[], None]], Outcome],
        features_changed: Callable[[], None],
    ) -> None:
        self._context = context
        self._offered = offered
        self._stop_rings = stop_rings
        self._features_changed = features_changed
        #: The answer to GET_PROTOCOL_FEATURES on this connection.
        self._answered: vp.ProtocolFeatures | None = None
        #: RESET_OWNER came, and no SET_FEATURES since.
        self._disowned = False
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.GetFeatures: self._get_features,
            vp.SetFeatures: self._set_features,
            vp.GetProtocolFeatures: self._get_protocol_features,
            vp.SetProtocolFeatures: self._set_protocol_features,
            vp.SetOwner: self._set_owner,
            vp.ResetOwner: self._reset_owner,
            vp.GetQueueNum: self._get_queue_num,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """MQ and REPLY_ACK: many queues, and acknowledgements of any message."""
        return vp.ProtocolFeatures.MQ | vp.ProtocolFeatures.REPLY_ACK

    def disconnect(self) -> None:
        """Forget the features, and log which rules the front-end broke."""
        session = self._context.session
        if session is not None:
            for (request, rule), count in session.tolerated.items():
                log.info(
                    "%s: the front-end broke a rule %d times: %s: %s",
                    *(self._context.name, count, request, rule),
                )
        self._disowned = False
        self._answered = None
        self._context.features = VirtioFeature(0)
        self._context.protocol_features = vp.ProtocolFeatures(0)

    @property
    def _features(self) -> int:
        return int(self._context.backend.features()) | _ALWAYS

    def _get_features(self, message: vp.GetFeatures, fds: Descriptors) -> Outcome:
        return Answer(vp.FeaturesReply(self._features))

    def _set_features(self, message: vp.SetFeatures, fds: Descriptors) -> Outcome:
        # In plain integers: the result of ~ on a flag type differs between Python versions.
        unknown = message.features & ~int(self._features)
        if unknown:
            raise Refused("SET_FEATURES", f"bits {unknown:#x} were not offered")
        if self._disowned:
            # DPDK's virtio-user stops a port with RESET_OWNER alone, and starts it with new rings.
            self._disowned = False
            return self._stop_rings(lambda: self._use_features(message))
        self._use_features(message)
        return None

    def _use_features(self, message: vp.SetFeatures) -> None:
        context = self._context
        features = context.features = VirtioFeature(message.features)
        log.debug("%s: the driver has accepted features %s", context.name, _bits(message.features))
        context.backend.acked_features(message.features)
        context.backend.set_event_idx(bool(features & VirtioFeature.EVENT_IDX))
        for index, vring in enumerate(context.vrings):
            with vring.get_mut() as state:
                state.settings.features = features
                if not features & VirtioFeature.PROTOCOL_FEATURES:
                    # "Ring states": without PROTOCOL_FEATURES rings start enabled.
                    state.set_enabled(True)
            context.scan(index)
        self._features_changed()

    def _get_protocol_features(self, message: vp.GetProtocolFeatures, fds: Descriptors) -> Outcome:
        self._answered = self._offered()
        return Answer(vp.ProtocolFeaturesReply(self._answered))

    def _set_protocol_features(self, message: vp.SetProtocolFeatures, fds: Descriptors) -> Outcome:
        offered = self._offered() if self._answered is None else self._answered
        unknown = int(message.features) & ~int(offered)
        if unknown:
            raise Refused("SET_PROTOCOL_FEATURES", f"bits {unknown:#x} were not offered")
        self._context.protocol_features = message.features
        names = " ".join(str(feature.name) for feature in message.features) or "none"
        log.debug("%s: protocol features: %s", self._context.name, names)
        return None

    def _set_owner(self, message: vp.SetOwner, fds: Descriptors) -> Outcome:
        # A connection has one front-end, so a second SET_OWNER changes nothing.
        return None

    def _reset_owner(self, message: vp.ResetOwner, fds: Descriptors) -> Outcome:
        # Deprecated; the specification recommends to do no more than disable all rings.
        for vring in self._context.vrings:
            with vring.get_mut() as state:
                state.set_enabled(False)
        self._disowned = True
        return None

    def _get_queue_num(self, message: vp.GetQueueNum, fds: Descriptors) -> Outcome:
        return Answer(vp.QueueNumReply(self._context.backend.num_queues()))


def _bits(features: int) -> str:
    """The bits for a log line: names, or numbers for the device type's own bits."""
    names = {int(feature): feature.name for feature in VirtioFeature}
    bits = [bit for bit in range(64) if features >> bit & 1]
    return " ".join(names.get(1 << bit) or str(bit) for bit in bits) or "none"
