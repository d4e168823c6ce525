"""The control plane: the effect of each front-end message. It uses no sockets and does not wait.

`ControlPlane` dispatches to sections, one file each: negotiation, memory and postcopy, rings,
in-flight memory, dirty log, IOMMU, device state, and the device itself. A section says which
messages it handles and which protocol features it implements, so that the daemon offers exactly the
features that are implemented.
"""

from .outcome import Answer, Outcome, Wait
from .plane import ControlPlane

__all__ = ["Answer", "ControlPlane", "Outcome", "Wait"]
