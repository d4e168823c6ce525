"""Notification suppression, both ways (virtio 2.7.7, 2.7.10, 2.8.14)."""

from __future__ import annotations

from typing import Any

import pytest
from virtqueue_rig import Rig

from virtqueue.engine.python.split import needs_event


def serve(rig: Rig, count: int = 1) -> bool:
    """Offer and complete ``count`` chains; whether the driver was to be signalled."""
    rig.offer_many(count)
    batch = rig.device.take()
    assert len(batch) == count
    for chain in batch:
        rig.device.complete(chain)
    return rig.device.publish()


def test_2_7_7_2_without_event_idx_the_flag_decides(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    assert serve(rig)
    rig.driver.disable_notification()
    assert not serve(rig)
    assert rig.driver.enable_notification()
    assert len(rig.driver.collect()) == 2
    assert not rig.driver.enable_notification()
    assert serve(rig)


def test_2_7_7_2_with_event_idx_only_a_passed_event_signals(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(size=16, packed=packed, event_idx=True)
    assert serve(rig)
    rig.driver.collect()
    # The driver did not move its event: nothing more to say.
    assert serve(rig) == packed
    rig.driver.collect()
    assert not rig.driver.enable_notification()
    assert serve(rig)
    rig.driver.disable_notification()
    assert not serve(rig)


def test_after_a_restart_the_driver_is_told_once_whatever_its_event(
    make_rig: Any, packed: bool
) -> None:
    """Nobody knows whether the device before came to signal what it had published."""
    rig: Rig = make_rig(size=16, packed=packed, event_idx=True, inflight=True)
    assert serve(rig)
    rig.driver.collect()
    assert not rig.driver.enable_notification()
    assert serve(rig)  # and the device dies before it signals
    rig.device = rig.new_device()
    assert serve(rig)
    assert not serve(rig)


@pytest.mark.parametrize("event_idx", [False, True])
def test_2_7_10_the_driver_kicks_a_device_that_found_nothing(
    make_rig: Any, packed: bool, event_idx: bool
) -> None:
    rig: Rig = make_rig(size=4, packed=packed, event_idx=event_idx)
    for _ in range(40):
        assert not rig.device.take()  # arms
        rig.offer()
        assert rig.driver.publish()
        rig.device.disable_notification()
        rig.offer()
        assert not rig.driver.publish()
        assert len(rig.device.take()) == 2
        rig.device.cycle()
        rig.driver.collect()


def test_2_7_10_an_armed_event_index_signals_once(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed, event_idx=True)
    assert not rig.device.enable_notification()
    rig.offer()
    assert rig.driver.publish()
    rig.offer()
    assert not rig.driver.publish()
    assert rig.device.enable_notification()
    assert rig.device.ready()


def test_chains_between_the_look_and_the_arming_are_found(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    engine = rig.device._engine
    arm = engine.arm

    def late() -> int:
        rig.offer_many(1)
        return arm()

    engine.arm = late  # type: ignore[method-assign]
    assert len(rig.device.take()) == 1


def test_publishing_nothing_signals_nobody(make_rig: Any, packed: bool) -> None:
    rig: Rig = make_rig(packed=packed)
    assert not rig.device.publish()
    assert not rig.device.cycle().notify
    assert not rig.driver.publish()


def test_2_8_14_events_work_over_every_wrap(make_rig: Any) -> None:
    for size in (2, 3, 5):
        rig: Rig = make_rig(size=size, packed=True, event_idx=True)
        for _ in range(4 * size + 3):
            assert not rig.driver.enable_notification()
            assert serve(rig)
            rig.driver.disable_notification()
            if rig.driver.free:
                assert not serve(rig)
            rig.driver.collect()


def test_2_7_10_need_event_is_right_for_every_distance() -> None:
    for old in (0, 1, 5, 0x7FFF, 0xFFF0, 0xFFFF):
        for moved in (0, 1, 2, 100, 0x8000, 0xFFFF):
            new = (old + moved) & 0xFFFF
            passed = {(old + step) & 0xFFFF for step in range(moved)}
            for event in (old, (old - 1) & 0xFFFF, new, (new - 1) & 0xFFFF, 0x1234):
                assert needs_event(event, new, old) == (event in passed)
