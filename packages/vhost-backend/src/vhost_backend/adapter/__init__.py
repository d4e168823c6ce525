"""A `VirtioDevice` behind the `VhostUserBackend` interface, and the workers that serve it.

Code that every back-end needs belongs elsewhere.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from ..device.base import VirtioDevice
    from .device_backend import DeviceBackend


def backend_for(device: VirtioDevice) -> DeviceBackend:
    """The back-end that serves `device`: on an event loop when `handle` is a coroutine function.

    Raises `BackendUsageError` for a device that cannot work.
    """
    from .checks import check_device
    from .coroutine_check import is_coroutine_function

    check_device(device)
    if is_coroutine_function(device.handle):  # asyncio comes only with a device that needs it
        from .coroutines import AsyncDeviceBackend

        return AsyncDeviceBackend(device)
    from .device_backend import DeviceBackend

    return DeviceBackend(device)
