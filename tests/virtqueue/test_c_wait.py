"""Waiting in C: looking first, then sleeping, and no kick is lost in between."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from virtqueue import UsageError
from virtqueue.waiting import Waiter, WaitResult


@pytest.fixture
def fds() -> Iterator[tuple[int, int]]:
    kick, wake = os.eventfd(0, os.EFD_NONBLOCK), os.eventfd(0, os.EFD_NONBLOCK)
    yield kick, wake
    os.close(kick)
    os.close(wake)


@pytest.fixture
def engine() -> str:
    return "c"


@pytest.fixture
def rig(make_rig: Any, packed: bool, features: dict[str, bool]) -> Any:
    return make_rig(packed=packed, size=64, **features)


def waiter(rig: Any, fds: tuple[int, int], **settings: Any) -> Waiter:
    return Waiter([rig.device._engine.address], *fds, **settings)


def test_an_available_chain_ends_it_at_once(rig: Any, fds: tuple[int, int]) -> None:
    rig.offer_many(1)
    assert waiter(rig, fds).wait(10) == WaitResult.READY


def test_a_kick_ends_it_and_is_taken(rig: Any, fds: tuple[int, int]) -> None:
    os.eventfd_write(fds[0], 3)
    assert waiter(rig, fds).wait(10) == WaitResult.KICK
    with pytest.raises(BlockingIOError):
        os.eventfd_read(fds[0])


def test_a_wake_ends_it_and_stays(rig: Any, fds: tuple[int, int]) -> None:
    os.eventfd_write(fds[1], 1)
    assert waiter(rig, fds).wait(10) == WaitResult.WAKE
    assert os.eventfd_read(fds[1]) == 1


def test_the_time_runs_out(rig: Any, fds: tuple[int, int]) -> None:
    start = time.monotonic()
    assert waiter(rig, fds, spin_max=0.001).wait(0.03) == WaitResult(0)
    assert time.monotonic() - start >= 0.029


def test_a_long_sleep_shortens_the_next_look(rig: Any, fds: tuple[int, int]) -> None:
    it = waiter(rig, fds, spin_max=0.0001)
    assert it.spin == pytest.approx(0.0001)
    for _ in range(10):
        it.wait(0.001)
    assert it.spin == 0
    os.eventfd_write(fds[0], 1)
    it.wait(1)
    assert it.spin > 0


def test_while_it_looks_the_driver_need_not_kick(rig: Any, fds: tuple[int, int]) -> None:
    """The driver offers a chain while the waiter looks: found without a kick."""
    it = waiter(rig, fds, spin_max=0.9)
    found: list[WaitResult] = []
    assert len(rig.device.take()) == 0
    thread = threading.Thread(target=lambda: found.append(it.wait(10)))
    thread.start()
    time.sleep(0.05)
    rig.offer()
    assert not rig.driver.publish()
    thread.join()
    assert found == [WaitResult.READY]


def test_no_wake_up_is_lost(rig: Any, fds: tuple[int, int]) -> None:
    """One chain at a time in both directions, kicks sent only when asked for."""
    rounds = 1000
    it = waiter(rig, fds, spin_max=0.00002)

    def serve() -> None:
        done = 0
        while done < rounds:
            taken = len(rig.device.cycle())
            done += taken
            if not taken:
                assert it.wait(20), "a kick was lost"
        rig.device.cycle()

    thread = threading.Thread(target=serve)
    thread.start()
    text, room = rig.text(b"x"), rig.room(8)
    for _ in range(rounds):
        while not rig.driver.free >= 2:
            rig.driver.collect()
        rig.driver.add([text], [room])
        if rig.driver.publish():
            os.eventfd_write(fds[0], 1)
    thread.join()


def test_a_look_takes_less_than_a_second(rig: Any, fds: tuple[int, int]) -> None:
    with pytest.raises(UsageError, match="0 to 1 s"):
        waiter(rig, fds, spin_max=1)
