"""Random control sequences, legal and not, against a model of the specification's states.

The model says for each message whether it has to be acknowledged or refused, and for each moment
whether the ring is running; a request that is submitted must be served exactly when it is, and one
that waited must be served as soon as the ring runs again.
"""

import os
import socket
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

import vhost_protocol as vp
from guest_memory import GuestAddress, GuestMemory
from vhost_backend import (
    DeviceBackend,
    QueueInfo,
    Request,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
)
from vhost_backend.driver.vring import GUEST_BASE, USER_BASE, DriverVring
from virtqueue import DriverQueue, RingConfig, ring_layout

ADVISED, LARGEST = 64, 128
SIZES = [0, 1, 3, 16, ADVISED, LARGEST, 1 << 16]
MEMORY = 1 << 20
RING, BUFFER = 0, 1 << 16
BASE_FEATURES = VirtioFeature.VERSION_1 | VirtioFeature.EVENT_IDX


class Echo(VirtioDevice):
    queue_size = ADVISED

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())


class ControlMachine(RuleBasedStateMachine):
    """One ring of one device, driven by one front-end."""

    @initialize(event_idx=st.booleans(), packed=st.booleans())
    def connect(self, event_idx: bool, packed: bool) -> None:
        ours, theirs = socket.socketpair()
        self.daemon = VhostUserDaemon("model", DeviceBackend(Echo()))
        self.daemon.start_connection(ours)
        self.frontend = frontend = vp.Frontend(theirs, timeout=60, strict=False)
        features = VirtioFeature.VERSION_1 | VirtioFeature.PROTOCOL_FEATURES
        if event_idx:
            features |= VirtioFeature.EVENT_IDX
        if packed:
            features |= VirtioFeature.RING_PACKED
        self.features = int(features)
        offered = frontend.get_features()
        assert self.features & ~offered == 0
        frontend.get_protocol_features()
        frontend.set_protocol_features(vp.ProtocolFeatures.REPLY_ACK | vp.ProtocolFeatures.MQ)
        frontend.set_protocol_features(
            vp.ProtocolFeatures.REPLY_ACK
            | vp.ProtocolFeatures.MQ
            | vp.ProtocolFeatures.RESET_DEVICE
            | vp.ProtocolFeatures.STATUS
        )
        frontend.set_owner()
        frontend.set_features(self.features)
        self.memory, self.memory_fd = GuestMemory.allocate(
            MEMORY, guest_address=GUEST_BASE, user_address=USER_BASE
        )
        self.packed = packed
        self.event_idx = event_idx
        self.shared = False
        self.disowned = False
        self.status = 0
        self._new_ring()

    def _new_ring(self) -> None:
        """The driver's side after a reset: a ring of zeroes, and nothing submitted."""
        self.size = ADVISED
        self.addresses = False
        self.started = self.enabled = False
        self.base = 0x8000_8000 if self.packed else 0
        self.told_base: int | None = 0
        self.ring: DriverVring | None = None
        self.pending = 0

    # -- what the model says --------------------------------------------------------------------

    @property
    def running(self) -> bool:
        return self.started and self.enabled and self.shared

    def expect(self, ok: bool, call: object, *arguments: object) -> None:
        if ok:
            call(*arguments)  # type: ignore[operator]
        else:
            with pytest.raises(vp.RequestFailed):
                call(*arguments)  # type: ignore[operator]

    # -- messages -------------------------------------------------------------------------------

    @rule(extra=st.sampled_from([0, 1 << 45, 1 << 63]))
    def set_features(self, extra: int) -> None:
        self.expect(not extra, self.frontend.set_features, self.features | extra)
        if self.disowned and not extra:
            # A new beginning after RESET_OWNER: the rings are stopped.
            self.disowned = False
            if self.started:
                self.base = self.told_base = self.frontend.get_vring_base(0)
                self.started = False

    @rule(index=st.sampled_from([0, 0, 0, 1, 200]), size=st.sampled_from(SIZES))
    def set_num(self, index: int, size: int) -> None:
        legal = index == 0 and 0 < size <= 1 << 15 and (self.packed or size != 3)
        legal = legal and not self.started
        # A ring that has run keeps its size: another one would be another ring.
        if legal and self.ring is not None and size != self.size:
            return
        self.expect(legal, self.frontend.set_vring_num, index, size)
        if legal:
            self.size = size

    @rule(index=st.sampled_from([0, 0, 0, 7]))
    def set_addr(self, index: int) -> None:
        places = [USER_BASE + RING + offset for offset in ring_layout(LARGEST, self.packed)[:3]]
        self.expect(
            index == 0, self.frontend.set_vring_addr, index, places[0], places[2], places[1]
        )
        if index == 0:
            self.addresses = True

    @rule(index=st.sampled_from([0, 0, 3]))
    def set_base(self, index: int) -> None:
        legal = index == 0 and not self.started
        self.expect(legal, self.frontend.set_vring_base, index, self.base)
        if legal:
            self.told_base = self.base

    @rule(index=st.sampled_from([0, 0, 0, 9]), with_fd=st.booleans())
    def start(self, index: int, with_fd: bool) -> None:
        if index == 0 and self.addresses and not self.started and self.told_base != self.base:
            return  # the driver would be lied to, which is its own fault
        if self.ring is None and self.addresses:
            places = [USER_BASE + RING + offset for offset in ring_layout(LARGEST, self.packed)[:3]]
            config = RingConfig(
                self.size,
                places[0],
                places[1],
                places[2],
                packed=self.packed,
                event_idx=self.event_idx,
                indirect=False,
            )
            self.memory.write(GuestAddress(GUEST_BASE + RING), bytes(BUFFER))
            self.ring = DriverVring(0, DriverQueue(config, self.memory), config)
        legal = index == 0 and self.addresses
        kick = os.eventfd(0, os.EFD_NONBLOCK)
        fd = None
        if with_fd:
            fd = self.ring.kick_fd if self.ring is not None else kick
        self.expect(legal, self.frontend.set_vring_kick, index, fd)
        os.close(kick)
        if legal:
            assert self.ring is not None
            self.frontend.set_vring_call(0, self.ring.call_fd)
            self.started = True

    @rule(index=st.sampled_from([0, 0, 4]), on=st.booleans())
    def enable(self, index: int, on: bool) -> None:
        self.expect(index == 0, self.frontend.set_vring_enable, index, on)
        if index == 0:
            self.enabled = on

    @rule()
    def stop(self) -> None:
        running = self.running
        if running:
            self._settle()
        base = self.frontend.get_vring_base(0)
        if self.started:
            self.base = base
        self.started = False
        self.told_base = base

    @rule(present=st.booleans())
    def share_memory(self, present: bool) -> None:
        if present:
            self.frontend.set_mem_table(self.memory.regions, [self.memory_fd])
        elif not self.started:
            other, fd = GuestMemory.allocate(4096, guest_address=0, user_address=1 << 40)
            self.frontend.set_mem_table(other.regions, [fd])
            os.close(fd)
        else:
            return
        self.shared = present

    @rule()
    def reset_device(self) -> None:
        self.reset(self.frontend.reset_device)
        self.status = 0
        assert self.frontend.get_status() == 0

    def reset(self, how: Callable[[], None]) -> None:
        if self.running:
            self._settle()
        how()
        if self.ring is not None:
            self.ring.close()
        self._new_ring()
        self.told_base = None  # where the old ring stood; the new one begins elsewhere

    @rule()
    def own(self) -> None:
        """As often as the front-end likes."""
        self.frontend.set_owner()

    @rule()
    def disown(self) -> None:
        """Deprecated: the rings are disabled, and nothing else happens before SET_FEATURES."""
        self.frontend.reset_owner()
        self.disowned = True
        self.enabled = False

    @rule(status=st.sampled_from([1, 3, 15, 0]))
    def set_status(self, status: int) -> None:
        """Zero is a reset, when the status was another."""
        if not status and self.status:
            self.reset(lambda: self.frontend.set_status(0))
        else:
            self.frontend.set_status(status)
        self.status = status
        assert self.frontend.get_status() == status

    @rule()
    def bad_request(self) -> None:
        region = vp.MemoryRegion(1 << 50, 4096, 1 << 50)
        assert region.size
        self.expect(False, self.frontend.set_vring_enable, 77, True)

    # -- requests -------------------------------------------------------------------------------

    @precondition(
        lambda self: self.ring is not None and self.started and self.pending < self.size // 2
    )
    @rule(data=st.binary(min_size=1, max_size=64))
    def submit(self, data: bytes) -> None:
        assert self.ring is not None
        if self.pending >= self.size // 2:
            return
        source, target = GUEST_BASE + BUFFER, GUEST_BASE + BUFFER + 4096
        self.memory.write(GuestAddress(source), data)
        self.ring.submit([(source, len(data))], [(target, len(data))])
        self.ring.kick()
        self.pending += 1

    @invariant()
    def a_running_ring_serves_what_was_submitted(self) -> None:
        if getattr(self, "ring", None) is not None and self.running:
            self._settle()

    def _settle(self) -> None:
        assert self.ring is not None
        while self.pending:
            self.pending -= len(self.ring.completions(60))

    def teardown(self) -> None:
        if hasattr(self, "daemon"):
            self.frontend.close()
            self.daemon.close()
            if self.ring is not None:
                self.ring.close()
            os.close(self.memory_fd)


ControlMachine.TestCase.settings = settings(
    max_examples=40,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)
TestControl = ControlMachine.TestCase
