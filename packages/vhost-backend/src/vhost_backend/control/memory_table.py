"""The memory table ("Multiple memory regions description", CONFIGURE_MEM_SLOTS) and postcopy.

In postcopy the memory table is answered with where each region lies in this process, and pages that
have not arrived yet are waited for through a userfaultfd that the front-end serves.
"""

from __future__ import annotations

import logging
import mmap
import os
from collections.abc import Callable

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

from ..errors import Refused
from .context import Context
from .outcome import Answer, Descriptors, Outcome

log: logging.Logger = logging.getLogger("vhost_backend")


class MemoryTable:
    """Regions come, go, and arrive late.

    `slots` offers CONFIGURE_MEM_SLOTS. The specification forbids postcopy together with it, so
    PAGEFAULT is offered instead when it is False.
    """

    def __init__(self, context: Context, *, slots: bool) -> None:
        self._context = context
        self._slots = slots
        self._userfault: Userfault | None = None
        self._listening = False
        #: A table that was answered with our addresses and waits for the front-end to take them.
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

        PAGEFAULT takes a userfaultfd, which not every process may have: then the front-end should
        refuse postcopy before it begins. It can only wait for pages of ordinary mappings.

        GPA_ADDRESSES takes nothing: with it user addresses are guest addresses, regions repeat
        theirs, and what is looked up by user address is found as ever. Front-ends that take the
        bit for another (rust-vmm's vhost had SHMEM there) and send user addresses all the same are
        therefore served, too.
        """
        features = vp.ProtocolFeatures.GPA_ADDRESSES
        if getattr(self._context.mapper, "xen_mmap", False):
            features |= vp.ProtocolFeatures.XEN_MMAP
        if self._slots:
            features |= vp.ProtocolFeatures.CONFIGURE_MEM_SLOTS
        elif self._context.mapper is None and _userfault_works(self._context.name):
            features |= vp.ProtocolFeatures.PAGEFAULT
        return features

    def disconnect(self) -> None:
        """Unmap; nobody waits for pages any more. The device is told, as it may keep the memory."""
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
            raise Refused("SET_MEM_TABLE", "there is no table to acknowledge")
        try:
            self._userfault.register(memory)
        except GuestMemoryError as error:
            raise Refused("SET_MEM_TABLE", str(error)) from error
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
    """Whether this process can have pages of shared memory waited for.

    A capability, a sysctl, a seccomp filter or the kernel's configuration may stand against it; so
    it is tried, with a page of our own.
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
