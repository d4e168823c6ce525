"""The control plane: what each front-end message does to the device. No sockets, no waiting.

`ControlPlane` dispatches to sections, one file each: negotiation, memory, rings, in-flight memory,
dirty log, IOMMU, postcopy, device state, and what concerns the device itself. A section says which
messages it handles and which protocol features it stands for; so what is offered and what is
implemented cannot drift apart.
"""

from .outcome import Answer, Outcome, Wait
from .plane import ControlPlane

__all__ = ["Answer", "ControlPlane", "Outcome", "Wait"]
