"""Testing devices without a virtual machine.

`attached(device)` runs a device behind a real daemon, in this process, with a driver's session on
the other end of a socket pair. `served(device)` does the same behind a socket path, so that several
drivers can come one after another.
"""

from .harness import attached, served

__all__ = ["attached", "served"]
