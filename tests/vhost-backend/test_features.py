"""What devices of some types do beyond their rings, and what the back-end asks of the front-end."""

import contextlib
import os
import random
import select
import socket
import struct
import tempfile
import threading
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import vhost_protocol as vp
from guest_memory import MAX_MEM_SLOTS, GuestAddress, allocate_memfd
from vhost_backend import (
    BlockDevice,
    DeviceBackend,
    QueueInfo,
    Request,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    VirtioFeature,
)
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.driver.vring import GUEST_BASE
from vhost_backend.testing import attached
from virtqueue import EngineName

P = vp.ProtocolFeatures
PAGE = 4096
OBJECT, UNKNOWN = uuid.UUID(int=7), uuid.UUID(int=8)


class Typed(VirtioDevice):
    """Has the hooks of several types of device."""

    protocol_features = P.HOST_NOTIFIER

    def __init__(self) -> None:
        self.told: list[object] = []
        self.object = allocate_memfd(PAGE)
        self.gpu: vp.GpuBackendChannel | None = None

    def handle(self, queue: QueueInfo, request: Request) -> None:
        request.write(request.read())

    def send_rarp(self, mac: bytes) -> None:
        self.told.append(mac)

    def net_set_mtu(self, mtu: int) -> None:
        self.told.append(mtu)

    def create_crypto_session(
        self, op_code: int, session: vp.SymmetricSession | vp.AsymmetricSession
    ) -> int:
        self.told.append((op_code, session))
        return 77 if isinstance(session, vp.SymmetricSession) else -1

    def close_crypto_session(self, session_id: int) -> None:
        self.told.append(session_id)

    def get_shared_object(self, uuid: bytes) -> int | None:
        return self.object if uuid == OBJECT.bytes else None

    def get_shmem_config(self) -> list[int]:
        return [2 * PAGE, 0, PAGE]

    def set_gpu_socket(self, channel: vp.GpuBackendChannel) -> None:
        self.gpu = channel

    def close(self) -> None:
        os.close(self.object)
        if self.gpu is not None:
            self.gpu.close()


EVERYTHING = (
    P.RARP | P.MTU | P.CRYPTO_SESSION | P.SHARED_OBJECT | P.SHMEM | P.HOST_NOTIFIER
    | P.BACKEND_SEND_FD
)  # fmt: skip


class FrontendModel:
    """The front-end's answers on the back-end's channel, by the specification's rules."""

    def __init__(self) -> None:
        self.objects: set[uuid.UUID] = set()
        self.maps: dict[tuple[int, int], int] = {}
        self.notifiers: dict[int, int] = {}
        self.handlers = {
            vp.BackendSharedObjectAdd: self._add,
            vp.BackendSharedObjectRemove: self._remove,
            vp.BackendShmemMap: self._map,
            vp.BackendShmemUnmap: self._unmap,
            vp.BackendVringHostNotifier: self._notifier,
        }

    def _add(self, message: vp.Message) -> bool:
        assert isinstance(message, vp.BackendSharedObjectAdd)
        known = message.uuid in self.objects
        self.objects.add(message.uuid)
        return not known

    def _remove(self, message: vp.Message) -> bool:
        assert isinstance(message, vp.BackendSharedObjectRemove)
        known = message.uuid in self.objects
        self.objects.discard(message.uuid)
        return known

    def _map(self, message: vp.Message) -> bool:
        assert isinstance(message, vp.BackendShmemMap)
        start, end = message.shm_offset, message.shm_offset + message.length
        for (shmid, offset), length in self.maps.items():
            if shmid == message.shmid and offset < end and start < offset + length:
                return False  # "Mapping over an already existing map is not allowed"
        self.maps[message.shmid, start] = message.length
        return True

    def _unmap(self, message: vp.Message) -> bool:
        assert isinstance(message, vp.BackendShmemUnmap)
        place = message.shmid, message.shm_offset
        if self.maps.get(place) != message.length:
            return False  # "shall correspond to the entirety of a valid mapped region"
        del self.maps[place]
        return True

    def _notifier(self, message: vp.Message) -> bool:
        assert isinstance(message, vp.BackendVringHostNotifier)
        if message.no_fd:
            return self.notifiers.pop(message.index, None) is not None
        self.notifiers[message.index] = message.size
        return True


@contextlib.contextmanager
def typed() -> Iterator[tuple[Typed, DriverSession, FrontendModel]]:
    device, model = Typed(), FrontendModel()
    with (
        contextlib.closing(device),
        attached(device, protocol_features=EVERYTHING, handlers=dict(model.handlers)) as session,
    ):
        yield device, session, model


def echo(session: DriverSession) -> None:
    """The device goes on."""
    source, target = session.allocate(4), session.allocate(4)
    session.memory.write(source, b"ping")
    vring = session.vrings[0]
    vring.submit([(source, 4)], [(target, 4)])
    vring.kick()
    vring.completions()
    assert session.memory.read(target, 4) == b"ping"


def test_what_a_device_has_no_hook_for_is_not_offered(image: Path) -> None:
    with attached(BlockDevice(image), protocol_features=EVERYTHING | P.DEVICE_STATE) as session:
        assert not session.protocol_features & (EVERYTHING & ~P.BACKEND_SEND_FD)
        assert not session.protocol_features & P.DEVICE_STATE
    with typed() as (_, session, _):
        assert session.protocol_features & EVERYTHING == EVERYTHING


def test_a_network_device_is_told_to_announce_itself_and_of_the_mtu() -> None:
    with typed() as (device, session, _):
        session.frontend.send_rarp(b"\x52\x54\x00\x01\x02\x03")
        session.frontend.net_set_mtu(9000)
        assert device.told == [b"\x52\x54\x00\x01\x02\x03", 9000]
        echo(session)


def test_crypto_sessions_come_and_go() -> None:
    cipher = vp.SymmetricSession(3, 0, 0, 0, 1, 1, 0, 0, key=bytes(range(16)))
    with typed() as (device, session, _):
        create = vp.CryptoOpcode.CIPHER_CREATE_SESSION
        assert session.frontend.create_crypto_session(create, cipher) == 77
        session.frontend.close_crypto_session(77)
        assert device.told == [(create, cipher), 77]
        with pytest.raises(vp.RequestFailed):  # which the device does not know
            session.frontend.create_crypto_session(
                vp.CryptoOpcode.AKCIPHER_CREATE_SESSION, vp.AsymmetricSession(1, 1)
            )
        echo(session)


def test_shared_objects_are_added_removed_and_handed_out() -> None:
    with typed() as (device, session, model):
        assert device.channel is not None
        device.channel.shared_object_add(OBJECT)
        assert model.objects == {OBJECT}
        with pytest.raises(vp.RequestFailed):
            device.channel.shared_object_add(OBJECT)
        found = session.frontend.get_shared_object(OBJECT)
        assert found is not None
        with found:
            assert os.path.samestat(os.fstat(found.fileno()), os.fstat(device.object))
        assert session.frontend.get_shared_object(UNKNOWN) is None
        device.channel.shared_object_remove(OBJECT)
        assert not model.objects
        with pytest.raises(vp.RequestFailed):
            device.channel.shared_object_remove(OBJECT)
        # The model has no object of another device.
        assert device.channel.shared_object_lookup(UNKNOWN) is None
        echo(session)


def test_shared_memory_is_mapped_and_unmapped() -> None:
    with typed() as (device, session, model):
        assert session.frontend.get_shmem_config() == (2 * PAGE, 0, PAGE)
        assert device.channel is not None
        map_, unmap = device.channel.shmem_map, device.channel.shmem_unmap
        map_(0, device.object, 0, PAGE, PAGE, vp.ShmemMapFlags.READ_WRITE)
        map_(2, device.object, 0, 0, PAGE)
        assert model.maps == {(0, PAGE): PAGE, (2, 0): PAGE}
        with pytest.raises(vp.RequestFailed):
            map_(0, device.object, 0, 0, 2 * PAGE)  # over the one that is there
        with pytest.raises(vp.RequestFailed):
            unmap(0, PAGE, 1)
        unmap(0, PAGE, PAGE)
        map_(0, device.object, 0, 0, 2 * PAGE)
        assert model.maps == {(0, 0): 2 * PAGE, (2, 0): PAGE}
        echo(session)


def test_a_host_notifier_is_set_and_taken_away() -> None:
    with typed() as (device, session, model):
        assert device.channel is not None
        device.channel.vring_host_notifier(0, PAGE, 0, device.object)
        assert model.notifiers == {0: PAGE}
        device.channel.vring_host_notifier(0)
        assert not model.notifiers
        with pytest.raises(vp.RequestFailed):
            device.channel.vring_host_notifier(0)
        echo(session)


def test_what_was_not_negotiated_is_not_asked_of_the_front_end() -> None:
    device = Typed()
    with contextlib.closing(device), attached(device, handlers={}, iommu=False) as session:
        echo(session)
        assert device.channel is None
    device = Typed()
    model = FrontendModel()
    with (
        contextlib.closing(device),
        attached(device, handlers=dict(model.handlers)) as session,
    ):
        assert device.channel is not None
        asks: list[Callable[[vp.BackendChannel], None]] = [
            lambda channel: channel.shared_object_add(OBJECT),
            lambda channel: channel.vring_host_notifier(0, PAGE, 0, device.object),
            lambda channel: channel.shmem_map(0, device.object, 0, 0, PAGE),
            lambda channel: channel.vring_call(0),
        ]
        for ask in asks:
            with pytest.raises(vp.LocalProtocolError):
                ask(device.channel)
        echo(session)


def test_a_gpu_gets_its_socket() -> None:
    with typed() as (device, session, _):
        with session.frontend.open_gpu_channel() as channel:
            while device.gpu is None:
                pass
            answers = threading.Thread(target=answer_gpu, args=(channel,))
            answers.start()
            assert device.gpu.get_protocol_features() == vp.GpuProtocolFeatures.EDID
            device.gpu.set_protocol_features(vp.GpuProtocolFeatures.EDID)
            assert device.gpu.get_display_info() == (vp.GpuDisplay(0, 0, 640, 480),)
            device.gpu.scanout(0, 640, 480)
            answers.join(60)
        echo(session)


def answer_gpu(channel: vp.GpuFrontendChannel) -> None:
    for kind, answer in (
        (vp.GpuGetProtocolFeatures, vp.GpuFeaturesReply(vp.GpuProtocolFeatures.EDID)),
        (vp.GpuSetProtocolFeatures, None),
        (vp.GpuGetDisplayInfo, vp.GpuDisplayInfoReply((vp.GpuDisplay(0, 0, 640, 480),))),
        (vp.GpuScanout, None),
    ):
        received = channel.receive()
        assert received is not None
        with received:
            assert isinstance(received.message, kind)
            if answer is not None:
                channel.reply(received, answer)


def test_a_device_that_is_no_gpu_refuses_the_socket(image: Path) -> None:
    with attached(BlockDevice(image)) as session:
        ours, theirs = socket.socketpair()
        with ours, theirs, pytest.raises(vp.RequestFailed):
            session.frontend.gpu_set_socket(theirs)
        assert BlockDriver(session).read(0, 512) == bytes(512)


# -- addresses and memory -------------------------------------------------------------------------


@pytest.mark.parametrize("iommu", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_a_front_end_that_has_no_user_addresses(
    image: Path, engine: EngineName, packed: bool, iommu: bool
) -> None:
    """GPA_ADDRESSES: rings, regions and IOTLB entries are told by guest addresses."""
    rng = random.Random(5)
    with attached(
        BlockDevice(image),
        engine=engine,
        features=DRIVER_FEATURES,
        packed=packed,
        iommu=iommu,
        protocol_features=P.GPA_ADDRESSES,
    ) as session:
        assert session.protocol_features & P.GPA_ADDRESSES
        driver = BlockDriver(session)
        for number in range(8):
            data = rng.randbytes(4096)
            driver.write(number * 4096, data)
            assert driver.read(number * 4096, 4096) == data
        (region,) = session.memory.regions
        assert int(region.user_address) == int(region.guest_address) == GUEST_BASE


def test_memory_slots_come_and_go_while_requests_are_in_flight(
    image: Path, engine: EngineName
) -> None:
    """To 509 and back; a request that touches memory which is gone breaks its queue, no other."""
    content = random.Random(4).randbytes(4 << 20)
    image.write_bytes(content)
    with attached(
        BlockDevice(image, num_queues=2),
        engine=engine,
        features=DRIVER_FEATURES,
        num_queues=2,
        protocol_features=P.CONFIGURE_MEM_SLOTS,
    ) as session:
        frontend, driver = session.frontend, BlockDriver(session, queue=0, depth=8)
        fd = allocate_memfd(PAGE)
        regions = [
            vp.MemoryRegion(1 << 44 | number << 16, PAGE, 1 << 45 | number << 16)
            for number in range(1, MAX_MEM_SLOTS)
        ]
        for change in (frontend.add_mem_reg, frontend.rem_mem_reg, frontend.add_mem_reg):
            for number, region in enumerate(regions):
                driver.submit(0, number, length=512)
                driver.kick()
                if change == frontend.rem_mem_reg:
                    frontend.rem_mem_reg(region)
                else:
                    frontend.add_mem_reg(region, fd)
                while driver.in_flight:
                    for completion, data in driver.collect():
                        assert completion.status == 0
                        assert data == content[number * 512 : number * 512 + 512]
        with pytest.raises(vp.RequestFailed):
            frontend.add_mem_reg(vp.MemoryRegion(1 << 46, PAGE, 1 << 46), fd)
        # The last slot as a request's target: the disk's bytes arrive in the file behind it.
        vring, target = session.vrings[1], regions[-1]
        header, status = session.allocate(16), session.allocate(1)
        session.memory.write(header, struct.pack("<IIQ", 0, 0, 3))
        error = os.eventfd(0, os.EFD_NONBLOCK)
        frontend.set_vring_err(1, error)
        vring.submit([(header, 16)], [(target.guest_address, 512), (status, 1)])
        vring.kick()
        vring.completions()
        assert os.pread(fd, 512, 0) == content[3 * 512 : 4 * 512]
        # And once more when it has gone.
        frontend.rem_mem_reg(target)
        vring.submit([(header, 16)], [(target.guest_address, 512), (status, 1)])
        vring.kick()
        poller = select.poll()
        poller.register(error, select.POLLIN)
        assert poller.poll(60_000)
        assert driver.read(512, 512) == content[512:1024]
        os.close(error)
        os.close(fd)


# -- legacy guests of the other byte order --------------------------------------------------------


def test_a_big_endian_ring_of_a_legacy_guest() -> None:
    """CROSS_ENDIAN: SET_VRING_ENDIAN before the ring starts; without VERSION_1 only."""
    with attached(Typed(), protocol_features=P.CROSS_ENDIAN) as session:
        frontend = session.frontend
        session.stop_ring(0)
        with pytest.raises(vp.RequestFailed):
            frontend.set_vring_endian(0, True)
        frontend.set_features(int(VirtioFeature.PROTOCOL_FEATURES))
        frontend.set_vring_endian(0, True)
        memory, vring = session.memory, session.vrings[0]
        source, target = session.allocate(4), session.allocate(4)
        memory.write(source, b"ping")
        table, avail, used = vring.descriptor_area, vring.driver_area, vring.device_area
        memory.write(
            GuestAddress(table),
            struct.pack(">QIHH", source, 4, 1, 1) + struct.pack(">QIHH", target, 4, 2, 0),
        )
        memory.write(GuestAddress(avail), struct.pack(">HHH", 0, 1, 0))
        memory.write(GuestAddress(used), bytes(12))
        session.start_ring(0)
        while memory.read(GuestAddress(used + 2), 2) != b"\0\1":
            pass
        assert struct.unpack(">II", memory.read(GuestAddress(used + 4), 8)) == (0, 4)
        assert memory.read(target, 4) == b"ping"
        assert session.stop_ring(0) == 1


# -- moving a device's state over the back-end's own channel --------------------------------------


class OwnChannel(VhostUserBackendBase):
    """Prefers a file to the front-end's pipe."""

    def __init__(self, state: bytes = b"") -> None:
        self.state = state
        self._file = -1
        self._direction = -1

    def num_queues(self) -> int:
        return 1

    def handle_event(self, *_: object) -> bool:
        return False

    def protocol_features(self) -> P:
        return P.DEVICE_STATE

    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        os.close(fd)
        self._direction = direction
        with tempfile.TemporaryFile() as file:
            if direction == 0:
                file.write(self.state)
                file.seek(0)
            self._file = os.dup(file.fileno())
            return os.dup(file.fileno())

    def check_device_state(self) -> bool:
        if self._direction == 1:
            self.state = os.pread(self._file, 1 << 20, 0)
        os.close(self._file)
        return bool(self.state)


def test_the_state_moves_over_a_channel_of_the_back_ends_own() -> None:
    source, target = OwnChannel(b"state" * 1000), OwnChannel()

    @contextlib.contextmanager
    def channel(backend: OwnChannel, direction: vp.TransferDirection) -> Iterator[int]:
        with attached(backend, protocol_features=P.DEVICE_STATE) as session:
            session.stop_ring(0)
            reader, writer = os.pipe()
            passed = writer if direction is vp.TransferDirection.SAVE else reader
            own = session.frontend.set_device_state_fd(direction, passed)
            os.close(reader)
            os.close(writer)
            assert own is not None
            with own:
                yield own.fileno()
            session.frontend.check_device_state()

    with channel(source, vp.TransferDirection.SAVE) as fd:
        stream = os.read(fd, 1 << 20)
    with channel(target, vp.TransferDirection.LOAD) as fd:
        os.write(fd, stream)
    assert target.state == source.state


# -- postcopy and memory slots --------------------------------------------------------------------


def test_postcopy_and_memory_slots_exclude_each_other() -> None:
    for slots, offered, other in (
        (True, P.CONFIGURE_MEM_SLOTS, P.PAGEFAULT),
        (False, P.PAGEFAULT, P.CONFIGURE_MEM_SLOTS),
    ):
        ours, theirs = socket.socketpair()
        with VhostUserDaemon("test", DeviceBackend.of(Typed()), memory_slots=slots) as daemon:
            daemon.start_connection(ours)
            with vp.Frontend(theirs, timeout=60, strict=False) as frontend:
                frontend.get_features()
                assert frontend.get_protocol_features() & (offered | other) == offered
                frontend.set_protocol_features(offered | P.REPLY_ACK)
                if slots:
                    with pytest.raises(vp.ProtocolError):
                        frontend.postcopy_advise()
