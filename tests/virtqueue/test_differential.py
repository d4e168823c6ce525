"""Both engines over the same ring memory: after every step they have to agree.

The Python engine is the oracle.  Drivers that keep the rules and drivers that write anything
anywhere are mixed; results, errors, records and every byte of memory are compared.
"""

from __future__ import annotations

import os
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, given, settings
from virtqueue_rig import GUEST, Rig

from guest_memory import DirtyLog
from virtqueue import (
    DONE,
    RECORD,
    DeviceQueue,
    DoneFlags,
    EngineName,
    QueueBroken,
    RecordFlags,
    UsageError,
    available_engines,
)
from virtqueue.layout import SEGMENT

if os.environ.get("VIRTQUEUE_ENGINE") == "c" or "c" in available_engines():
    ENGINES: tuple[EngineName, EngineName] = ("python", "c")
else:
    # Without a C engine the oracle is compared with itself, which shows that it is deterministic.
    ENGINES = ("python", "python")

MEMORY = 1 << 16
LOG = 64 << 10


class Side:
    """One engine with a memory, a log and an in-flight region of its own."""

    def __init__(self, engine: EngineName, inflight: bool, **config: Any) -> None:
        self.rig = Rig(
            engine=engine,
            memory_size=MEMORY,
            inflight=inflight,
            device=False,
            batch=6,
            log_used=0x100_0000,
            **config,
        )
        self.log_fd = os.memfd_create("log")
        os.ftruncate(self.log_fd, LOG)
        self.log = new_log(self.log_fd)
        self.device = self.open()

    def open(self) -> DeviceQueue:
        return self.rig.new_device(log=self.log)

    def state(self) -> Any:
        inflight = self.rig.inflight_bytes
        device = self.device
        return (
            self.rig.memory.read(GUEST, MEMORY),
            bytes(inflight) if inflight is not None else b"",
            bytes(self.log.view),
            device.base,
            device.in_flight,
            device.resubmitted,
            str(device.broken),
            self.rig.memory.pins,
        )

    def run(self, call: Any) -> Any:
        try:
            return self.describe(call(self.device))
        except QueueBroken as broken:
            return ("broken", broken.reason, broken.detail, broken.notify)
        except UsageError:
            return "usage"

    def describe(self, result: Any) -> Any:
        if not hasattr(result, "records"):
            return result
        records = []
        for record in RECORD.iter_unpack(result.records):
            flags, count, first = record[7], record[8], record[9]
            if flags & RecordFlags.EXTERNAL:
                record = (record[0], 0, 0, 0, *record[4:])
            base = self.rig.memory.window_base
            pieces = [
                (host - base, guest, length, kind, provision)
                for host, guest, length, kind, provision in SEGMENT.iter_unpack(
                    result._segments[32 * first : 32 * (first + count)]
                )
            ]
            records.append((record, pieces))
        return (
            records,
            bytes(result.done),
            result.notify,
            result.more,
            result.stalled,
        )

    def close(self) -> None:
        self.rig.close()
        self.log.close()
        os.close(self.log_fd)


def new_log(fd: int) -> DirtyLog:
    return DirtyLog(fd, LOG, enabled=True)


buffers = st.tuples(st.integers(0, MEMORY + 64), st.sampled_from([1, 7, 16, 17, 4096, 0]))
valid_buffers = st.tuples(
    st.integers(MEMORY // 2, MEMORY - 4200), st.sampled_from([1, 7, 16, 17, 4096])
)
steps = st.one_of(
    st.tuples(
        st.just("offer"),
        st.lists(valid_buffers, max_size=3),
        st.lists(valid_buffers, min_size=1, max_size=3),
        st.booleans(),
    ),
    st.tuples(st.just("take"), st.integers(0, 6)),
    st.tuples(st.just("cycle")),
    st.tuples(st.just("done"), st.integers(0, 5), st.integers(0, 255), st.integers(0, 7)),
    st.tuples(st.just("complete"), st.integers(0, 9), st.integers(0, 40), st.integers(0, 3)),
    st.tuples(st.just("publish")),
    st.tuples(st.just("rewind"), st.integers(0, 6)),
    st.tuples(st.just("give back"), st.lists(st.integers(0, 9), max_size=6)),
    st.tuples(st.just("arm")),
    st.tuples(st.just("disarm")),
    st.tuples(st.just("ready")),
    st.tuples(st.just("collect")),
    st.tuples(st.just("driver arm"), st.booleans()),
    st.tuples(st.just("reopen")),
)
hostile = st.one_of(
    st.tuples(
        st.just("descriptor"),
        st.integers(0, 7),
        buffers,
        st.sampled_from([0, 1, 2, 3, 4, 5, 6, 0x80, 0x81, 0x82, 0x83, 0x84, 0x8000, 0x8001]),
        st.integers(0, 9),
    ),
    st.tuples(st.just("available"), st.integers(0, 20), st.lists(st.integers(0, 8), max_size=4)),
    st.tuples(st.just("bytes"), st.integers(0, 260), st.binary(min_size=1, max_size=4)),
)
configs = st.fixed_dictionaries(
    {
        "packed": st.booleans(),
        "event_idx": st.booleans(),
        "in_order": st.booleans(),
        "indirect": st.booleans(),
        "status_byte": st.booleans(),
        "inflight": st.booleans(),
    }
)


def apply(side: Side, step: Any) -> Any:
    rig, device = side.rig, side.device
    name, *given_ = step
    if name == "offer":
        readable, writable, indirect = given_
        count = len(readable) + len(writable)
        indirect = indirect and rig.config.indirect
        if rig.driver.free < (1 if indirect else count) or count > 8:
            return None
        try:
            rig.driver.add(
                [(GUEST + a, n) for a, n in readable],
                [(GUEST + a, n) for a, n in writable],
                indirect,
            )
        except UsageError:
            return "usage"
        return rig.driver.publish()
    if name == "take":
        return side.run(lambda d: d.take(given_[0]))
    if name == "cycle":
        return side.run(lambda d: d.cycle())
    if name == "done":
        index, status, flags = given_
        batch = device._batch
        if index < len(batch):
            head, _, _, written = DONE.unpack_from(batch.done, 8 * index)
            if not rig.config.status_byte:
                flags &= ~DoneFlags.STATUS
            DONE.pack_into(batch.done, 8 * index, head, status, flags, written // 2)
        return None
    if name == "complete":
        head, written, status = given_
        return side.run(lambda d: d.complete(head, written, status))
    if name == "rewind":
        return side.run(lambda d: d.rewind(given_[0]))
    if name == "give back":
        return side.run(lambda d: d.give_back(given_[0]))
    if name == "reopen":
        if side.rig.inflight is None:
            return None
        device.stop()
        device.close()
        side.device = side.open()
        return None
    if name == "collect":
        try:
            return rig.driver.collect()
        except QueueBroken:
            return "the device broke the rules, or someone wrote into the ring"
    if name == "driver arm":
        return rig.driver.enable_notification() if given_[0] else rig.driver.disable_notification()
    if name == "descriptor":
        slot, (address, length), flags, last = given_
        rig.descriptor(slot, GUEST + address, length, flags, last)
        return None
    if name == "available":
        if not rig.config.packed:
            rig.avail(*[given_[0], *given_[1]])
        return None
    if name == "bytes":
        rig.memory.write(GUEST + given_[0], given_[1])
        return None
    calls: dict[str, Any] = {
        "publish": lambda d: d.publish(),
        "arm": lambda d: d.enable_notification(),
        "disarm": lambda d: d.disable_notification(),
        "ready": lambda d: d.ready(),
    }
    return side.run(calls[name])


def compare(config: dict[str, Any], script: list[Any]) -> None:
    sides = [Side(engine, **config) for engine in ENGINES]
    try:
        for number, step in enumerate(script):
            first, second = (apply(side, step) for side in sides)
            assert first == second, (number, step)
            ours, theirs = (side.state() for side in sides)
            for a, b in zip(ours, theirs, strict=True):
                assert a == b, (number, step)
    finally:
        for side in sides:
            side.close()


EXAMPLES = int(os.environ.get("VIRTQUEUE_EXAMPLES", "60"))
quiet = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize="VIRTQUEUE_EXAMPLES" not in os.environ,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.timeout(3600)
@quiet
@given(configs, st.lists(steps, min_size=5, max_size=60))
def test_the_engines_agree_on_drivers_that_keep_the_rules(
    config: dict[str, Any], script: list[Any]
) -> None:
    compare(config, script)


@pytest.mark.timeout(3600)
@quiet
@given(configs, st.lists(st.one_of(steps, hostile), min_size=5, max_size=60))
def test_the_engines_agree_on_drivers_that_break_them(
    config: dict[str, Any], script: list[Any]
) -> None:
    compare(config, script)
