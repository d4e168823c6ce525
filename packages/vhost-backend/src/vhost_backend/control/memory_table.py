"""The memory table ("Multiple memory regions description", CONFIGURE_MEM_SLOTS) and postcopy.

In postcopy the answer to a memory table gives the address of each region in this process. A thread
that touches a page which has not arrived waits for it through a userfaultfd; the front-end serves
that descriptor.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable
from typing import Final, Protocol

import vhost_protocol as vp
from guest_memory import (
    MAX_MEM_SLOTS,
    GuestAddress,
    GuestMemory,
    GuestMemoryError,
    Region,
    UserAddress,
    Userfault,
)

from ..backend import HookGroup
from ..errors import Refused
from .context import Context
from .outcome import Answer, Descriptors, Outcome

log: logging.Logger = logging.getLogger("vhost_backend")


class XenMapper(Protocol):
    """A mapper that tells whether it makes Xen's mappings."""

    xen_mmap: bool


_XEN_MAPPER: Final = HookGroup[XenMapper](XenMapper)


class MemoryTable:
    """Adds and removes memory regions, and serves postcopy.

    `slots` offers CONFIGURE_MEM_SLOTS. The specification forbids postcopy together with it, so
    PAGEFAULT is offered only when `slots` is False.
    """

    def __init__(self, context: Context, *, slots: bool) -> None:
        self._context = context
        self._slots = slots
        self._userfault: Userfault | None = None
        self._listening = False
        #: A table that waits for the front-end to acknowledge our addresses (postcopy).
        self._pending: GuestMemory | None = None
        self.handlers: dict[type[vp.Message], Callable[..., Outcome]] = {
            vp.GetMaxMemSlots: self._get_max_mem_slots,
            vp.SetMemTable: self._set_mem_table,
            vp.MemTableAck: self._acknowledged,
            vp.AddMemReg: self._add_mem_reg,
            vp.AddMemRegAck: self._acknowledged,
            vp.RemMemReg: self._rem_mem_reg,
            vp.RemMemRegAck: self._acknowledged,
            vp.PostcopyAdvise: self._postcopy_advise,
            vp.PostcopyListen: self._postcopy_listen,
            vp.PostcopyEnd: self._postcopy_end,
        }

    def offers(self) -> vp.ProtocolFeatures:
        """Memory slots, or postcopy; Xen mappings with a mapper that makes them.

        PAGEFAULT needs a userfaultfd, which not every process is allowed; without the bit the
        front-end can refuse postcopy before it begins. It works for ordinary mappings only.

        GPA_ADDRESSES needs no code. With it user addresses are guest addresses, and each region
        names both, so look-ups by user address work as before. Front-ends that use the bit for
        another feature (rust-vmm's vhost had SHMEM there) and send user addresses work, too.
        """
        features = vp.ProtocolFeatures.GPA_ADDRESSES
        xen = _XEN_MAPPER.of(self._context.mapper)
        if xen is not None and xen.xen_mmap:
            features |= vp.ProtocolFeatures.XEN_MMAP
        if self._slots:
            features |= vp.ProtocolFeatures.CONFIGURE_MEM_SLOTS
        elif self._context.mapper is None and _userfault_works(self._context.name):
            features |= vp.ProtocolFeatures.PAGEFAULT
        return features

    def disconnect(self) -> None:
        """Unmap all memory, end postcopy, and tell the device, as it may keep the memory."""
        self._context.unshared.disconnect()
        self._end_postcopy()
        empty = GuestMemory()
        self._context.memory.replace(empty)
        self._context.backend.update_memory(empty)

    def _get_max_mem_slots(self, message: vp.GetMaxMemSlots, fds: Descriptors) -> Outcome:
        return Answer(vp.MaxMemSlotsReply(MAX_MEM_SLOTS))

    def _set_mem_table(self, message: vp.SetMemTable, fds: Descriptors) -> Outcome:
        pairs = [
            (_region(region), fd.fileno()) for region, fd in zip(message.regions, fds, strict=True)
        ]
        context = self._context
        try:
            memory = GuestMemory.map(pairs, mapper=context.guard.mapper(context.mapper))
        except GuestMemoryError as error:
            raise Refused("SET_MEM_TABLE", str(error)) from error
        if not self._listening:
            context.use_memory(memory)
            return None
        self._pending = memory
        hosts = dict(zip(memory.regions, memory.host_addresses, strict=True))
        return Answer(
            vp.MemTableReply(
                tuple(_at(region, hosts[_region(region)]) for region in message.regions)
            )
        )

    def _add_mem_reg(self, message: vp.AddMemReg, fds: Descriptors) -> Outcome:
        context = self._context
        region = _region(message.region)
        try:
            memory = context.memory.current.add(
                region, fds[0].fileno(), mapper=context.guard.mapper(context.mapper)
            )
        except GuestMemoryError as error:
            raise Refused("ADD_MEM_REG", str(error)) from error
        context.use_memory(memory)
        if not self._listening:
            return None
        self._pending = memory
        host = memory.host_addresses[memory.regions.index(region)]
        return Answer(vp.MemRegReply(_at(message.region, host)))

    def _rem_mem_reg(self, message: vp.RemMemReg, fds: Descriptors) -> Outcome:
        try:
            memory = self._context.memory.current.remove(_region(message.region))
        except GuestMemoryError as error:
            raise Refused("REM_MEM_REG", str(error)) from error
        self._context.use_memory(memory)
        return None

    # -- postcopy -------------------------------------------------------------------------------

    def _postcopy_advise(self, message: vp.PostcopyAdvise, fds: Descriptors) -> Outcome:
        try:
            self._userfault = Userfault()
        except GuestMemoryError as error:
            raise Refused("POSTCOPY_ADVISE", str(error)) from error
        return Answer(vp.EmptyReply(), (self._userfault.fileno(),))

    def _postcopy_listen(self, message: vp.PostcopyListen, fds: Descriptors) -> Outcome:
        if self._userfault is None:
            raise Refused("POSTCOPY_LISTEN", "POSTCOPY_ADVISE did not come before")
        self._listening = True
        self._context.unshared.postcopy()
        return None

    def _acknowledged(self, message: vp.Message, fds: Descriptors) -> Outcome:
        memory, self._pending = self._pending, None
        if memory is None or self._userfault is None:
            raise Refused(message.request_name, "there is no table to acknowledge")
        try:
            self._userfault.register(memory)
        except GuestMemoryError as error:
            raise Refused(message.request_name, str(error)) from error
        self._context.use_memory(memory.with_postcopy(True))
        return None

    def _postcopy_end(self, message: vp.PostcopyEnd, fds: Descriptors) -> Outcome:
        self._end_postcopy()
        self._context.use_memory(self._context.memory.current.with_postcopy(False))
        return None

    def _end_postcopy(self) -> None:
        userfault, self._userfault = self._userfault, None
        self._listening = False
        self._pending = None
        if userfault is not None:
            userfault.close()


def _userfault_works(name: str) -> bool:
    """Whether this process may use userfaultfd on shared memory.

    A missing capability, a sysctl, a seccomp filter or the kernel's configuration may forbid it, so
    this tries it on a page of its own.
    """
    try:
        memory, fd = GuestMemory.allocate(mmap.PAGESIZE, guest_address=0)
        try:
            with Userfault() as userfault:
                userfault.register(memory)
        finally:
            os.close(fd)
    except (GuestMemoryError, OSError) as error:
        log.info("%s: postcopy is not offered: %s", name, error)
        return False
    return True


def _region(region: vp.MemoryRegion) -> Region:
    return Region(
        GuestAddress(region.guest_address),
        region.size,
        UserAddress(region.user_address),
        region.mmap_offset,
        int(region.flags),
        region.domid,
    )


def _at(region: vp.MemoryRegion, host: int | None) -> vp.MemoryRegion:
    return vp.MemoryRegion(
        region.guest_address, region.size, host or 0, region.mmap_offset, region.flags, region.domid
    )
