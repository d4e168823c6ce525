"""Dirty log, IOMMU, device state, notifications as messages: through the embedded front-end."""

import asyncio
import contextlib
import mmap
import os
import random
import select
import threading
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import GuestAddress, allocate_memfd
from vhost_backend import (
    BlockDevice,
    DeviceBackend,
    QueueInfo,
    Request,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
)
from vhost_backend.devices import blk
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.driver.session import IOVA_BASE
from vhost_backend.driver.vring import GUEST_BASE, USER_BASE, SessionError
from vhost_backend.fds.listener import Listener
from vhost_backend.testing import attached, serving
from virtqueue import EngineName

P = vp.ProtocolFeatures
PAGE = 4096
SIZE = 16 << 20


class Log:
    """A dirty log as a front-end keeps it."""

    def __init__(self, session: DriverSession) -> None:
        self.size = (GUEST_BASE + SIZE) // PAGE // 8
        self.fd = allocate_memfd(self.size)
        self.bits = mmap.mmap(self.fd, self.size)
        session.frontend.set_log_base(self.size, 0, self.fd)

    def pages(self) -> set[int]:
        """Numbers of the dirty pages, relative to the start of memory; clears them."""
        first = GUEST_BASE // PAGE
        data = self.bits[first // 8 :]
        self.bits[first // 8 :] = bytes(len(data))
        return {
            byte * 8 + bit for byte, value in enumerate(data) if value
            for bit in range(8) if value >> bit & 1
        }  # fmt: skip

    def close(self) -> None:
        self.bits.close()
        os.close(self.fd)


def changed(before: bytes, after: bytes) -> set[int]:
    return {
        page for page in range(len(before) // PAGE)
        if before[page * PAGE : (page + 1) * PAGE] != after[page * PAGE : (page + 1) * PAGE]
    }  # fmt: skip


def pages_of(address: int, length: int) -> set[int]:
    """Numbers of the pages that a range of guest addresses touches."""
    start = address - GUEST_BASE
    return set(range(start // PAGE, (start + length - 1) // PAGE + 1))


def whole(session: DriverSession) -> bytes:
    return session.memory.read(GuestAddress(GUEST_BASE), session.memory.regions[0].size)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_the_log_holds_every_page_that_changed_and_no_more_than_the_writes_explain(
    image: Path, engine: EngineName, packed: bool, indirect: bool
) -> None:
    """Byte for byte: each byte that the device changed lies in a page with its bit set, and each
    bit is explained by a buffer, a status byte or the device's part of the ring."""
    rng = random.Random(7)
    image.write_bytes(rng.randbytes(4 << 20))
    with attached(
        BlockDevice(image),
        engine=engine,
        features=DRIVER_FEATURES | VirtioFeature.LOG_ALL,
        packed=packed,
        protocol_features=P.LOG_SHMFD,
        memory_size=2 << 20,
        queue_size=1024,  # rings of several pages
    ) as session:
        driver = BlockDriver(session, depth=8, indirect=indirect)
        log = Log(session)
        vring = session.vrings[0]
        config = vring.config
        # The used ring of a split ring is logged where it is in guest memory; so is a packed ring.
        place = vring.descriptor_area if packed else vring.device_area
        length = 16 * config.size if packed else 6 + 8 * config.size
        ring = range(place - GUEST_BASE, place - GUEST_BASE + length)
        # The driver's event structure and avail ring, and a packed ring's device event structure.
        others = pages_of(vring.driver_area, 6 + 2 * config.size) | pages_of(vring.device_area, 4)
        tables = {
            page for start, room in session.ring_memory[1:] for page in pages_of(start, room)
        } | (set() if packed else pages_of(vring.descriptor_area, 16 * config.size))
        session.frontend.set_vring_addr(
            0,
            descriptor=config.descriptor_address,
            used=config.device_address,
            available=config.driver_address,
            log=place,
            flags=vp.VringFlags.LOG,
        )
        log.pages()
        seen: set[int] = set()
        for _ in range(80):
            written: set[int] = set()
            sector = rng.randrange(0, 8000)
            for _ in range(rng.randint(1, 8)):
                driver.submit(blk.T_IN, sector, length=512 * rng.randint(1, 9))
            for slot in driver._busy.values():
                written |= pages_of(slot.data, slot.length) | pages_of(slot.status, 1)
            before = whole(session)
            driver.kick()
            while driver.in_flight:
                driver.collect()
            after = whole(session)
            dirty = log.pages()
            ours = {page for page in changed(before, after) if page not in others | tables}
            used = {n // PAGE for n in ring if before[n] != after[n]}
            assert ours | written | used <= dirty
            assert dirty <= written | {n // PAGE for n in ring}
            seen |= used
        assert len(seen) > 1
        log.close()


def test_logging_stops_when_it_is_switched_off(image: Path, engine: EngineName) -> None:
    with attached(
        BlockDevice(image),
        engine=engine,
        features=DRIVER_FEATURES | VirtioFeature.LOG_ALL,
        protocol_features=P.LOG_SHMFD,
        memory_size=SIZE,
    ) as session:
        driver = BlockDriver(session)
        log = Log(session)
        driver.read(0, 4096)
        assert log.pages()
        session.frontend.set_features(int(session.features & ~VirtioFeature.LOG_ALL))
        driver.read(0, 4096)
        assert not log.pages()
        session.frontend.set_features(int(session.features))
        driver.read(0, 4096)
        assert log.pages()
        log.close()


def test_the_log_descriptor_is_signalled(image: Path) -> None:
    with attached(
        BlockDevice(image),
        features=DRIVER_FEATURES | VirtioFeature.LOG_ALL,
        protocol_features=P.LOG_SHMFD,
        memory_size=SIZE,
    ) as session:
        driver = BlockDriver(session)
        log = Log(session)
        event = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_log_fd(event)
        driver.read(0, 512)
        assert os.eventfd_read(event) >= 1
        os.close(event)
        log.close()


def test_a_log_that_is_too_small_is_refused(image: Path) -> None:
    with attached(BlockDevice(image), protocol_features=P.LOG_SHMFD) as session:
        fd = allocate_memfd(4096)
        with pytest.raises(vp.RequestFailed):
            session.frontend.set_log_base(4096, 0, fd)
        os.close(fd)
        assert BlockDriver(session).read(0, 512) == bytes(512)


# -- IOMMU ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("indirect", [False, True])
def test_requests_behind_an_iommu(
    image: Path, engine: EngineName, packed: bool, indirect: bool
) -> None:
    """Every entry is asked for; a random workload of taking them away goes on meanwhile."""
    rng = random.Random(11)
    with attached(
        BlockDevice(image), engine=engine, features=DRIVER_FEATURES, iommu=True, packed=packed
    ) as session:
        driver = BlockDriver(session, depth=4, max_io=8192, indirect=indirect)
        model = bytearray(4 << 20)
        for _ in range(60):
            offset = rng.randrange(0, (4 << 20) // 8192) * 8192
            data = rng.randbytes(8192)
            driver.write(offset, data)
            model[offset : offset + 8192] = data
            if rng.random() < 0.5:
                start = GUEST_BASE + rng.randrange(0, SIZE // PAGE) * PAGE
                session.invalidate(start, rng.choice((PAGE, 64 * PAGE, SIZE)))
            assert driver.read(offset, 8192) == data
        assert session.missed
    assert image.read_bytes() == model


@pytest.mark.parametrize("packed", [False, True])
def test_behind_an_iommu_the_used_ring_is_logged_at_an_iova(
    image: Path, engine: EngineName, packed: bool
) -> None:
    """QEMU sends the ring's own address, which is an IOVA; the log is of guest addresses."""
    with attached(
        BlockDevice(image),
        engine=engine,
        features=DRIVER_FEATURES | VirtioFeature.LOG_ALL,
        packed=packed,
        iommu=True,
        protocol_features=P.LOG_SHMFD,
        memory_size=SIZE,
    ) as session:
        driver, vring = BlockDriver(session), session.vrings[0]
        config, elsewhere = vring.config, session.allocate(2 * PAGE, PAGE)
        log = Log(session)
        driver.read(0, 512)
        log.pages()

        def logged_at(address: int) -> set[int]:
            session.frontend.set_vring_addr(
                0,
                descriptor=config.descriptor_address,
                used=config.device_address,
                available=config.driver_address,
                log=address,
                flags=vp.VringFlags.LOG,
            )
            driver.read(0, 512)
            return log.pages()

        ring = vring.descriptor_area if packed else vring.device_area
        assert (ring - GUEST_BASE) // PAGE in logged_at(config.device_address)
        # Somewhere else, where the front-end has an entry for it.
        distance = config.device_address - vring.device_area
        session.frontend.iotlb_update(
            elsewhere + distance, 2 * PAGE, elsewhere - GUEST_BASE + USER_BASE
        )
        assert ((elsewhere - GUEST_BASE) // PAGE in logged_at(elsewhere + distance)) != packed
        # What means nothing is no reason to lose what was written.
        assert (ring - GUEST_BASE) // PAGE in logged_at(1 << 50)
        session.invalidate(GUEST_BASE, SIZE)
        assert (ring - GUEST_BASE) // PAGE in logged_at(config.device_address)
        log.close()


def test_logging_of_the_used_ring_is_switched_live(image: Path, engine: EngineName) -> None:
    """By SET_VRING_ADDR with and without VHOST_VRING_F_LOG, and the ring goes on at its index."""
    with attached(
        BlockDevice(image),
        engine=engine,
        features=DRIVER_FEATURES,
        protocol_features=P.LOG_SHMFD,
        memory_size=SIZE,
    ) as session:
        driver, vring = BlockDriver(session, depth=4), session.vrings[0]
        config = vring.config
        log = Log(session)
        for number in range(12):
            wanted = bool(number % 2)
            driver.submit(blk.T_IN, 0, length=512)
            driver.kick()
            session.frontend.set_vring_addr(
                0,
                descriptor=config.descriptor_address,
                used=config.device_address,
                available=config.driver_address,
                log=vring.device_area,
                flags=vp.VringFlags.LOG if wanted else vp.VringFlags(0),
            )
            while driver.in_flight:
                driver.collect()
            log.pages()
            driver.read(0, 512)
            # LOG_ALL is off: buffers are not logged, the used ring by its own flag.
            assert log.pages() == ({(vring.device_area - GUEST_BASE) // PAGE} if wanted else set())
        assert session.stop_ring(0) == 24
        log.close()


def test_an_entry_outside_of_the_memory_table_is_refused(image: Path, engine: EngineName) -> None:
    with attached(
        BlockDevice(image), engine=engine, features=DRIVER_FEATURES, iommu=True, memory_size=SIZE
    ) as session:
        driver, frontend = BlockDriver(session), session.frontend
        for user, size in (
            (USER_BASE - PAGE, PAGE),
            (USER_BASE + SIZE, PAGE),
            (USER_BASE + SIZE - PAGE, 2 * PAGE),
            (USER_BASE, SIZE + 1),
            (GUEST_BASE, PAGE),
        ):
            with pytest.raises(vp.RequestFailed):
                frontend.iotlb_update(1 << 50, size, user)
            assert driver.read(0, 512) == bytes(512)
        frontend.iotlb_update(1 << 50, SIZE, USER_BASE)


def test_an_access_that_is_not_granted_is_reported(image: Path, engine: EngineName) -> None:
    """The entry comes, and forbids it: the ring must not ask for it again and again."""
    with attached(
        BlockDevice(image, num_queues=2),
        engine=engine,
        features=DRIVER_FEATURES,
        iommu=True,
        num_queues=2,
    ) as session:
        good, bad = BlockDriver(session, queue=0), session.vrings[1]
        error = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_vring_err(1, error)
        page = session.allocate(PAGE, PAGE)
        iova = page + IOVA_BASE - GUEST_BASE
        session.granted[iova] = vp.IotlbAccess.READ
        bad.submit([(page, 16)], [(page + 512, 513)])
        bad.kick()
        assert session.channel is not None
        while not (reports := [
            message for message in session.channel.received
            if isinstance(message, vp.BackendIotlbMsg) and message.type is vp.IotlbType.ACCESS_FAIL
        ]):  # fmt: skip
            assert good.read(0, 512) == bytes(512)
        assert [(report.iova, report.access) for report in reports] == [
            (iova + 512, vp.IotlbAccess.WRITE)
        ]
        assert os.eventfd_read(error) == 1
        assert session.missed.count(iova + 512) == 1
        assert good.read(0, 512) == bytes(512)
        os.close(error)


def test_an_address_that_means_nothing_breaks_the_queue_only(
    engine: EngineName, image: Path
) -> None:
    device = BlockDevice(image, num_queues=2)
    with attached(
        device, engine=engine, features=DRIVER_FEATURES, iommu=True, num_queues=2
    ) as session:
        good, bad = BlockDriver(session, queue=0), session.vrings[1]
        error = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_vring_err(1, error)
        bad.submit([(1 << 50, 16)], [(1 << 50, 1)])
        bad.kick()
        for _ in range(10):
            assert good.read(0, 512) == bytes(512)
            session.invalidate(GUEST_BASE, SIZE)
        with pytest.raises(SessionError):
            bad.completions(0.2)
        # The answers to the other queue's questions do not make this one ask again.
        assert sum(address >= 1 << 49 for address in session.missed) == 1
        os.close(error)


def test_an_entry_that_does_not_come_is_not_waited_for_for_ever(
    engine: EngineName, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with attached(
        BlockDevice(image), engine=engine, features=DRIVER_FEATURES, iommu=True
    ) as session:
        assert BlockDriver(session).read(0, 512) == bytes(512)
        # Not before: what a busy driver answers late would be given up as well.
        monkeypatch.setattr("vhost_backend.control.iommu.MISS_TIMEOUT", 0.05)
        vring = session.vrings[0]
        error = os.eventfd(0, os.EFD_NONBLOCK)
        session.frontend.set_vring_err(0, error)
        vring.submit([(1 << 50, 16)], [(1 << 50, 1)])
        vring.kick()
        poller = select.poll()
        poller.register(error, select.POLLIN)
        assert poller.poll(60_000)
        os.close(error)


def test_an_invalidation_waits_for_requests_that_rest_on_the_entry(engine: EngineName) -> None:
    release = threading.Event()
    started = threading.Event()

    class Slow(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            started.set()
            while not release.is_set():
                await asyncio.sleep(0.01)
            request.write(b"done")

    with attached(Slow(), engine=engine, iommu=True) as session:
        vring = session.vrings[0]
        source, target = session.allocate(4, PAGE), session.allocate(4, PAGE)
        vring.submit([(source, 4)], [(target, 4)])
        vring.kick()
        assert started.wait(60)
        invalidated = threading.Event()

        def invalidate() -> None:
            session.invalidate(target, PAGE)
            invalidated.set()

        thread = threading.Thread(target=invalidate)
        thread.start()
        assert not invalidated.wait(0.2)
        release.set()
        assert invalidated.wait(60)
        thread.join()
        assert session.memory.read(target, 4) == b"done"


# -- device state ---------------------------------------------------------------------------------


class Counter(VirtioDevice):
    """Counts its requests; the count is its state."""

    device_id = 40
    state_version = 2

    def __init__(self) -> None:
        self.count = 0

    def handle(self, queue: QueueInfo, request: Request) -> None:
        self.count += 1

    def save_state(self) -> bytes:
        return self.count.to_bytes(8, "little") * 20_000  # more than a pipe holds

    def load_state(self, version: int, state: bytes) -> None:
        self.count = int.from_bytes(state[:8], "little")


def save(device: VirtioDevice) -> bytes:
    with attached(device, protocol_features=P.DEVICE_STATE) as session:
        session.stop_ring(0)
        reader, writer = os.pipe()
        session.frontend.set_device_state_fd(vp.TransferDirection.SAVE, writer)
        os.close(writer)
        with open(reader, "rb") as file:
            stream = file.read()
        session.frontend.check_device_state()
        return stream


def load(device: VirtioDevice, stream: bytes) -> None:
    with attached(device, protocol_features=P.DEVICE_STATE) as session:
        session.stop_ring(0)
        reader, writer = os.pipe()
        session.frontend.set_device_state_fd(vp.TransferDirection.LOAD, reader)
        os.close(reader)
        with open(writer, "wb") as file:
            file.write(stream)
        session.frontend.check_device_state()


def test_state_is_saved_and_loaded() -> None:
    source, target = Counter(), Counter()
    source.count = 77
    load(target, save(source))
    assert target.count == 77


@pytest.mark.parametrize(
    "spoil",
    [
        lambda s: s[:-1],
        lambda s: s[:10],
        lambda s: b"",
        lambda s: s + b"x",
        lambda s: s[:100] + bytes([s[100] ^ 1]) + s[101:],
        lambda s: b"X" + s[1:],
    ],
)
def test_a_damaged_state_is_refused_and_the_device_keeps_its_own(spoil: object) -> None:
    stream = save(Counter())
    target = Counter()
    target.count = 5
    with pytest.raises(vp.RequestFailed):
        load(target, spoil(stream))  # type: ignore[operator]
    assert target.count == 5


def test_the_state_of_another_device_or_a_newer_version_is_refused() -> None:
    class Other(Counter):
        device_id = 41

    class Older(Counter):
        state_version = 1

    Older.__name__ = "Counter"
    for target in (Other(), Older()):
        with pytest.raises(vp.RequestFailed):
            load(target, save(Counter()))
        assert target.count == 0


def test_a_device_that_fails_to_load_says_so(caplog: pytest.LogCaptureFixture) -> None:
    class Refusing(Counter):
        def load_state(self, version: int, state: bytes) -> None:
            raise ValueError("not today")

    Refusing.__name__ = "Counter"
    device = Refusing()
    device.name = "the left one"
    with pytest.raises(vp.RequestFailed):
        load(device, save(Counter()))
    assert "the left one failed to load its state" in caplog.text
    assert "not today" in caplog.text


@pytest.mark.parametrize("how", ["next front-end", "next transfer"])
def test_state_that_comes_late_is_not_loaded(how: str, tmp_path: Path) -> None:
    """Its sender keeps the pipe, and the device is another's by then."""
    late, device = Counter(), Counter()
    late.count, device.count = 77, 5
    stream = save(late)
    with (
        VhostUserDaemon("test", DeviceBackend.of(device)) as daemon,
        Listener(tmp_path / "socket") as listener,
        serving(daemon, listener),
    ):
        first = DriverSession.connect(
            str(tmp_path / "socket"), timeout=60, protocol_features=P.DEVICE_STATE
        )
        first.stop_ring(0)
        reader, writer = os.pipe()
        first.frontend.set_device_state_fd(vp.TransferDirection.LOAD, reader)
        if how == "next front-end":
            first.close()
            with DriverSession.connect(
                str(tmp_path / "socket"), timeout=60, protocol_features=P.DEVICE_STATE
            ) as second:
                with pytest.raises(vp.RequestFailed):
                    second.frontend.check_device_state()
                send_late(writer, stream, reader)
        else:
            other, end = os.pipe()
            first.frontend.set_device_state_fd(vp.TransferDirection.LOAD, other)
            os.close(end)
            with pytest.raises(vp.RequestFailed):
                first.frontend.check_device_state()
            os.close(other)
            send_late(writer, stream, reader)
            first.close()
    assert device.count == 5


def send_late(writer: int, stream: bytes, reader: int) -> None:
    """Send what can be sent to the other end; return when nobody reads there any more."""
    os.close(reader)
    with contextlib.suppress(BrokenPipeError), open(writer, "wb") as file:
        file.write(stream)
    for thread in threading.enumerate():
        if thread.name == "state-transfer":
            thread.join(60)
            assert not thread.is_alive()


def test_state_cannot_move_while_a_ring_is_started() -> None:
    with attached(Counter(), protocol_features=P.DEVICE_STATE) as session:
        reader, writer = os.pipe()
        with pytest.raises((vp.RequestFailed, vp.ProtocolError)):
            session.frontend.set_device_state_fd(vp.TransferDirection.SAVE, writer)
        os.close(reader)
        os.close(writer)


def test_a_device_without_state_does_not_offer_to_move_it(image: Path) -> None:
    with attached(BlockDevice(image), protocol_features=P.DEVICE_STATE) as session:
        assert not session.protocol_features & P.DEVICE_STATE


# -- the back-end's own requests ------------------------------------------------------------------


def test_the_driver_is_told_of_a_new_configuration() -> None:
    class Resizable(Counter):
        config = b"old"

    device = Resizable()
    with attached(device, handlers={vp.BackendConfigChange: lambda message: True}) as session:
        assert session.channel is not None
        device.config = b"new"
        device.config_changed()
        session.channel.wait_for(vp.BackendConfigChange)
        assert session.frontend.get_config(0, 3) == b"new"


def test_notifications_as_messages(engine: EngineName) -> None:
    calls = threading.Semaphore(0)

    def called(message: vp.Message) -> bool:
        calls.release()
        return True

    device = Counter()
    with attached(
        device,
        engine=engine,
        protocol_features=P.INBAND_NOTIFICATIONS,
        handlers={vp.BackendVringCall: called},
    ) as session:
        session.stop_ring(0)
        vring = session.vrings[0]
        session.frontend.set_vring_call(0, None)
        session.frontend.set_vring_kick(0, None)
        for _ in range(3):
            vring.submit([(session.allocate(4), 4)], [(session.allocate(4), 4)])
            vring.queue.publish()
            session.frontend.vring_kick(0)
            assert calls.acquire(timeout=60)
            while not vring.queue.collect():
                pass
            vring.queue.enable_notification()
        assert device.count == 3


def test_a_broken_ring_is_reported_as_a_message(engine: EngineName) -> None:
    reported = threading.Event()

    def told(message: vp.Message) -> bool:
        assert message == vp.BackendVringErr(1)
        reported.set()
        return True

    class Pair(Counter):
        num_queues = 2

    with attached(
        Pair(),
        engine=engine,
        num_queues=2,
        protocol_features=P.INBAND_NOTIFICATIONS,
        handlers={vp.BackendVringErr: told},
    ) as session:
        vring = session.vrings[1]
        vring.submit([(1 << 50, 4)], [])
        vring.kick()
        assert reported.wait(60)


def test_notifications_as_messages_need_their_prerequisites(image: Path) -> None:
    with (
        attached(BlockDevice(image)) as session,
        pytest.raises(vp.LocalProtocolError, match="INBAND_NOTIFICATIONS needs"),
    ):
        session.frontend.set_protocol_features(P.INBAND_NOTIFICATIONS | P.MQ)


def test_a_stop_without_a_drain_calls_back_what_waits(engine: EngineName) -> None:
    """SKIP_DRAIN stops at once; the one that goes on takes the request again.

    Not before the first one has let go of it: it would act when others have acted already.
    """
    taken: list[bytes] = []
    ended: list[bytes] = []

    class Never(VirtioDevice):
        async def handle(self, queue: QueueInfo, request: Request) -> None:
            taken.append(request.read(4))
            try:
                async with request.waiting():
                    await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0.01)
                ended.append(taken[-1])

    wanted = P.INFLIGHT_SHMFD | P.GET_VRING_BASE_INFLIGHT | P.GET_VRING_BASE_SKIP_DRAIN
    with attached(Never(), engine=engine, protocol_features=wanted) as session:
        frontend, vring = session.frontend, session.vrings[0]
        session.stop_ring(0)
        reply, fd = frontend.get_inflight_fd(1, vring.config.size)
        assert fd is not None
        session.start_ring(0)
        source, target = session.allocate(4), session.allocate(4)
        session.memory.write(source, b"work")
        identity = vring.submit([(source, 4)], [(target, 4)])
        vring.kick()
        while not taken:
            pass
        assert frontend.get_vring_base_skip_drain(0) == 0
        assert ended == [b"work"]
        frontend.set_inflight_fd(reply.mmap_size, reply.mmap_offset, 1, vring.config.size, fd)
        session.start_ring(0, base=0)
        while len(taken) < 2:
            pass
        assert taken == [b"work", b"work"]
        assert not vring.queue.collect()
        assert identity is not None
        frontend.get_vring_base_skip_drain(0)
        fd.close()


def test_what_cannot_be_called_back_is_waited_for_also_without_a_drain(engine: EngineName) -> None:
    started, release = threading.Event(), threading.Event()

    class Plain(VirtioDevice):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            started.set()
            release.wait(60)
            request.write(b"done")

    wanted = P.INFLIGHT_SHMFD | P.GET_VRING_BASE_INFLIGHT | P.GET_VRING_BASE_SKIP_DRAIN
    with attached(Plain(), engine=engine, inflight=True, protocol_features=wanted) as session:
        vring = session.vrings[0]
        target = session.allocate(4)
        identity = vring.submit([(session.allocate(4), 4)], [(target, 4)])
        vring.kick()
        assert started.wait(60)
        bases: list[int] = []
        thread = threading.Thread(
            target=lambda: bases.append(session.frontend.get_vring_base_skip_drain(0))
        )
        thread.start()
        thread.join(0.1)
        assert not bases
        release.set()
        thread.join(60)
        assert bases == [1]
        assert vring.completions(0.1) == [(identity, 4)]
