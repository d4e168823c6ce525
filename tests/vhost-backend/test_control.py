"""The control plane, message by message, through a real connection."""

import asyncio
import contextlib
import itertools
import mmap
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import GuestAddress, GuestMemory
from vhost_backend import (
    BackendUsageError,
    BlockDevice,
    DeviceBackend,
    Request,
    VhostBackendError,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
    Vring,
    VringEpollHandler,
)
from vhost_backend import QueueInfo as DeviceQueueView
from vhost_backend.daemon.threaded import RECONNECT_INTERVAL
from vhost_backend.driver import BlockDriver, DriverSession, SessionError
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import attached, served
from virtqueue import EngineName, inflight_size

pytestmark = pytest.mark.usefixtures("every_flavour")


class Echo(VirtioDevice):
    """Answers with what it was sent."""

    config = b"configuration"

    def handle(self, queue: DeviceQueueView, request: Request) -> None:
        request.write(request.read())


def exchange(session: DriverSession, data: bytes, index: int = 0, timeout: float = 5.0) -> bytes:
    """Send one request to an `Echo` and wait for the answer."""
    source, target = session.allocate(len(data)), session.allocate(len(data))
    session.memory.write(source, data)
    vring = session.vrings[index]
    identity = vring.submit([(source, len(data))], [(target, len(data))])
    vring.kick()
    assert vring.completions(timeout) == [(identity, len(data))]
    return session.memory.read(target, len(data))


@contextlib.contextmanager
def raw(device: VirtioDevice | None = None, features: int = 0) -> Iterator[vp.Frontend]:
    """A front-end that has negotiated acknowledgements and done nothing else."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with VhostUserDaemon("test", DeviceBackend.of(device or Echo())) as daemon:
        daemon.start_connection(ours)
        with vp.Frontend(theirs, timeout=60, strict=False) as frontend:
            offered = frontend.get_features()
            frontend.set_protocol_features(frontend.get_protocol_features())
            frontend.set_owner()
            frontend.set_features(offered & (features | VirtioFeature.PROTOCOL_FEATURES))
            yield frontend


# -- negotiation ----------------------------------------------------------------------------------


def test_what_is_offered() -> None:
    with raw() as frontend:
        features = VirtioFeature(frontend.get_features())
        assert features & VirtioFeature.PROTOCOL_FEATURES
        assert features & VirtioFeature.VERSION_1
        assert frontend.get_queue_num() == 1
        assert frontend.get_max_mem_slots() == 509
        assert frontend.get_protocol_features() & vp.ProtocolFeatures.CONFIG


def test_features_that_were_not_offered_are_refused_and_the_connection_goes_on() -> None:
    with raw() as frontend:
        with pytest.raises(vp.RequestFailed):
            frontend.set_features(1 << 63 | 1 << 30)
        assert frontend.get_queue_num() == 1


def test_protocol_features_that_were_not_offered_are_refused() -> None:
    with raw() as frontend:
        with pytest.raises(vp.LocalProtocolError, match="not offered"):
            frontend.set_protocol_features(1 << 63)
        # Past our own check: the back-end has no answer to it but to hang up.
        header = struct.pack("=III", vp.FrontendRequest.SET_PROTOCOL_FEATURES, 1, 8)
        frontend.send_raw(header + struct.pack("=Q", 1 << 63))
        with pytest.raises((vp.ProtocolError, OSError)):
            frontend.get_queue_num()


def test_a_second_owner_is_taken_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    """DPDK before 20.11 sends SET_OWNER once when it is made and once for each start."""
    caplog.set_level("INFO", "vhost_backend")
    with raw() as frontend:
        frontend.set_owner()
        frontend.set_owner()
        assert frontend.get_queue_num() == 1
    assert "test: the front-end broke a rule 2 times: SET_OWNER: comes once" in caplog.text


@pytest.mark.parametrize("features", [0, VirtioFeature.PROTOCOL_FEATURES])
def test_rings_are_enabled_before_features_are_set_or_without_bit_30(features: int) -> None:
    """QEMU's virtio-net enables its rings when it is made; DPDK before 20.11 never sets bit 30."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon:
        daemon.start_connection(ours)
        with vp.Frontend(theirs, timeout=60, strict=False) as frontend:
            frontend.get_features()
            frontend.set_protocol_features(frontend.get_protocol_features())
            frontend.set_owner()
            frontend.set_vring_enable(0, True)
            frontend.set_features(features)
            with daemon.vrings[0].get_ref() as state:
                assert state.enabled
            frontend.set_vring_enable(0, False)
            with daemon.vrings[0].get_ref() as state:
                assert not state.enabled


def test_a_port_is_started_again_as_dpdk_does_it() -> None:
    """DPDK 18 to 20.08 stops with RESET_OWNER alone and sets its rings up anew, from zero."""
    with attached(Echo()) as session:
        frontend = session.frontend
        assert exchange(session, b"before") == b"before"
        frontend.set_vring_enable(0, False)
        frontend.reset_owner()
        frontend.set_owner()
        session.features &= ~VirtioFeature.PROTOCOL_FEATURES
        frontend.set_features(int(session.features))
        session.share_memory()
        session.vrings.pop().close()
        session._set_up_ring(0, 64)
        assert exchange(session, b"after") == b"after"


def test_the_status_is_zero_after_a_reset() -> None:
    with raw() as frontend:
        frontend.set_status(15)
        frontend.reset_device()
        assert frontend.get_status() == 0


def test_leftovers_where_the_ring_is_asked_for_are_ignored() -> None:
    """DPDK and SPDK leave the last ring's state in GET_VRING_BASE."""
    with raw() as frontend:
        frontend.set_vring_base(0, 7)
        answer = frontend.ask(vp.GetVringBase(0, 0xCB20))
        assert answer == vp.VringBaseReply(0, 7)


def test_a_packed_position_without_the_devices_half_is_that_of_both() -> None:
    with raw(features=VirtioFeature.RING_PACKED | VirtioFeature.VERSION_1) as frontend:
        for base, both in ((0x8000, 0x8000_8000), (5, 0x0005_0005), (0x0005_8007, 0x0005_8007)):
            frontend.set_vring_base(0, base)
            assert frontend.get_vring_base(0) == both


def test_with_an_inflight_region_a_used_half_of_zero_is_meant() -> None:
    """A device that stands at 0 in its second round, with five requests that it has not used."""
    with attached(Echo(), packed=True, inflight=True) as session:
        session.stop_ring(0)
        for base, both in ((5, 5), (0x8005, 0x8005_8005)):
            # The front-end here would refuse to send what looks like DPDK's.
            header = vp.FrontendRequest.SET_VRING_BASE, 1, 8
            session.frontend.send_raw(struct.pack("<5I", *header, 0, base))
            assert session.frontend.get_vring_base(0) == both


def test_a_packed_ring_whose_position_was_never_set_begins_as_the_driver_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its wrap counters are 1 (virtio 2.8.1), and it goes on where it was after a stop."""
    monkeypatch.setattr(vp.Frontend, "set_vring_base", lambda frontend, index, base: None)
    with attached(Echo(), packed=True) as session:
        exchange(session, b"first")
        assert session.stop_ring(0) == 0x8002_8002  # two descriptors each
        session.start_ring(0)
        exchange(session, b"second")
        assert session.stop_ring(0) == 0x8004_8004


def test_a_packed_ring_that_never_ran_stands_at_its_beginning() -> None:
    """Its position may go to another back-end, which has to begin as the driver does."""
    with raw(features=VirtioFeature.RING_PACKED | VirtioFeature.VERSION_1) as frontend:
        base = frontend.get_vring_base(0)
        assert base == 0x8000_8000
        frontend.set_vring_base(0, 0x0005_8007)
        assert frontend.get_vring_base(0) == 0x0005_8007
    with raw() as frontend:
        assert frontend.get_vring_base(0) == 0


def test_what_the_device_advises_is_no_limit() -> None:
    with raw() as frontend:
        frontend.set_vring_num(0, 32768)
        for size in (0, 32769, 65536):
            with pytest.raises(vp.RequestFailed):
                frontend.set_vring_num(0, size)
    with attached(Echo(), queue_size=2048) as session:
        assert exchange(session, b"large") == b"large"


@pytest.mark.parametrize("packed", [False, True])
def test_in_flight_memory_holds_the_largest_ring_that_may_come(packed: bool) -> None:
    wanted = VirtioFeature.VERSION_1 | (VirtioFeature.RING_PACKED if packed else 0)
    with raw(features=wanted) as frontend:
        for asked, holds in ((64, 1024), (1024, 1024), (32768, 32768)):
            reply, fd = frontend.get_inflight_fd(1, asked)
            assert fd is not None
            with fd:
                assert reply.mmap_size == inflight_size(holds, packed)
                # What was made for more descriptors than the ring has is taken back.
                frontend.set_inflight_fd(reply.mmap_size, 0, 1, asked, fd)
        # No such ring; a request that has an answer of its own can only be refused by hanging up.
        with pytest.raises(vp.ConnectionClosed):
            frontend.get_inflight_fd(1, 32769)


def test_in_flight_memory_asked_for_before_the_format_is_known_holds_either() -> None:
    """QEMU before 5.1 sends GET_INFLIGHT_FD and SET_INFLIGHT_FD before SET_FEATURES."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with VhostUserDaemon("test", DeviceBackend.of(Echo())) as daemon:
        daemon.start_connection(ours)
        with vp.Frontend(theirs, timeout=60) as frontend:
            frontend.get_features()
            frontend.set_protocol_features(frontend.get_protocol_features())
            reply, fd = frontend.get_inflight_fd(1, 64)
            assert fd is not None
            with fd:
                assert reply.mmap_size == inflight_size(1024, True)
                small = inflight_size(64, False)  # another back-end's, for a split ring
                frontend.set_inflight_fd(small, 0, 1, 64, fd)


def test_features_may_be_set_again() -> None:
    with attached(Echo()) as session:
        session.frontend.set_features(int(session.features))
        assert exchange(session, b"after") == b"after"


# -- configuration space --------------------------------------------------------------------------


def test_configuration_is_read_from_its_offset() -> None:
    with raw() as frontend:
        assert frontend.get_config(0, 13) == b"configuration"
        assert frontend.get_config(6, 4) == b"urat"
        assert frontend.get_config(10, 6) == b"ion\0\0\0"


def test_a_write_to_configuration_is_refused() -> None:
    with raw() as frontend:
        with pytest.raises(vp.RequestFailed):
            frontend.set_config(0, b"x")
        assert frontend.get_config(0, 1) == b"c"


# -- rings: bad input -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ask",
    [
        lambda f: f.set_vring_num(0, 0),
        lambda f: f.set_vring_num(0, 3),
        lambda f: f.set_vring_num(0, 1 << 16),
        lambda f: f.set_vring_num(1, 128),
        lambda f: f.set_vring_base(0, 0x1_0000),
        lambda f: f.set_vring_base(9, 0),
        lambda f: f.set_vring_enable(1, True),
        lambda f: f.set_vring_addr(1, 0, 0, 0),
        lambda f: f.rem_mem_reg(vp.MemoryRegion(0, 4096, 0)),
    ],
)
def test_a_message_that_makes_no_sense_is_refused_alone(ask: object) -> None:
    with raw() as frontend:
        with pytest.raises(vp.RequestFailed):
            ask(frontend)  # type: ignore[operator]
        assert frontend.get_queue_num() == 1


def test_a_kick_descriptor_before_the_addresses_is_refused() -> None:
    with raw() as frontend, pytest.raises(vp.RequestFailed):
        frontend.set_vring_kick(0, os.eventfd(0))


def test_a_misaligned_ring_is_refused() -> None:
    with raw() as frontend:
        frontend.set_vring_addr(0, descriptor=8, used=0, available=0)
        kick = os.eventfd(0)
        with pytest.raises(vp.RequestFailed):
            frontend.set_vring_kick(0, kick)
        os.close(kick)


def test_a_base_of_a_ring_that_is_not_there_closes_the_connection() -> None:
    with raw() as frontend, pytest.raises(vp.ConnectionClosed):
        frontend.get_vring_base(7)


def test_a_request_that_is_not_offered_closes_the_connection() -> None:
    with raw() as frontend, pytest.raises(vp.ProtocolError):
        frontend.request(vp.SendRarp(b"\0" * 6), need_reply=True)


def test_a_regular_file_as_kick_descriptor_is_refused(tmp_path: Path) -> None:
    with attached(Echo()) as session:
        session.stop_ring(0)
        with open(tmp_path / "file", "wb") as file, pytest.raises(vp.RequestFailed):
            session.frontend.set_vring_kick(0, file)


# -- rings: states --------------------------------------------------------------------------------


def test_a_stopped_ring_ignores_a_late_kick_and_goes_on_where_it_was() -> None:
    with attached(Echo()) as session:
        for number in range(3):
            exchange(session, bytes([number]) * 16)
        assert session.stop_ring(0) == 3
        source, target = session.allocate(4), session.allocate(4)
        session.memory.write(source, b"late")
        vring = session.vrings[0]
        identity = vring.submit([(source, 4)], [(target, 4)])
        vring.kick()
        with pytest.raises(SessionError):
            vring.completions(0.2)
        session.start_ring(0, base=3)
        assert vring.completions(60) == [(identity, 4)]
        assert session.stop_ring(0) == 4


def test_a_disabled_ring_is_not_served_until_it_is_enabled() -> None:
    with attached(Echo()) as session:
        session.frontend.set_vring_enable(0, False)
        with pytest.raises(SessionError):
            exchange(session, b"while disabled", timeout=0.2)
        session.frontend.set_vring_enable(0, True)
        assert len(session.vrings[0].completions(60)) == 1


def test_without_protocol_features_rings_are_enabled_from_the_start() -> None:
    ours, theirs = socket.socketpair()
    with (
        VhostUserDaemon("test", DeviceBackend(Echo())) as daemon,
        vp.Frontend(theirs, timeout=60, strict=False) as frontend,
    ):
        daemon.start_connection(ours)
        frontend.set_owner()
        frontend.set_features(frontend.get_features() & VirtioFeature.VERSION_1)
        frontend.get_features()  # answered when the one before has been applied
        with daemon.vrings[0].get_ref() as state:
            assert state.enabled


def test_a_ring_without_a_kick_descriptor_is_polled() -> None:
    with attached(Echo()) as session:
        session.frontend.set_vring_kick(0, None)
        os.eventfd_write(session.vrings[0].kick_fd, 1)
        for number in range(20):
            assert exchange(session, bytes([number]) * 8) == bytes([number]) * 8


def test_a_ring_without_a_call_descriptor_completes_silently() -> None:
    with attached(Echo()) as session:
        session.frontend.set_vring_call(0, None)
        complete_one(session)


def complete_one(session: DriverSession) -> None:
    """Have a request served, and look for its completion without being called."""
    source, target = session.allocate(4), session.allocate(4)
    vring = session.vrings[0]
    vring.submit([(source, 4)], [(target, 4)])
    vring.kick()
    deadline = time.monotonic() + 60
    while not (done := vring.queue.collect()):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(done) == 1


def test_a_new_call_descriptor_is_signalled_at_once() -> None:
    """What completed while there was none would otherwise never be announced."""
    with attached(Echo()) as session:
        session.frontend.set_vring_call(0, None)
        complete_one(session)
        call = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_vring_call(0, call)
        poller = select.poll()
        poller.register(call, select.POLLIN)
        assert poller.poll(60_000)
        os.close(call)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_ring_that_was_never_used_has_nothing_to_signal(engine: EngineName, packed: bool) -> None:
    with attached(Echo(), engine=engine, packed=packed) as session:
        vring = session.vrings[0]
        with pytest.raises(BlockingIOError):
            os.eventfd_read(vring.call_fd)
        call = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_vring_call(0, call)
        session.frontend.get_queue_num()  # what came before has been done
        with pytest.raises(BlockingIOError):
            os.eventfd_read(call)
        os.close(call)
        session.frontend.set_vring_call(0, vring.call_fd)
        assert exchange(session, b"question") == b"question"
        # A ring that goes on may have been used by another back-end before this one.
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(vring.call_fd)
        session.start_ring(0, session.stop_ring(0))
        poller = select.poll()
        poller.register(vring.call_fd, select.POLLIN)
        assert poller.poll(60_000)


def test_a_full_call_descriptor_does_not_block_the_worker() -> None:
    with attached(Echo()) as session:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(session.vrings[0].call_fd)  # of the ring's start
        os.eventfd_write(session.vrings[0].call_fd, (1 << 64) - 2)
        for number in range(3):
            assert exchange(session, bytes([number]) * 8) == bytes([number]) * 8
            with contextlib.suppress(BlockingIOError):  # full already
                os.eventfd_write(session.vrings[0].call_fd, (1 << 64) - 2)


def test_a_pipe_that_is_closed_as_kick_descriptor_does_not_spin() -> None:
    with attached(Echo()) as session:
        reader, writer = os.pipe()
        session.frontend.set_vring_kick(0, reader)
        os.close(reader)
        os.close(writer)
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.2)
        assert time.process_time() - before < 0.15
        # A good descriptor brings it back.
        session.frontend.set_vring_kick(0, session.vrings[0].kick_fd)
        assert exchange(session, b"again") == b"again"


def test_reset_device_stops_rings_and_still_tells_where_they_stood() -> None:
    with attached(Echo()) as session:
        exchange(session, b"before")
        session.frontend.reset_device()
        assert session.frontend.get_vring_base(0) == 1


# -- memory ---------------------------------------------------------------------------------------


def test_memory_may_be_replaced_while_requests_run() -> None:
    with attached(Echo()) as session:
        for number in range(50):
            session.share_memory()
            assert exchange(session, bytes([number]) * 64) == bytes([number]) * 64


def test_a_ring_outside_of_memory_is_reported_and_comes_back_with_the_memory(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with attached(Echo()) as session:
        other, fd = GuestMemory.allocate(4096, guest_address=0)
        error = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_vring_err(0, error)
        session.frontend.set_mem_table(other.regions, [fd])
        os.eventfd_write(session.vrings[0].kick_fd, 1)
        poller = select.poll()
        poller.register(error, select.POLLIN)
        assert poller.poll(60_000)
        session.share_memory()
        assert exchange(session, b"home again") == b"home again"
        os.close(fd)
        os.close(error)


def test_the_510th_region_is_refused() -> None:
    with raw() as frontend:
        _, fd = GuestMemory.allocate(510 * 4096)
        for index in range(510):
            region = vp.MemoryRegion(index * 8192, 4096, 0x7000_0000_0000 + index * 8192)
            if index < 509:
                frontend.add_mem_reg(region, fd)
            else:
                with pytest.raises(vp.RequestFailed):
                    frontend.add_mem_reg(region, fd)
        frontend.rem_mem_reg(vp.MemoryRegion(0, 4096, 0x7000_0000_0000))
        os.close(fd)


def test_overlapping_and_too_large_regions_are_refused() -> None:
    with raw() as frontend:
        _, fd = GuestMemory.allocate(8192)
        frontend.add_mem_reg(vp.MemoryRegion(0, 8192, 0x7000_0000_0000), fd)
        for region in (
            vp.MemoryRegion(4096, 4096, 0x7100_0000_0000),
            vp.MemoryRegion(1 << 20, 16384, 0x7200_0000_0000),
            vp.MemoryRegion(1 << 21, 4096, 0x7300_0000_0000, mmap_offset=8192),
        ):
            with pytest.raises(vp.RequestFailed):
                frontend.add_mem_reg(region, fd)
        os.close(fd)


# -- in-flight memory -----------------------------------------------------------------------------


def test_in_flight_memory_is_given_and_taken_back() -> None:
    with raw() as frontend:
        reply, fd = frontend.get_inflight_fd(1, 128)
        assert fd is not None
        assert reply.mmap_size >= 16 + 16 * 128
        frontend.set_inflight_fd(reply.mmap_size, reply.mmap_offset, 1, 128, fd)
        with pytest.raises(vp.RequestFailed):
            frontend.set_inflight_fd(64, 0, 1, 128, fd)
        fd.close()


# -- connections ----------------------------------------------------------------------------------


def test_a_front_end_that_vanishes_at_any_byte_leaves_nothing_behind(image: Path) -> None:
    """Every prefix of a conversation, then silence: the next front-end finds a working device."""
    ours, theirs = socket.socketpair()
    recorder = _Recorder(theirs)
    with VhostUserDaemon("test", DeviceBackend(Echo())) as daemon:
        daemon.start_connection(ours)
        recorder.converse()
    conversation = recorder.data
    with attached(Echo()) as session:
        exchange(session, b"first")  # a process keeps what its first ring opens
    before = len(os.listdir("/proc/self/fd"))
    with served(Echo()) as path:
        for end in range(1, len(conversation), 7):
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(path)
                client.sendall(conversation[:end])
        with DriverSession.connect(path) as session:
            assert exchange(session, b"still there") == b"still there"
    assert len(os.listdir("/proc/self/fd")) == before


class _Recorder:
    """The bytes of a small conversation without descriptors."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.data = b""

    def converse(self) -> None:
        for code, payload in (
            (1, b""),
            (15, b""),
            (16, (1 << 3).to_bytes(8, "little")),
            (3, b""),
            (2, (1 << 30).to_bytes(8, "little")),
            (8, bytes(4) + (128).to_bytes(4, "little")),
            (10, bytes(8)),
            (18, bytes(4) + b"\1\0\0\0"),
            (11, bytes(8)),
        ):
            header = b"".join(n.to_bytes(4, "little") for n in (code, 1, len(payload)))
            self.data += header + payload
        self._socket.sendall(self.data)
        self._socket.settimeout(60)
        self._socket.recv(4096)
        self._socket.close()


def test_the_daemon_ends_while_connected_and_idle() -> None:
    ours, theirs = socket.socketpair()
    daemon = VhostUserDaemon("test", DeviceBackend(Echo()))
    daemon.start_connection(ours)
    with vp.Frontend(theirs, timeout=60) as frontend:
        frontend.get_features()
        threading.Timer(0.05, daemon.shutdown).start()
        daemon.wait()
        daemon.close()
        with pytest.raises((vp.ConnectionClosed, OSError)):
            frontend.get_features()


def test_get_vring_base_waits_for_requests_in_flight() -> None:
    taken = threading.Event()

    class Slow(VirtioDevice):
        def handle(self, queue: DeviceQueueView, request: Request) -> None:
            taken.set()
            time.sleep(0.3)
            request.write(b"done")

    with attached(Slow()) as session:
        vring = session.vrings[0]
        target = session.allocate(4)
        vring.submit([(session.allocate(4), 4)], [(target, 4)])
        vring.kick()
        assert taken.wait(60)
        assert session.frontend.get_vring_base(0) == 1
        assert session.memory.read(target, 4) == b"done"
        assert len(vring.queue.collect()) == 1


class Gate(VirtioDevice):
    """Answers a request once it is let go."""

    def __init__(self) -> None:
        self.taken = threading.Event()
        self.release = threading.Event()
        self.resets = 0

    def handle(self, queue: DeviceQueueView, request: Request) -> Awaitable[None] | None:
        self.taken.set()
        self.release.wait(60)
        request.write(b"done")
        return None

    def reset(self) -> None:
        self.resets += 1


class AsyncGate(Gate):
    """The same as a coroutine."""

    async def handle(self, queue: DeviceQueueView, request: Request) -> None:
        self.taken.set()
        while not self.release.is_set():
            await asyncio.sleep(0.001)
        request.write(b"done")


def reset_by_request(frontend: vp.Frontend) -> None:
    frontend.reset_device()


def reset_by_status(frontend: vp.Frontend) -> None:
    """As QEMU 7.2 does whenever its guest pauses, before it asks where the rings stand."""
    frontend.set_status(0)


@pytest.mark.parametrize("kind", [Gate, AsyncGate])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reset", [reset_by_request, reset_by_status])
def test_a_reset_loses_no_request_in_flight(
    engine: EngineName, reset: Callable[[vp.Frontend], None], packed: bool, kind: type[Gate]
) -> None:
    """The position that is told afterwards counts the request, so nobody would take it again."""
    device = kind()
    with attached(
        device, engine=engine, packed=packed, protocol_features=vp.ProtocolFeatures.STATUS
    ) as session:
        frontend, vring = session.frontend, session.vrings[0]
        frontend.set_status(15)
        target = session.allocate(4)
        identity = vring.submit([(session.allocate(4), 4)], [(target, 4)])
        vring.kick()
        assert device.taken.wait(60)
        bases: list[int] = []

        def stop() -> None:
            reset(frontend)
            bases.append(frontend.get_vring_base(0))

        thread = threading.Thread(target=stop)
        thread.start()
        thread.join(0.1)
        assert not bases
        device.release.set()
        thread.join(60)
        assert device.resets == 1
        assert bases == [0x8002_8002 if packed else 1]
        assert vring.completions(0.1) == [(identity, 4)]
        assert session.memory.read(target, 4) == b"done"


def test_a_ring_that_is_moved_completes_what_is_in_flight_where_it_was(engine: EngineName) -> None:
    device = Gate()
    with attached(device, engine=engine) as session:
        frontend, vring = session.frontend, session.vrings[0]
        identity = vring.submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
        vring.kick()
        assert device.taken.wait(60)
        config, (place, length) = vring.config, session.ring_memory[0]
        copy = session.allocate(length, 4096)
        session.memory.write(copy, session.memory.read(GuestAddress(place), length))
        distance = copy - place

        def move() -> None:
            frontend.set_vring_addr(
                0,
                descriptor=config.descriptor_address + distance,
                used=config.device_address + distance,
                available=config.driver_address + distance,
            )

        thread = threading.Thread(target=move)
        thread.start()
        thread.join(0.1)
        device.release.set()
        thread.join(60)
        assert vring.completions(0.1) == [(identity, 4)]
        assert frontend.get_vring_base(0) == 1


def test_front_ends_come_one_after_another(image: Path) -> None:
    with served(BlockDevice(image)) as path:
        for number in range(5):
            with DriverSession.connect(path, features=DRIVER_FEATURES) as session:
                driver = BlockDriver(session)
                if number:
                    assert driver.read(0, 512) == bytes([number - 1]) * 512
                driver.write(0, bytes([number]) * 512)


def test_a_daemon_as_client_connects_and_comes_back(tmp_path: Path) -> None:
    path = str(tmp_path / "front-end.sock")
    with VhostUserDaemon("test", DeviceBackend(Echo())) as daemon:
        daemon.start_client(path, reconnect=True)
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            listener.settimeout(60)
            for _ in range(3):
                connection, _ = listener.accept()
                with DriverSession(vp.Frontend(connection, timeout=60)) as session:
                    assert exchange(session, b"hello") == b"hello"


def test_a_client_that_may_not_reconnect_says_why_it_cannot_start(tmp_path: Path) -> None:
    with VhostUserDaemon("test", DeviceBackend(Echo())) as daemon:
        with pytest.raises(VhostBackendError, match="No such file"):
            daemon.start_client(tmp_path / "nobody")
        with pytest.raises(BackendUsageError, match="was not started"):
            daemon.wait()


def test_a_client_backs_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nobody, from one who is too busy to listen, and from one who hangs up at once."""
    path = str(tmp_path / "front-end.sock")
    waits: list[float] = []
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        daemon = stack.enter_context(VhostUserDaemon("test", DeviceBackend(Echo())))

        def hang_up() -> None:
            with contextlib.suppress(OSError):  # it is shut down in the end
                while True:
                    listener.accept()[0].close()

        def sleep(seconds: float) -> None:
            waits.append(seconds)
            if len(waits) == 3:
                listener.bind(path)
                listener.listen(0)
                with contextlib.suppress(BlockingIOError):
                    while True:  # until its queue is full
                        other = stack.enter_context(socket.socket(socket.AF_UNIX))
                        other.setblocking(False)
                        other.connect(path)
            elif len(waits) == 6:
                threading.Thread(target=hang_up).start()
            elif len(waits) == 10:
                daemon.shutdown()

        monkeypatch.setattr(daemon, "_sleep", sleep)
        daemon.start_client(path, reconnect=True)
        daemon.wait()
        listener.shutdown(socket.SHUT_RDWR)
    low, high = RECONNECT_INTERVAL
    assert waits[0] == low
    assert waits[-1] == high
    assert all(b == min(2 * a, high) for a, b in itertools.pairwise(waits))


def test_reset_owner_disables_the_rings_and_no_more() -> None:
    """Deprecated: "It is recommended that back-ends either ignore it or use it to disable"."""
    with attached(Echo()) as session:
        assert exchange(session, b"before") == b"before"
        session.frontend.reset_owner()
        source, target = session.allocate(4), session.allocate(4)
        session.memory.write(source, b"late")
        vring = session.vrings[0]
        vring.submit([(source, 4)], [(target, 4)])
        vring.kick()
        with pytest.raises(SessionError, match="nothing completed"):
            vring.completions(0.2)
        session.frontend.set_owner()
        session.frontend.set_vring_enable(0, True)
        assert len(vring.completions(60)) == 1
        assert session.memory.read(target, 4) == b"late"


@pytest.mark.parametrize(
    "wanted",
    [
        vp.ProtocolFeatures.INBAND_NOTIFICATIONS,
        vp.ProtocolFeatures.INBAND_NOTIFICATIONS | vp.ProtocolFeatures.REPLY_ACK,
        vp.ProtocolFeatures.INBAND_NOTIFICATIONS | vp.ProtocolFeatures.BACKEND_REQ,
    ],
)
def test_notifications_as_messages_without_what_they_need_close_the_connection(
    wanted: vp.ProtocolFeatures,
) -> None:
    """ "the back-end must close the connection", once it is asked for them without the rest."""

    def header(code: int, size: int = 0) -> bytes:
        return struct.pack("<III", code, 1, size)

    with served(Echo()) as path:
        with socket.socket(socket.AF_UNIX) as frontend:
            frontend.settimeout(60)
            frontend.connect(path)
            for code in (1, 15):  # GET_FEATURES, GET_PROTOCOL_FEATURES
                frontend.sendall(header(code))
                (offered,) = struct.unpack("<12xQ", frontend.recv(20, socket.MSG_WAITALL))
            assert int(wanted) & ~offered == 0
            frontend.sendall(header(16, 8) + struct.pack("<Q", int(wanted)))
            assert frontend.recv(1) == b""
        with DriverSession.connect(path) as session:
            assert exchange(session, b"next") == b"next"


class Listening(VhostUserBackendBase):
    """A back-end with a descriptor of its own."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, int, int]] = []
        self.told = threading.Event()

    def num_queues(self) -> int:
        return 3

    def queues_per_thread(self) -> list[int]:
        return [0b011, 0b100]

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        self.seen.append((device_event, event_set, thread_id))
        self.told.set()
        return False


def test_a_devices_own_descriptors() -> None:
    """`register_listener` and `unregister_listener`, before and after there is a front-end."""
    backend = Listening()
    reader, writer = os.pipe()
    ours, theirs = socket.socketpair()
    with VhostUserDaemon("test", backend) as daemon:
        first, second = daemon.get_epoll_handlers()
        assert (first.thread_id, second.thread_id) == (0, 1)
        assert [len(handler.vrings) for handler in (first, second)] == [2, 1]
        for data in (0, 1, 2):  # queues, and one more that is not to be mistaken for one
            with pytest.raises(BackendUsageError):
                first.register_listener(reader, select.EPOLLIN, data)
        with pytest.raises(BackendUsageError):
            first.unregister_listener(reader)
        second.register_listener(reader, select.EPOLLIN | select.EPOLLET, 7)
        with pytest.raises(FileExistsError):
            second.register_listener(reader, select.EPOLLIN, 8)
        os.write(writer, b"a")
        assert backend.told.wait(60)
        assert backend.seen == [(7, select.EPOLLIN, 1)]
        daemon.start_connection(ours)
        with vp.Frontend(theirs, timeout=60) as frontend:
            frontend.get_features()
            backend.told.clear()
            os.write(writer, b"b")
            assert backend.told.wait(60)
        second.unregister_listener(reader)
        backend.told.clear()
        os.write(writer, b"c")
        first.register_listener(reader, select.EPOLLIN | select.EPOLLET, 9)
        assert backend.told.wait(60)
        assert backend.seen[-1] == (9, select.EPOLLIN, 0)
        assert len(backend.seen) == 3
        first.unregister_listener(reader)
    os.close(reader)
    os.close(writer)


def test_a_worker_is_not_woken_for_rings_that_do_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each wake-up has the control thread wait for the interpreter, on a guest's way up."""
    woken: list[int] = []
    watch, scan = VringEpollHandler.watch, VringEpollHandler.scan

    def record_watch(self: VringEpollHandler, queue: int, fd: int, *, scan: bool = True) -> None:
        if scan:
            woken.append(queue)
        watch(self, queue, fd, scan=scan)

    def record_scan(self: VringEpollHandler, queue: int) -> None:
        woken.append(queue)
        scan(self, queue)

    monkeypatch.setattr(VringEpollHandler, "watch", record_watch)
    monkeypatch.setattr(VringEpollHandler, "scan", record_scan)
    with attached(Echo()) as session:
        assert exchange(session, b"hello") == b"hello"
    assert woken == [0]  # when it was enabled


@pytest.mark.parametrize("packed", [False, True])
def test_in_flight_memory_of_a_larger_ring_serves_a_smaller_one(packed: bool) -> None:
    """libvhost-user writes into the record how many descriptors GET_INFLIGHT_FD asked for."""
    features = VirtioFeature.VERSION_1 | (VirtioFeature.RING_PACKED if packed else 0)
    with attached(Echo(), queue_size=64, features=features, inflight=True) as session:
        assert exchange(session, b"before") == b"before"
        base = session.stop_ring(0)
        assert session._inflight is not None
        reply, fd = session._inflight
        with mmap.mmap(fd, reply.mmap_size) as region:
            version, descriptors = struct.unpack_from("<HH", region, 8)
            assert (version, descriptors) == (1, 64)
            if packed:
                # The free list goes on through the entries that the small ring does not need.
                for entry in range(64, 128):
                    struct.pack_into("<H", region, 32 + 32 * entry + 2, entry + 1)
            struct.pack_into("<H", region, 10, 128)
        session.frontend.set_inflight_fd(reply.mmap_size, 0, 1, 128, fd)
        session.start_ring(0, base)
        assert exchange(session, b"after") == b"after"


def test_a_ring_that_begins_anew_needs_no_new_in_flight_memory() -> None:
    """A guest that boots again under QEMU keeps the memory, and begins its ring at 0."""
    with attached(Echo(), inflight=True) as session:
        for _ in range(300):
            assert exchange(session, b"before") == b"before"
        session.stop_ring(0)
        session._hand_over_inflight()
        session.vrings.pop().close()
        session._set_up_ring(0, 128)
        assert exchange(session, b"after") == b"after"
