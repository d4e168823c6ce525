"""A vhost-user back-end framework: virtio devices in Python, outside the virtual machine monitor.

Derive from `VirtioDevice` and `serve` it; or implement `VhostUserBackend` and run it with a
`VhostUserDaemon` for full control of the rings.
"""

from typing import TYPE_CHECKING, Any

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
from .observe import QueueReport, report
from .serve import serve, serve_all
from .state_transfer import StateError
from .vring import VringState
from .vring_locks import Vring, VringMutex, VringRwLock
from .worker import VringEpollHandler

if TYPE_CHECKING:
    from .async_daemon import AsyncDaemon, serve_async
    from .metrics import MetricsServer

__all__ = [
    "AsyncDaemon",
    "BackendUsageError",
    "BlockDevice",
    "DeviceBackend",
    "DeviceError",
    "ListenError",
    "Listener",
    "MetricsServer",
    "Queue",
    "QueueCounters",
    "QueueReport",
    "Refused",
    "Request",
    "StateError",
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
    "report",
    "serve",
    "serve_all",
    "serve_async",
]


def __getattr__(name: str) -> Any:
    """What brings much along (an HTTP server, asyncio) is imported when it is asked for."""
    if name == "MetricsServer":
        from .metrics import MetricsServer

        return MetricsServer
    if name in ("AsyncDaemon", "serve_async"):
        from . import async_daemon

        return getattr(async_daemon, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
