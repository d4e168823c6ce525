"""Testing devices without a virtual machine.

- `attached(device)` runs a device behind a real daemon, in this process, with a driver's session
  on the other end of a socket pair.
- `served(device)` does the same behind a socket path, so that drivers can come one after another.
- `serving(daemon, listener)` runs a daemon of your own on a thread meanwhile.
- `DeviceProcess(make)` runs a device in a child process that a test kills and starts again;
  `DriverSession.reconnect` goes on with the next child.
- `BlockWorkload` does I/O on a block device and checks every answer.
- `Migration` moves a session from one device to another.

A test fails (`DeviceErrors`) when its device has logged an error: an exception of a handler, a
misuse of a request, a failed hook. `with expect_errors(pattern):` says that the error is expected.

To break rules, use `session.frontend.send_raw(...)`, or write to a ring's memory at
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
