"""A vring's own operations, in every flavour and in one that a caller wrote."""

from __future__ import annotations

import os
import select
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import cast

import pytest

from guest_memory import GuestAddress, GuestMemory
from vhost_backend import BackendUsageError, VirtioFeature, Vring, VringMutex, VringRwLock
from vhost_backend import VringState as State
from virtqueue import DriverQueue, EngineName, RingConfig, Server, ring_layout

GUEST, USER = 1 << 20, 1 << 32
SIZE = 8


class Own(Vring):
    """A flavour that defines what it has to and nothing else."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._lock = threading.RLock()

    @contextmanager
    def _locked(self) -> Iterator[State]:
        with self._lock:
            yield self._state

    def get_ref(self) -> AbstractContextManager[State]:
        return self._locked()

    def get_mut(self) -> AbstractContextManager[State]:
        return self._locked()


@pytest.fixture(params=[VringMutex, VringRwLock, Own])
def vring(request: pytest.FixtureRequest, engine: EngineName) -> Iterator[Vring]:
    """A vring that no daemon has."""
    flavour: type[VringMutex] = request.param
    made = flavour(State(3, 256, engine=engine))
    yield made
    with made.get_mut() as state:
        state.reset()


@pytest.fixture
def memory() -> Iterator[GuestMemory]:
    made, fd = GuestMemory.allocate(1 << 16, guest_address=GUEST, user_address=USER)
    yield made
    os.close(fd)


def start(vring: Vring, memory: GuestMemory, *, event_idx: bool = False) -> DriverQueue:
    """The vring set up and started as the control plane does it, and its driver."""
    layout = ring_layout(SIZE, False)
    areas = USER + layout.descriptor, USER + layout.driver, USER + layout.device
    driver = DriverQueue(RingConfig(SIZE, *areas, event_idx=event_idx), memory)
    vring.set_queue_size(SIZE)
    vring.set_queue_info(*areas)
    vring.set_queue_event_idx(event_idx)
    vring.set_enabled(True)
    vring.set_queue_ready(memory)
    return driver


def offer(driver: DriverQueue, chains: int = 1) -> None:
    for _ in range(chains):
        driver.add([(GUEST + (1 << 15), 16)], [])
    driver.publish()


def test_what_is_set_is_what_the_ring_starts_with(vring: Vring) -> None:
    with pytest.raises(BackendUsageError, match="vring 3 has no addresses"), vring.get_ref() as ref:
        ref.config()
    vring.set_queue_info(0x1000, 0x2000, 0x3000)
    vring.set_queue_size(64)
    vring.set_queue_event_idx(True)
    with vring.get_ref() as state:
        config = state.config()
        assert config[:4] == (64, 0x1000, 0x2000, 0x3000)
        assert config.event_idx
        assert not config.packed
    vring.set_queue_event_idx(False)
    with vring.get_ref() as state:
        assert not state.config().event_idx


def test_event_idx_leaves_the_other_features_alone(vring: Vring) -> None:
    others = VirtioFeature.VERSION_1 | VirtioFeature.INDIRECT_DESC
    with vring.get_mut() as state:
        state.settings.features = others
    vring.set_queue_event_idx(True)
    with vring.get_ref() as state:
        assert state.settings.features == others | VirtioFeature.EVENT_IDX
    vring.set_queue_event_idx(False)
    with vring.get_ref() as state:
        assert state.settings.features == others


def test_the_next_index_is_what_was_set_and_then_where_the_ring_stands(
    vring: Vring, memory: GuestMemory
) -> None:
    vring.set_queue_next_avail(7)
    assert vring.queue_next_avail() == 7
    vring.set_queue_next_avail(0)
    driver = start(vring, memory)
    offer(driver, 3)
    with vring.get_mut() as state:
        batch = state.take(2)
        assert batch is not None
        for chain in batch:
            state.add_used(chain, 0)
    vring.signal_used_queue()
    assert vring.queue_next_avail() == 2
    with vring.get_mut() as state:
        assert state.stop() == 2
    assert vring.queue_next_avail() == 2


@pytest.mark.parametrize("event_idx", [False, True])
def test_a_completion_is_told_when_the_driver_wants_it(
    vring: Vring, memory: GuestMemory, event_idx: bool
) -> None:
    call = os.eventfd(0, os.EFD_NONBLOCK)
    vring.set_call(os.dup(call))
    driver = start(vring, memory, event_idx=event_idx)
    for wanted in (True, False):
        if wanted:
            driver.enable_notification()
        else:
            driver.disable_notification()
        offer(driver)
        with vring.get_mut() as state:
            batch = state.take(1)
            assert batch is not None
        vring.add_used(batch[0].head, 0)
        assert vring.needs_notification() is wanted
        vring.signal_used_queue()
        assert bool(select.select([call], [], [], 0)[0]) is wanted
        assert len(driver.collect()) == 1
        if wanted:
            assert os.eventfd_read(call) == 1
    os.close(call)


def test_chains_that_came_before_kicks_were_asked_for_are_told(
    vring: Vring, memory: GuestMemory
) -> None:
    driver = start(vring, memory)
    assert not vring.enable_notification()
    vring.disable_notification()
    offer(driver)
    assert vring.enable_notification()


def test_a_kick_is_read(vring: Vring) -> None:
    kick = os.eventfd(2, os.EFD_NONBLOCK)
    vring.set_kick(os.dup(kick))
    assert vring.read_kick()
    with pytest.raises(BlockingIOError):
        os.eventfd_read(kick)
    os.close(kick)


def test_a_broken_ring_is_told_on_the_error_descriptor(vring: Vring, memory: GuestMemory) -> None:
    error = os.eventfd(0, os.EFD_NONBLOCK)
    vring.set_err(os.dup(error))
    driver = start(vring, memory)
    layout = ring_layout(SIZE, False)
    offer(driver)
    memory.write(
        GuestAddress(GUEST + layout.descriptor + 14), b"\xff\xff"
    )  # what follows: no such descriptor
    memory.write(GuestAddress(GUEST + layout.descriptor + 12), b"\x01\x00")
    with vring.get_mut() as state:
        assert not state.take(1)
        assert not state.running
    assert os.eventfd_read(error) == 1
    os.close(error)


def test_a_reset_clears_settings_and_descriptors_and_keeps_callbacks(
    vring: Vring, memory: GuestMemory
) -> None:
    calls: list[str] = []
    with vring.get_mut() as state:
        new = vars(state.settings)
        state.events.on_truncated = lambda: calls.append("truncated")
        state.reset()
        generation = state.generation
    start(vring, memory, event_idx=True)
    kick = os.eventfd(0)
    vring.set_kick(kick)
    with vring.get_mut() as state:
        assert vars(state.settings) != new
        assert state.running
        state.reset()
        assert vars(state.settings) == new
        assert (state.settings.size, state.enabled, state.started) == (256, False, False)
        assert (state.kick_fd, state.call_fd, state.queue) == (-1, -1, None)
        assert state.generation > generation
        state.events.truncated()
    assert calls == ["truncated"]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(kick)


def test_other_threads_wait_until_a_thread_that_entered_twice_has_left(vring: Vring) -> None:
    other = threading.Thread(target=vring.set_enabled, args=(True,), daemon=True)
    with vring.get_mut() as state:
        with vring.get_mut(), vring.get_ref():
            other.start()
        other.join(0.05)
        assert not state.enabled
    other.join(60)
    assert not other.is_alive()
    with vring.get_ref() as state:
        assert state.enabled


def test_a_visitor_that_is_interrupted_keeps_nobody_out() -> None:
    class Busy:
        """A server in C that hears nothing."""

        def interrupt(self) -> None: ...

        def own(self) -> None: ...

        def borrow(self) -> bool:
            return False

    def interrupted() -> None:
        raise KeyboardInterrupt

    vring = VringMutex(State())
    lease, entered = vring.lease, threading.Event()
    lease.claim()
    lease.begin(cast("Server", Busy()))
    lease.wake = interrupted
    with pytest.raises(KeyboardInterrupt), vring.get_mut():
        pass
    lease.end()

    def visit() -> None:
        with vring.get_mut():
            entered.set()

    threading.Thread(target=visit, daemon=True).start()
    assert entered.wait(20)
