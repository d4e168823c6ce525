"""Checks that refuse a device or back-end that cannot work, when it is given to us.

Otherwise its mistakes show late, on another thread or in the guest: a queue that no worker serves,
a feature that is negotiated but not implemented, an answer that is never sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final

from ..backend import OF_A_BACKEND, VhostUserBackend, VhostUserBackendBase
from ..device.base import VirtioDevice, asked_features
from ..device.hooks import OF_A_DEVICE, check_hooks, provided
from ..errors import BackendUsageError
from ..features import RING_FEATURES, VirtioFeature
from .coroutine_check import is_coroutine_function

#: SET_VRING_KICK has eight bits for a vring's index.
MAX_QUEUES: Final = 256
#: Descriptors in a split or packed ring (virtio 1.3, 2.7 and 2.8).
MAX_QUEUE_SIZE: Final = 32768

#: Bits 24 to 49 are reserved, not for device types (virtio 1.3, section 6).
_TRANSPORT: Final = (1 << 50) - (1 << 24)
#: Those of them that the rings implement, or that change nothing for the rings.
_KNOWN: Final = int(
    RING_FEATURES
    | VirtioFeature.IN_ORDER
    | VirtioFeature.LOG_ALL
    | VirtioFeature.ANY_LAYOUT
    | VirtioFeature.PROTOCOL_FEATURES
    | VirtioFeature.ORDER_PLATFORM
)

_INTERFACE: Final = tuple(
    name for name, value in vars(VhostUserBackend).items() if callable(value) and name[0] != "_"
)
#: The methods for which `VhostUserBackendBase` has no default.
_LEFT_TO_DO: Final = ("num_queues", "handle_event")


def check_device(device: object) -> None:
    """Raise `BackendUsageError`, which names the attribute, for a device that cannot work."""
    if isinstance(device, type) and issubclass(device, VirtioDevice):
        raise BackendUsageError(
            f"this is the class {device.__name__}, not a device of it: write {device.__name__}()"
        )
    if not isinstance(device, VirtioDevice):
        raise BackendUsageError(f"{device!r} is no VirtioDevice")
    name = type(device).__name__
    _check_number(name, "device_id", device.device_id, 0, 0xFFFF_FFFF)
    _check_counts(name, "num_queues", device.num_queues, "queue_size", device.queue_size)
    _check_features(name, "features", device.features)
    _check_number(name, "error_status", device.error_status, int(bool(device.status_byte)), 255)
    if not isinstance(device.status_byte, bool):
        raise BackendUsageError(f"{name}.status_byte is {device.status_byte!r}: True or False")
    if not isinstance(device.config, bytes | bytearray | memoryview):
        raise BackendUsageError(
            f"{name}.config is {_shown(device.config)}: a configuration space is bytes"
        )
    _check_handlers(name, device)
    check_hooks(OF_A_DEVICE, device, asked_features(device), name)


def check_backend(backend: object) -> None:
    """Raise `BackendUsageError`, which names the method, for a back-end that cannot work."""
    kind = backend if isinstance(backend, type) else type(backend)
    name = kind.__name__
    if isinstance(backend, type):
        raise BackendUsageError(f"this is the class {name}, not a back-end of it: write {name}()")
    if isinstance(backend, VirtioDevice):
        raise BackendUsageError(f"{name} is a device: give DeviceBackend.of(device) to a daemon")
    missing = [method for method in _INTERFACE if _is_missing(kind, backend, method)]
    if missing:
        raise BackendUsageError(
            f"{name} does not define {', '.join(missing)}: VhostUserBackendBase has defaults for"
            f" all but {' and '.join(_LEFT_TO_DO)}"
        )
    checked: Any = backend
    queues = checked.num_queues()
    _check_counts(name, "num_queues()", queues, "max_queue_size()", checked.max_queue_size())
    _check_features(name, "features()", checked.features())
    _check_masks(name, checked.queues_per_thread(), queues)
    check_hooks(OF_A_BACKEND, checked, checked.protocol_features(), name)


def _is_missing(kind: type, backend: object, method: str) -> bool:
    found = getattr(kind, method, None)
    if found is None:
        return not callable(getattr(backend, method, None))
    stub = vars(VhostUserBackend)[method]
    return found is stub or (method in _LEFT_TO_DO and found is vars(VhostUserBackendBase)[method])


def _check_counts(name: str, queues_are: str, queues: object, size_is: str, size: object) -> None:
    _check_number(name, queues_are, queues, 1, MAX_QUEUES)
    number = _check_number(name, size_is, size, 1, MAX_QUEUE_SIZE)
    if number & (number - 1):
        raise BackendUsageError(f"{name}.{size_is} is {number}: a ring's size is a power of two")


def _check_number(name: str, attribute: str, value: object, least: int, most: int) -> int:
    if not isinstance(value, int) or not least <= value <= most:
        raise BackendUsageError(
            f"{name}.{attribute} is {_shown(value)}: a number from {least} to {most}"
        )
    return value


def _check_features(name: str, attribute: str, features: object) -> None:
    if not isinstance(features, int) or not 0 <= features < 1 << 64:
        shown = hex(features) if isinstance(features, int) else _shown(features)
        raise BackendUsageError(f"{name}.{attribute} is {shown}: a mask of bits 0 to 63")
    foreign = int(features) & _TRANSPORT & ~_KNOWN
    if foreign:
        bits = [bit for bit in range(64) if foreign >> bit & 1]
        names = ", ".join(f"{bit}{_name_of(bit)}" for bit in bits)
        raise BackendUsageError(
            f"{name}.{attribute} is {int(features):#x}: the rings do not do bit {names}"
        )


def _name_of(bit: int) -> str:
    named = VirtioFeature(1 << bit).name
    return f" ({named})" if named else ""


def _check_masks(name: str, masks: object, queues: int) -> None:
    if not isinstance(masks, Sequence) or not all(
        isinstance(mask, int) and mask >= 0 for mask in masks
    ):
        raise BackendUsageError(
            f"{name}.queues_per_thread() is {_shown(masks)}: one mask of queues for each worker"
        )
    seen = 0
    for mask in masks:
        twice = mask & seen & ((1 << queues) - 1)
        if twice:
            queue = twice.bit_length() - 1
            raise BackendUsageError(
                f"{name}.queues_per_thread() is {_masks(masks)}: two workers have queue {queue}"
            )
        seen |= mask
    left_out = [str(queue) for queue in range(queues) if not seen >> queue & 1]
    if left_out:
        raise BackendUsageError(
            f"{name}.queues_per_thread() is {_masks(masks)}: no worker has queue"
            f" {', '.join(left_out)}"
        )


def _masks(masks: Sequence[int]) -> str:
    return f"[{', '.join(map(bin, masks))}]"


def _check_handlers(name: str, device: VirtioDevice) -> None:
    own = {
        method.__name__
        for method in (VirtioDevice.handle, VirtioDevice.handle_batch, VirtioDevice.batch_handler)
        if provided(device, method) is not None
    }
    if not own:
        raise BackendUsageError(f"{name} defines neither handle nor handle_batch")
    concurrent = is_coroutine_function(device.handle)
    if not concurrent and is_coroutine_function(_undecorated(device.handle)):
        raise BackendUsageError(
            f"{name}.handle is a plain function around an `async def`: what decorates it has to"
            " return an `async def` itself, or nothing awaits the coroutine"
        )
    if concurrent and "handle_batch" in own:
        raise BackendUsageError(
            f"{name} has `async def handle`, so its handle_batch would never be called"
        )
    methods = [method for method, base in vars(VirtioDevice).items() if callable(base)]
    methods += [hook for group in OF_A_DEVICE for hook in group.defined(device)]
    for method in methods:
        if method == "handle" or method[0] == "_":
            continue
        if is_coroutine_function(getattr(device, method)):
            raise BackendUsageError(
                f"{name}.{method} is `async def`, which nothing would await: only handle may be"
            )


def _undecorated(function: object) -> object:
    """The function that a decorator has wrapped, as `functools.wraps` records it."""
    while (wrapped := getattr(function, "__wrapped__", None)) is not None:
        function = wrapped
    return function


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
