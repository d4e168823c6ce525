"""What a driver's session is asked to be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import vhost_protocol as vp

#: What to do with a request of the back-end's; True when it succeeded.
Handler = Callable[[Any], bool]


class SessionOptions(NamedTuple):
    """How a `DriverSession` negotiates, and what it sets up."""

    features: int = 0
    """Virtio feature bits to accept when offered; VERSION_1 is always accepted."""
    num_queues: int = 1
    """Rings to set up."""
    queue_size: int = 128
    """Descriptors in each."""
    memory_size: int = 16 << 20
    """Bytes of memory to share with the back-end."""
    memory_fd: int | None = None
    """A file of that size to share, which the session takes over; None: a new sealed memfd."""
    packed: bool = False
    """Use packed rings (the back-end has to offer RING_PACKED)."""
    event_idx: bool = True
    """Accept EVENT_IDX when offered."""
    indirect: bool = True
    """Accept INDIRECT_DESC when offered."""
    iommu: bool = False
    """Use IOVAs (the back-end has to offer ACCESS_PLATFORM). The session gives entries of the IOTLB
    page by page as the back-end asks for them; `DriverSession.invalidate` takes them away."""
    protocol_features: vp.ProtocolFeatures = vp.ProtocolFeatures(0)
    """Protocol features to accept besides the usual ones; with GPA_ADDRESSES the session tells the
    back-end no user addresses (and the back-end has to offer it)."""
    handlers: Mapping[type[vp.Message], Handler] | None = None
    """What to do with the back-end's own requests, by message class. The session makes a channel
    when there are handlers, or an IOMMU."""
    inflight: bool = False
    """Have the back-end record its requests in flight in memory that the session keeps
    (INFLIGHT_SHMFD), so that `DriverSession.reconnect` can hand them to the successor."""

    def but(self, **changes: Any) -> SessionOptions:
        """The same with these changes. Raises `TypeError` for a name that is no option."""
        unknown = changes.keys() - set(self._fields)
        if unknown:
            raise TypeError(f"a session has no option {', '.join(sorted(unknown))}")
        return self._replace(**changes)


#: What a session is when nothing else is said.
DEFAULT = SessionOptions()
