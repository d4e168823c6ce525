"""The ring engine of a command, chosen before the command makes anything."""

from __future__ import annotations

from ..errors import VhostBackendError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from virtqueue import EngineName


def chosen_engine() -> EngineName:
    """The engine that VIRTQUEUE_ENGINE asks for, or the best there is."""
    from virtqueue import VirtqueueError, default_engine

    try:
        return default_engine()
    except VirtqueueError as error:
        raise VhostBackendError(str(error)) from None
