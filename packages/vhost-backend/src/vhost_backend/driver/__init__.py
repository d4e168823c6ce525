"""The other end: a driver attached to a vhost-user back-end, without a virtual machine.

`DriverSession` does what a VMM and a guest do together: it shares memory with the back-end,
negotiates, sets up rings, submits requests and waits for them. `BlockDriver` speaks virtio-blk on
top, `Migration` moves a session from one back-end to another. The demo, the tests and
`vhost_backend.testing` are made of these.
"""

from .block import BlockDriver, BlockError, Completion
from .channel import ChannelServer
from .migration import Migration
from .options import SessionOptions
from .session import DriverSession
from .vring import DriverVring, SessionError

__all__ = [
    "BlockDriver",
    "BlockError",
    "ChannelServer",
    "Completion",
    "DriverSession",
    "DriverVring",
    "Migration",
    "SessionError",
    "SessionOptions",
]
