"""A vhost-user back-end framework: virtio devices in Python, outside the virtual machine monitor.

Derive from `VirtioDevice` and `serve` it; or implement `VhostUserBackend` and run it with a
`VhostUserDaemon` for full control of the rings.
"""

import sys

from ._version import __version__

# Type checkers take this name for true. To import it from `typing` would take longer than all else
# that --print-capabilities does.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from .adapter.device_backend import DeviceBackend
    from .backend import VhostUserBackend, VhostUserBackendBase
    from .counters import QueueCounters
    from .daemon.in_loop import AsyncDaemon, serve_async
    from .daemon.prometheus import MetricsServer
    from .daemon.report import QueueReport, report
    from .daemon.serve import serve, serve_all
    from .daemon.threaded import VhostUserDaemon
    from .device.base import VirtioDevice
    from .device.hooks import (
        CryptoSessions,
        GpuSocket,
        Mtu,
        Rarp,
        SharedMemory,
        SharedObjects,
    )
    from .device.request import QueueInfo, Recall, Request
    from .device.state_stream import StateError
    from .devices import BlockDevice
    from .epoll_handler import VringEpollHandler
    from .errors import (
        BackendUsageError,
        DeviceBusy,
        DeviceError,
        DeviceRefused,
        ListenError,
        Refused,
        VhostBackendError,
    )
    from .fds.eventfd import WakeFd
    from .fds.listener import Listener
    from .features import VirtioFeature
    from .vring.locks import Vring, VringMutex, VringRwLock
    from .vring.state import VringState

# Names are imported when they are first used: a device needs no asyncio and no HTTP server, the
# command line's --help nothing of all this. No module may be called like one of the names.
_LAZY = {
    "AsyncDaemon": "daemon.in_loop",
    "BackendUsageError": "errors",
    "BlockDevice": "devices",
    "CryptoSessions": "device.hooks",
    "DeviceBackend": "adapter.device_backend",
    "DeviceError": "errors",
    "DeviceBusy": "errors",
    "DeviceRefused": "errors",
    "GpuSocket": "device.hooks",
    "ListenError": "errors",
    "Listener": "fds.listener",
    "Mtu": "device.hooks",
    "MetricsServer": "daemon.prometheus",
    "QueueInfo": "device.request",
    "QueueCounters": "counters",
    "QueueReport": "daemon.report",
    "Rarp": "device.hooks",
    "Recall": "device.request",
    "Refused": "errors",
    "Request": "device.request",
    "SharedMemory": "device.hooks",
    "SharedObjects": "device.hooks",
    "StateError": "device.state_stream",
    "VhostBackendError": "errors",
    "VhostUserBackend": "backend",
    "VhostUserBackendBase": "backend",
    "VhostUserDaemon": "daemon.threaded",
    "VirtioDevice": "device.base",
    "VirtioFeature": "features",
    "Vring": "vring.locks",
    "VringEpollHandler": "epoll_handler",
    "VringMutex": "vring.locks",
    "VringRwLock": "vring.locks",
    "VringState": "vring.state",
    "WakeFd": "fds.eventfd",
    "report": "daemon.report",
    "serve": "daemon.serve",
    "serve_all": "daemon.serve",
    "serve_async": "daemon.in_loop",
}


#: Old names and their new ones; each old name stays for one minor version.
_RENAMED: dict[str, str] = {"Queue": "QueueInfo"}


def __getattr__(name: str) -> object:
    if name in _RENAMED:
        from warnings import warn

        warn(
            f"vhost_backend.{name} is called {_RENAMED[name]} since 0.2",
            DeprecationWarning,
            stacklevel=2,
        )
        return getattr(sys.modules[__name__], _RENAMED[name])
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
    "CryptoSessions",
    "DeviceBackend",
    "DeviceBusy",
    "DeviceError",
    "DeviceRefused",
    "GpuSocket",
    "ListenError",
    "Listener",
    "MetricsServer",
    "Mtu",
    "QueueCounters",
    "QueueInfo",
    "QueueReport",
    "Rarp",
    "Recall",
    "Refused",
    "Request",
    "SharedMemory",
    "SharedObjects",
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
    "WakeFd",
    "__version__",
    "report",
    "serve",
    "serve_all",
    "serve_async",
]
