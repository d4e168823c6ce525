"""A ring with a driver on one end and a device on the other, over one guest memory."""

from __future__ import annotations

import os
import struct
from typing import Any

from guest_memory import GuestMemory
from virtqueue import (
    DeviceQueue,
    DriverQueue,
    EngineName,
    InflightRegion,
    RingConfig,
    inflight_size,
    ring_layout,
)

FEATURES: dict[str, dict[str, bool]] = {
    "plain": {},
    "event_idx": {"event_idx": True},
    "in_order": {"in_order": True},
    "event_idx+in_order": {"event_idx": True, "in_order": True},
}

GUEST = 0x4000_0000
USER = 0x7F00_0000_0000


def logged_pages(log: Any) -> set[int]:
    """The pages that a dirty log shows as written; it is empty afterwards."""
    found = {
        byte * 8 + bit
        for byte, value in enumerate(log.view)
        for bit in range(8)
        if value >> bit & 1
    }
    log.view[:] = bytes(len(log.view))
    return found


class Rig:
    """``driver`` and ``device`` on one ring; buffers come from `room`."""

    def __init__(
        self,
        *,
        size: int = 8,
        packed: bool = False,
        engine: EngineName | None = None,
        memory_size: int = 1 << 20,
        table_length: int = 8,
        batch: int = 128,
        device: bool = True,
        inflight: bool = False,
        memory: Any = None,
        **config: Any,
    ) -> None:
        self.engine = engine
        self.fd = -1
        if memory is None:
            memory, self.fd = GuestMemory.allocate(
                memory_size, guest_address=GUEST, user_address=USER
            )
        self.memory: Any = memory
        self.layout = layout = ring_layout(size, packed)
        self.config = RingConfig(
            size,
            USER + layout.descriptor,
            USER + layout.driver,
            USER + layout.device,
            packed=packed,
            **config,
        )
        self.ring = GUEST
        tables = GUEST + layout.size
        self.next = -(-(tables + 16 * table_length * size) // 4096) * 4096
        self.driver = DriverQueue(self.config, memory, tables=tables, table_length=table_length)
        self.batch = batch
        self.inflight_bytes = bytearray(inflight_size(size, packed)) if inflight else None
        self._inflight_owner: Any = None
        self.inflight: InflightRegion | None = None
        if self.inflight_bytes is not None:
            import ctypes

            owner = (ctypes.c_uint64 * (len(self.inflight_bytes) // 8)).from_buffer(
                self.inflight_bytes
            )
            self.inflight = InflightRegion(ctypes.addressof(owner), len(self.inflight_bytes), owner)
        self.devices: list[DeviceQueue] = []
        if device:
            self.device = self.new_device()

    def new_device(self, **settings: Any) -> DeviceQueue:
        settings.setdefault("engine", self.engine)
        settings.setdefault("batch", self.batch)
        settings.setdefault("inflight", self.inflight)
        device = DeviceQueue(settings.pop("config", self.config), self.memory, **settings)
        self.devices.append(device)
        return device

    def room(self, length: int, data: bytes = b"") -> tuple[int, int]:
        """A fresh buffer as (guest address, length)."""
        address = self.next
        self.next += -(-length // 16) * 16
        if data:
            self.memory.write(address, data)
        return address, length

    def text(self, data: bytes) -> tuple[int, int]:
        return self.room(len(data), data)

    def offer(self, text: bytes = b"hello", room: int = 32, indirect: bool | None = None) -> int:
        """One chain of one readable and one writable buffer, in a table if the ring is small."""
        if indirect is None:
            indirect = self.config.size < 8
        return self.driver.add([self.text(text)], [self.room(room)], indirect)

    def offer_many(self, count: int, **settings: Any) -> list[int]:
        ids = [self.offer(**settings) for _ in range(count)]
        self.driver.publish()
        return ids

    # The ring's bytes, for drivers that break the rules.

    def descriptor(self, slot: int, address: int, length: int, flags: int, last: int) -> None:
        """Split: ``last`` is next; packed: flags and ``last``, the id, change places."""
        order = ">" if self.config.big_endian else "<"
        fields = (
            (address, length, last, flags)
            if self.config.packed
            else (
                address,
                length,
                flags,
                last,
            )
        )
        self.memory.write(
            self.ring + self.layout.descriptor + 16 * slot, struct.pack(order + "QIHH", *fields)
        )

    def avail(self, index: int, *heads: int) -> None:
        """Split: set the available ring's entries before ``index``, and idx."""
        base = self.ring + self.layout.driver
        for number, head in enumerate(heads):
            slot = (index - len(heads) + number) % self.config.size
            self.memory.write(base + 4 + 2 * slot, head.to_bytes(2, "little"))
        self.memory.write(base + 2, (index & 0xFFFF).to_bytes(2, "little"))

    def table(self, *descriptors: tuple[int, int, int, int]) -> tuple[int, int]:
        """An indirect table of (address, length, flags, next)."""
        raw = b"".join(
            struct.pack("<QIHH", a, n, last, flags)
            if self.config.packed
            else struct.pack("<QIHH", a, n, flags, last)
            for a, n, flags, last in descriptors
        )
        return self.room(len(raw), raw)

    def used_index(self) -> int:
        order: Any = "big" if self.config.big_endian else "little"
        raw = self.memory.read(self.ring + self.layout.device + 2, 2)
        return int.from_bytes(raw, order)

    def close(self) -> None:
        for device in self.devices:
            device.close()
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
