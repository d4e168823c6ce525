"""Testing devices without a virtual machine.

- `attached(device)` runs a device behind a real daemon, in this process, with a driver's session
  on the other end of a socket pair.
- `served(device)` does the same behind a socket path, so that drivers can come one after another.
- `serving(daemon, listener)` runs a daemon that you have made yourself on a thread meanwhile.
- `DeviceProcess(make)` runs a device in a child process that a test kills and starts again;
  `DriverSession.reconnect` goes on with its successor.
- `BlockWorkload` is I/O on a block device that checks every answer.
- `Migration` moves a session from one device to another.

A test fails (`DeviceErrors`) when its device has logged an error: what a handler raised, a misuse
of its request, a hook that failed. `with expect_errors(pattern):` says that it is meant to.

Rules are broken with `session.frontend.send_raw(...)` and by writing to a ring's memory, at
`vring.descriptor_area`, `driver_area` and `device_area`. Fixtures for pytest are in
`vhost_backend.testing.pytest_plugin`.
"""

from ..driver import BlockDriver, DriverSession, DriverVring, Migration, SessionError
from .harness import attached, served, serving
from .logged import DeviceErrors, MissingError, expect_errors
from .process import DeviceProcess
from .workload import BLOCK, BlockWorkload, WrongData

__all__ = [
    "BLOCK",
    "BlockDriver",
    "BlockWorkload",
    "DeviceErrors",
    "DeviceProcess",
    "DriverSession",
    "DriverVring",
    "Migration",
    "MissingError",
    "SessionError",
    "WrongData",
    "attached",
    "expect_errors",
    "served",
    "serving",
]
