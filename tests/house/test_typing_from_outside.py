"""Types as a user of the packages sees them: mypy holds each line, pytest shows that it is true.

An ignore that is not needed is an error too, so the lines with one show what must not type-check.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable
from typing import assert_type

import guest_memory as gm
import vhost_backend as vb
import vhost_protocol as vp
import vhost_xen as vx
import virtqueue as vq

BASE = gm.GuestAddress(0x10000)
USER = gm.UserAddress(0x7000_0000)


def allocate() -> gm.GuestMemory:
    memory, fd = gm.GuestMemory.allocate(0x10000, guest_address=BASE, user_address=USER)
    assert_type(memory, gm.GuestMemory)
    assert_type(fd, int)
    os.close(fd)
    return memory


def test_guest_memory() -> None:
    memory = allocate()
    assert_type(memory.read(BASE, 4), bytes)
    assert_type(memory.load(BASE, 4), int)
    assert_type(memory.regions, tuple[gm.Region, ...])
    assert_type(memory.user_to_guest(USER), gm.GuestAddress)
    assert_type(memory.window, memoryview | None)
    holder = gm.MemoryHolder()
    assert_type(holder.current, gm.GuestMemory)
    assert_type(holder.replace(memory), gm.GuestMemory)
    assert memory.user_to_guest(USER) == BASE


def test_addresses_do_not_mix() -> None:
    memory = allocate()
    try:
        memory.user_to_guest(BASE)  # type: ignore[arg-type]
    except gm.GuestMemoryError as error:
        assert isinstance(error, gm.OutOfBounds | gm.NotMapped)  # noqa: PT017


def test_mappers_are_interchangeable() -> None:
    mappers: list[gm.Mapper] = [gm.MmapMapper(), vx.XenMapper()]
    window_mappers: list[gm.WindowMapper] = [gm.MmapMapper(), vx.XenMapper()]
    assert len(mappers) == len(window_mappers)


def test_both_ends_of_a_ring() -> None:
    layout = vq.ring_layout(16, packed=False)
    config = vq.RingConfig(
        size=16,
        descriptor_address=USER + layout[0],
        driver_address=USER + layout[1],
        device_address=USER + layout[2],
    )
    memory = allocate()
    driver = vq.DriverQueue(config, memory)
    with vq.DeviceQueue(config, memory, engine="python") as device:
        identity = driver.add(readable=[(BASE + 0x4000, 4)], writable=[(BASE + 0x5000, 8)])
        assert_type(identity, int)
        assert_type(driver.publish(), bool)
        batch = device.take()
        assert_type(batch, vq.Batch)
        assert_type(batch.records, memoryview)
        assert_type(batch.done, memoryview)
        chain = batch[0]
        assert_type(chain, vq.Chain)
        assert_type([chain.head for chain in batch], list[int])
        assert_type(chain.readable, list[memoryview])
        assert_type(chain.read(), bytes)
        assert_type(chain.write(b"answer"), int)
        device.complete(chain, 6)
        assert_type(device.publish(), bool)
        assert_type(device.base, int)
        assert_type(device.broken, vq.QueueBroken | None)
        del batch, chain
    assert_type(driver.collect(), list[tuple[int, int]])


def test_both_ends_of_a_socket() -> None:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    with vp.BackendConnection(right) as connection, vp.Frontend(left) as frontend:
        frontend.set_owner()
        received = connection.receive()
        assert_type(received, vp.Received | None)
        assert received is not None
        assert isinstance(received.message, vp.SetOwner)
        assert_type(connection.acknowledge(received, True), bool)
        assert_type(connection.fileno(), int)


class Plain(vb.VirtioDevice):
    """A handler that returns when the request is done."""

    device_id = 2

    def handle(self, queue: vb.QueueInfo, request: vb.Request) -> None:
        assert_type(queue.index, int)
        assert_type(request.read(16), bytes)
        request.write(b"")


class Awaiting(vb.VirtioDevice):
    """A handler that waits for something."""

    async def handle(self, queue: vb.QueueInfo, request: vb.Request) -> None:
        request.status = 0


class Batching(vb.VirtioDevice):
    """A handler of whole batches."""

    def handle_batch(self, queue: vb.QueueInfo, batch: vq.Batch) -> None:
        assert_type(len(batch), int)


def test_every_kind_of_device_is_a_device() -> None:
    devices: list[vb.VirtioDevice] = [Plain(), Awaiting(), Batching()]
    assert [device.num_queues for device in devices] == [1, 1, 1]


def answer(device: vb.VirtioDevice, queue: vb.QueueInfo, request: vb.Request) -> None:
    assert_type(device.handle(queue, request), Awaitable[None] | None)
