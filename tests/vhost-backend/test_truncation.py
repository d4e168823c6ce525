"""A front-end that takes its memory away under the device."""

import os
import subprocess
import sys

import pytest

# An installation without the C engine's library, which also holds the SIGBUS guard.
HIDE = """
import virtqueue.engine.c, virtqueue.c_library, virtqueue.memory.sigbus_guard
def hidden():
    raise ImportError("hidden")
for module in (virtqueue.engine.c, virtqueue.c_library, virtqueue.memory.sigbus_guard):
    module.library = hidden
"""

SCRIPT = """
import os, sys, time
import vhost_protocol as vp
from vhost_backend import BlockDevice, QueueInfo, Request, VirtioDevice
from vhost_backend.driver import DriverSession, SessionError
from vhost_backend.testing import served
from virtqueue import QueueBroken, SigbusGuard

class Touch(VirtioDevice):
    def handle(self, queue, request):
        how = sys.argv[1]
        if how == "write":
            request.write(b"x" * 4096)
        elif how == "view":
            for view in request.writable:
                view[:] = b"y" * len(view)
            request.written = request.writable_length
        elif how == "read":
            assert len(request.read()) == 4096

SIZE = 1 << 20
with served(Touch()) as path, served(Touch()) as other:
    fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, SIZE)
    bystander = DriverSession.connect(other, memory_size=SIZE)
    options = {"packed": sys.argv[3:] == ["packed"]}
    session = DriverSession.connect(path, memory_size=SIZE, memory_fd=os.dup(fd), **options)
    vring = session.vrings[0]
    source, target = session.allocate(4096, 4096), session.allocate(4096, 4096)
    vring.submit([(source, 4096)], [(target, 4096)])
    vring.kick()
    vring.completions()
    # Everything behind the ring goes and the ring itself stays, or nothing stays.
    vring.submit([(source, 4096)], [(target, 4096)])
    if sys.argv[2] == "data":
        os.ftruncate(fd, source - 0x1_0000_0000)
        vring.kick()
    else:
        vring.queue.publish()
        os.ftruncate(fd, 0)
        os.eventfd_write(vring.kick_fd, 1)
    try:
        vring.completions(2.0)
    except (SessionError, QueueBroken):
        print("no completion")
    # Another connection goes on, and so does the same socket.
    ring = bystander.vrings[0]
    a, b = bystander.allocate(4096), bystander.allocate(4096)
    ring.submit([(a, 4096)], [(b, 4096)])
    ring.kick()
    assert len(ring.completions()) == 1
    bystander.close()
    session.close()
    with DriverSession.connect(path) as again:
        ring = again.vrings[0]
        a, b = again.allocate(4096), again.allocate(4096)
        ring.submit([(a, 4096)], [(b, 4096)])
        ring.kick()
        assert len(ring.completions()) == 1
    os.close(fd)
print("survived", SigbusGuard.available())
"""


def run(script: str, *arguments: str, engine: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "VIRTQUEUE_ENGINE": engine},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("how", ["write", "view", "read"])
def test_the_daemon_survives(engine: str, how: str) -> None:
    assert "survived" in run(SCRIPT, how, "data", engine=engine)


@pytest.mark.parametrize("packed", ["split", "packed"])
@pytest.mark.parametrize("what", ["data", "ring"])
@pytest.mark.parametrize("how", ["write", "view", "read"])
def test_the_daemon_survives_without_the_library(how: str, what: str, packed: str) -> None:
    done = run(HIDE + SCRIPT, how, what, packed, engine="")
    assert done.startswith("no completion")
    assert done.endswith("survived False\n")


# What the front-end shares besides its memory: the dirty log, and the records of what is in flight.

RECORDS = """
import os, sys, threading
import vhost_protocol as vp
from vhost_backend import QueueInfo, Request, VirtioDevice, VirtioFeature
from vhost_backend.driver import DriverSession, SessionError
from vhost_backend.testing import served
from virtqueue import QueueBroken, SigbusGuard

what, when, packed, engine = sys.argv[1], sys.argv[2], sys.argv[3] == "packed", sys.argv[4]
taken, go_on = threading.Event(), threading.Event()

class Slow(VirtioDevice):
    def handle(self, queue, request):
        request.write(request.read())
        taken.set()
        assert go_on.wait(60)

def request(session):
    ring = session.vrings[0]
    a, b = session.allocate(4096), session.allocate(4096)
    ring.submit([(a, 4096)], [(b, 4096)])
    ring.kick()
    return ring

SIZE = 1 << 20
features = vp.ProtocolFeatures.INFLIGHT_SHMFD | vp.ProtocolFeatures.LOG_SHMFD
with served(Slow(), engine=engine or None) as path, served(Slow()) as other:
    bystander = DriverSession.connect(other, memory_size=SIZE)
    session = DriverSession.connect(
        path, memory_size=SIZE, packed=packed, protocol_features=features
    )
    fd = os.memfd_create("records")  # not sealed
    os.ftruncate(fd, SIZE)
    if what == "log":
        session.frontend.set_log_base(SIZE, 0, fd)
        session.frontend.set_features(int(session.features | VirtioFeature.LOG_ALL))
    else:
        base = session.stop_ring(0)
        session.frontend.set_inflight_fd(1 << 16, 64, 1, 128, fd)
        session.start_ring(0, base)
    go_on.set()
    assert len(request(session).completions()) == 1
    taken.clear()
    if when == "during":
        # A request is being worked on, and others wait.
        go_on.clear()
        ring = request(session)
        assert taken.wait(60)
        for _ in range(5):
            request(session)
        os.ftruncate(fd, 0)
        go_on.set()
    else:
        os.ftruncate(fd, 0)
        ring = request(session)
    # The connection ends, after what was completed before anybody touched what is missing.
    try:
        for _ in range(7):
            ring.completions(2.0)
            session.frontend.get_features()
    except (SessionError, QueueBroken, vp.ProtocolError):
        print("over")
    session.close()
    # Another connection goes on, and so does the same socket.
    assert len(request(bystander).completions()) == 1
    bystander.close()
    with DriverSession.connect(path, packed=packed, inflight=True) as again:
        assert len(request(again).completions()) == 1
    os.close(fd)
print("survived", SigbusGuard.available())
"""


@pytest.mark.parametrize("packed", ["split", "packed"])
@pytest.mark.parametrize("when", ["idle", "during"])
@pytest.mark.parametrize("what", ["log", "inflight"])
def test_truncated_records_end_one_connection(
    engine: str, what: str, when: str, packed: str
) -> None:
    done = run(RECORDS, what, when, packed, engine, engine="")
    assert done.splitlines()[0] == "over"
    assert done.splitlines()[-1].startswith("survived")


@pytest.mark.parametrize("packed", ["split", "packed"])
@pytest.mark.parametrize("when", ["idle", "during"])
@pytest.mark.parametrize("what", ["log", "inflight"])
def test_truncated_records_end_one_connection_without_the_library(
    what: str, when: str, packed: str
) -> None:
    done = run(HIDE + RECORDS, what, when, packed, "", engine="")
    assert done.splitlines()[0] == "over"
    assert done.splitlines()[-1] == "survived False"
