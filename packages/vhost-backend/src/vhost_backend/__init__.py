"""A vhost-user back-end framework: virtio devices in Python, outside the virtual machine monitor.

Derive from `VirtioDevice` and `serve` it; or implement `VhostUserBackend` and run it with a
`VhostUserDaemon` for full control of the rings.
"""

from ._version import __version__
from .backend import VhostUserBackend, VhostUserBackendBase
from .counters import QueueCounters
from .daemon import VhostUserDaemon
from .device import Queue, Request, VirtioDevice
from .device_backend import DeviceBackend
from .devices import BlockDevice
from .errors import BackendUsageError, DeviceError, ListenError, Refused, VhostBackendError
from .features import VirtioFeature
from .listener import Listener
from .serve import serve
from .vring import Vring, VringMutex, VringRwLock, VringState
from .worker import VringEpollHandler

__all__ = [
    "BackendUsageError",
    "BlockDevice",
    "DeviceBackend",
    "DeviceError",
    "ListenError",
    "Listener",
    "Queue",
    "QueueCounters",
    "Refused",
    "Request",
    "VhostBackendError",
    "VhostUserBackend",
    "VhostUserBackendBase",
    "VhostUserDaemon",
    "VirtioDevice",
    "VirtioFeature",
    "Vring",
    "VringEpollHandler",
    "VringMutex",
    "VringRwLock",
    "VringState",
    "__version__",
    "serve",
]
