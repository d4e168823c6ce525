"""Hooks of device types, and the one table of the protocol features offered for them.

A hook is a method that a device or a back-end defines if its type needs it. Hooks that belong
together form a group: a Protocol names and types them, and a `HookGroup` says which protocol
features they implement. A device gets a group by defining its hooks. It may derive from the
Protocol as well, so that a type checker checks them.

Hooks are looked up here and nowhere else: `provided` decides which methods count as defined.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import FunctionType
from typing import Any, Concatenate, Final, Generic, ParamSpec, Protocol, TypeVar, cast

from vhost_protocol import (
    AsymmetricSession,
    GpuBackendChannel,
    ProtocolFeatures,
    SymmetricSession,
)

from ..errors import BackendUsageError

H = TypeVar("H")
P = ParamSpec("P")
R = TypeVar("R")
K = TypeVar("K", bound=type)

NOTHING: Final = ProtocolFeatures(0)

#: Methods that do not count as defined: the defaults of the bases, the stubs of the Protocols.
_DEFAULTS: Final[set[FunctionType]] = set()


def defaults(kind: K) -> K:
    """Class decorator: the methods of `kind` do not count as defined where they are inherited."""
    _DEFAULTS.update(value for value in vars(kind).values() if isinstance(value, FunctionType))
    return kind


def provided(target: object, hook: Callable[Concatenate[Any, P], R]) -> Callable[P, R] | None:
    """`target`'s own method for `hook`, bound; None when it defines none.

    `hook` is the method of a base or a Protocol. A default of a base and the stub of a Protocol do
    not count.
    """
    return cast("Callable[P, R] | None", _found(target, hook.__name__))


def _found(target: object, name: str) -> Any:
    """The attribute of that name that `target` defines; any value but a default method counts."""
    found = getattr(target, name, None)
    function = getattr(found, "__func__", found)
    return None if isinstance(function, FunctionType) and function in _DEFAULTS else found


class HookGroup(Generic[H]):
    """Hooks that belong together.

    `kind` is the Protocol that has them. `features` are the protocol features that are offered for
    them; with none their messages may come without a feature. A device may leave out the hooks
    named in `optional`. With `on_request` it may use the feature without the hooks, and then asks
    for it by name.
    """

    def __init__(
        self,
        kind: type[Any],
        features: ProtocolFeatures = NOTHING,
        *,
        optional: Sequence[str] = (),
        on_request: bool = False,
    ) -> None:
        defaults(kind)
        methods = [name for name, value in vars(kind).items() if isinstance(value, FunctionType)]
        names = [name for name in (*kind.__annotations__, *methods) if name[0] != "_"]
        self.features: ProtocolFeatures = features
        self.on_request: bool = on_request
        self.hooks: tuple[str, ...] = tuple(names)
        self._needed = tuple(name for name in names if name not in optional)

    def of(self, target: object) -> H | None:
        """`target` itself, typed as having these hooks; None when it lacks one."""
        return None if self.lacking(target) else cast("H", target)

    def offers(self, target: object, asked: ProtocolFeatures) -> ProtocolFeatures:
        """The features to offer for `target`, which asks for the features `asked`."""
        if self.of(target) is not None:
            return self.features
        return asked & self.features if self.on_request else NOTHING

    def defined(self, target: object) -> list[str]:
        """The hooks of the group that `target` defines."""
        return [name for name in self.hooks if _found(target, name) is not None]

    def lacking(self, target: object) -> list[str]:
        """The needed hooks that `target` does not define."""
        return [name for name in self._needed if _found(target, name) is None]


def check_hooks(
    groups: Sequence[HookGroup[Any]], target: object, asked: ProtocolFeatures, name: str
) -> None:
    """Raise `BackendUsageError` for a part of a group, or a feature without its hooks."""
    for group in groups:
        lacking = " and no ".join(group.lacking(target))
        wanted = asked & group.features
        if not lacking or (wanted and group.on_request):
            continue
        defined = " and ".join(group.defined(target))
        if defined:
            raise BackendUsageError(f"{name} has {defined} and no {lacking}")
        if wanted:
            raise BackendUsageError(f"{name} asks for {wanted.name} and has no {lacking}")


# -- the hooks of device types --------------------------------------------------------------------


class Configuration(Protocol):
    """A configuration space (virtio 1.3, 2.5). `VirtioDevice` has one where `config` is set."""

    def get_config(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`, little-endian."""

    def set_config(self, offset: int, data: bytes) -> None:
        """Write to it; raise `DeviceRefused` for a read-only field. This hook is optional."""


class Rarp(Protocol):
    """A network device that announces its guest after a migration (SEND_RARP)."""

    def send_rarp(self, mac: bytes) -> None:
        """Broadcast a RARP packet for that address (6 bytes)."""


class Mtu(Protocol):
    """A network device that is told its MTU (NET_SET_MTU)."""

    def net_set_mtu(self, mtu: int) -> None:
        """Take the largest payload of a frame (68 to 65535 bytes), or raise `DeviceRefused`."""


class CryptoSessions(Protocol):
    """A crypto device (CREATE_CRYPTO_SESSION, CLOSE_CRYPTO_SESSION)."""

    def create_crypto_session(
        self, op_code: int, session: SymmetricSession | AsymmetricSession
    ) -> int:
        """Make a session and return its id, negative on failure. `op_code` is virtio-crypto's."""

    def close_crypto_session(self, session_id: int) -> None:
        """Close the session."""


class SharedObjects(Protocol):
    """A device that shares objects, buffers for example, with others (GET_SHARED_OBJECT)."""

    def get_shared_object(self, uuid: bytes) -> int | None:
        """A descriptor of the object of that UUID (16 bytes), or None; the device still owns it."""


class SharedMemory(Protocol):
    """A device with shared memory regions (GET_SHMEM_CONFIG; virtio 1.3, 2.10)."""

    def get_shmem_config(self) -> Sequence[int]:
        """The regions' sizes in bytes, by id; 0 for an id that is not used."""


class GpuSocket(Protocol):
    """A GPU (GPU_SET_SOCKET)."""

    def set_gpu_socket(self, channel: GpuBackendChannel) -> None:
        """Take over the channel to the front-end's display."""


class SavedState(Protocol):
    """A device whose own state moves in a migration; `StateTransfer` carries it."""

    def save_state(self) -> bytes:
        """The whole state."""

    def load_state(self, version: int, state: bytes) -> None:
        """Take over the state that `save_state` of that version returned."""


CONFIGURATION: Final = HookGroup[Configuration](
    Configuration, ProtocolFeatures.CONFIG, optional=("set_config",), on_request=True
)
RARP: Final = HookGroup[Rarp](Rarp, ProtocolFeatures.RARP)
MTU: Final = HookGroup[Mtu](Mtu, ProtocolFeatures.MTU)
CRYPTO_SESSIONS: Final = HookGroup[CryptoSessions](CryptoSessions, ProtocolFeatures.CRYPTO_SESSION)
# A device that only looks up the objects of others asks for this feature.
SHARED_OBJECTS: Final = HookGroup[SharedObjects](
    SharedObjects, ProtocolFeatures.SHARED_OBJECT, on_request=True
)
SHARED_MEMORY: Final = HookGroup[SharedMemory](SharedMemory, ProtocolFeatures.SHMEM)
GPU_SOCKET: Final = HookGroup[GpuSocket](GpuSocket)
SAVED_STATE: Final = HookGroup[SavedState](SavedState, ProtocolFeatures.DEVICE_STATE)

#: The table of the hooks of device types; a back-end has them under the same names.
OF_A_TYPE: Final[tuple[HookGroup[Any], ...]] = (
    *(CONFIGURATION, RARP, MTU, CRYPTO_SESSIONS),
    *(SHARED_OBJECTS, SHARED_MEMORY, GPU_SOCKET),
)
#: The table of all hooks of a device.
OF_A_DEVICE: Final[tuple[HookGroup[Any], ...]] = (*OF_A_TYPE, SAVED_STATE)
#: Features without a hook: the device uses them on its channel.
BY_REQUEST: Final = ProtocolFeatures.HOST_NOTIFIER
