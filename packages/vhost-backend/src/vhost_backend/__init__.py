"""A vhost-user back-end framework: virtio devices in Python, outside the virtual machine monitor.

Derive from `VirtioDevice` and `serve` it; or implement `VhostUserBackend` and run it with a
`VhostUserDaemon` for full control of the rings.
"""

from ._version import __version__

# Type checkers take this name for true. To import it from `typing` would take longer than all else
# that --print-capabilities does.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .async_daemon import AsyncDaemon, serve_async
    from .backend import VhostUserBackend, VhostUserBackendBase
    from .counters import QueueCounters
    from .daemon import VhostUserDaemon
    from .device import Queue, Recall, Request, VirtioDevice
    from .device_backend import DeviceBackend
    from .devices import BlockDevice
    from .errors import BackendUsageError, DeviceError, ListenError, Refused, VhostBackendError
    from .features import VirtioFeature
    from .listener import Listener
    from .metrics import MetricsServer
    from .observe import QueueReport, report
    from .serving import serve, serve_all
    from .state_transfer import StateError
    from .vring import VringState
    from .vring_locks import Vring, VringMutex, VringRwLock
    from .worker import VringEpollHandler

# Names are imported when they are first used: a device needs no asyncio and no HTTP server, the
# command line's --help nothing of all this. No module may be called like one of the names.
_LAZY = {
    "AsyncDaemon": "async_daemon",
    "BackendUsageError": "errors",
    "BlockDevice": "devices",
    "DeviceBackend": "device_backend",
    "DeviceError": "errors",
    "ListenError": "errors",
    "Listener": "listener",
    "MetricsServer": "metrics",
    "Queue": "device",
    "QueueCounters": "counters",
    "QueueReport": "observe",
    "Recall": "device",
    "Refused": "errors",
    "Request": "device",
    "StateError": "state_transfer",
    "VhostBackendError": "errors",
    "VhostUserBackend": "backend",
    "VhostUserBackendBase": "backend",
    "VhostUserDaemon": "daemon",
    "VirtioDevice": "device",
    "VirtioFeature": "features",
    "Vring": "vring_locks",
    "VringEpollHandler": "worker",
    "VringMutex": "vring_locks",
    "VringRwLock": "vring_locks",
    "VringState": "vring",
    "report": "observe",
    "serve": "serving",
    "serve_all": "serving",
    "serve_async": "async_daemon",
}


def __getattr__(name: str) -> object:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value: object = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__


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
    "Recall",
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
