"""Testing devices without a virtual machine.

- `attached(device)` runs a device behind a real daemon, in this process, with a driver's session
  on the other end of a socket pair.
- `served(device)` does the same behind a socket path, so that drivers can come one after another.
- `DeviceProcess(make)` runs a device in a child process that a test kills and starts again;
  `DriverSession.reconnect` goes on with its successor.
- `BlockWorkload` is I/O on a block device that checks every answer.
- `Migration` moves a session from one device to another.

Rules are broken with `session.frontend.send_raw(...)` and by writing to a ring's memory, at
`vring.descriptor_area`, `driver_area` and `device_area`. Fixtures for pytest are in
`vhost_backend.testing.pytest_plugin`.
"""

from ..driver import BlockDriver, DriverSession, DriverVring, Migration, SessionError
from .harness import attached, served
from .process import DeviceProcess
from .workload import BLOCK, BlockWorkload, WrongData

__all__ = [
    "BLOCK",
    "BlockDriver",
    "BlockWorkload",
    "DeviceProcess",
    "DriverSession",
    "DriverVring",
    "Migration",
    "SessionError",
    "WrongData",
    "attached",
    "served",
]
