# mypy: disable-error-code="arg-type,list-item"
# Plain numbers are addresses here; test_types.py holds that they are not elsewhere.
"""One memory, many threads: with the GIL and without, nobody sees another's half-done work."""

import os
import threading
from collections.abc import Callable

from guest_memory_support import NAME, SEALED, mapped, memfd, region

from guest_memory import GuestMemory, Iotlb, IotlbMiss, Iova, MemoryHolder, UserAddress

PAGE = 4096


def together(*tasks: Callable[[], None]) -> None:
    """Run tasks in threads of their own; raise what one of them raised."""
    errors: list[BaseException] = []

    def guarded(task: Callable[[], None]) -> None:
        try:
            task()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(task,)) for task in tasks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def test_readers_while_the_table_changes() -> None:
    with memfd(64 * PAGE, SEALED) as fd:
        base = region(0, PAGE)
        holder = MemoryHolder(GuestMemory.map([(base, fd)]))
        holder.current.write(0, b"constant")
        stop = threading.Event()

        def reader() -> None:
            while not stop.is_set():
                memory = holder.current
                assert memory.read(0, 8) == b"constant"
                view = memory.view(0, 8)
                last = memory.regions[-1]
                memory.read(last.guest_address, 8)
                memory.user_to_guest(last.user_address)
                del memory
                assert bytes(view) == b"constant"

        def changer() -> None:
            try:
                for n in range(300):
                    extra = region((1 + n % 50) * 2 * PAGE, PAGE, (n % 50) * PAGE)
                    memory = holder.current.add(extra, fd)
                    memory.write(extra.guest_address, b"constant")
                    holder.replace(memory)
                    holder.replace(memory.remove(extra))
            finally:
                stop.set()

        together(changer, reader, reader, reader)
        assert len(holder.current) == 1
        assert mapped(NAME) == 1


def test_swaps_lose_nothing() -> None:
    """Each replaced snapshot comes back exactly once."""
    holder = MemoryHolder()
    first = holder.current
    returned: list[GuestMemory] = []

    def swap() -> None:
        returned.extend(holder.replace(GuestMemory()) for _ in range(500))

    together(swap, swap, swap)
    assert len({id(memory) for memory in [*returned, holder.current]}) == 1501
    assert any(memory is first for memory in returned)


def test_an_iotlb_under_fire() -> None:
    memory, fd = GuestMemory.allocate(16 * PAGE)
    os.close(fd)
    user = memory.regions[0].user_address
    for n in range(16):
        memory.write(n * PAGE, bytes([n]) * 16)
    iotlb = Iotlb(limit=8)

    def mapper() -> None:
        for n in range(3000):
            page = n % 16
            iotlb.insert(Iova(page * PAGE), PAGE, UserAddress(user + page * PAGE), 3)
            if n % 5 == 0:
                iotlb.invalidate(Iova(((n * 7) % 16) * PAGE), 3 * PAGE)

    def reader() -> None:
        for n in range(2000):
            page = n % 16
            try:
                assert memory.with_iotlb(iotlb).read(page * PAGE, 4) == bytes([page]) * 4
                assert iotlb.lookup(Iova(page * PAGE), 4) == [(user + page * PAGE, 4)]
            except IotlbMiss:
                continue

    together(mapper, mapper, reader, reader)
    assert len(iotlb) <= 8
    assert len(iotlb.entries) == len(iotlb)


def test_words_are_never_torn() -> None:
    """A word is one of the values stored; on unguarded memory the ring index counts upwards."""
    sealed, fd = GuestMemory.allocate(PAGE)
    os.close(fd)
    with memfd(PAGE) as unsealed:
        plain = GuestMemory.map([(region(0, PAGE), unsealed)])
    values = (0, (1 << 64) - 1)
    stop = threading.Event()

    def store_sealed() -> None:
        try:
            for n in range(20000):
                sealed.store(0, 8, values[n & 1])
            for n in range(3000):
                plain.store(2, 2, (n * 3) & 0xFFFF)
        finally:
            stop.set()

    def load_sealed() -> None:
        while not stop.is_set():
            assert sealed.load(0, 8) in values

    def load_plain() -> None:
        before = 0
        while not stop.is_set():
            value = plain.load(2, 2)
            assert value >= before, "an index went backwards"
            before = value

    together(store_sealed, load_sealed, load_plain)
    assert plain.load(0, 2) == 0, "the other half of the word is untouched"
