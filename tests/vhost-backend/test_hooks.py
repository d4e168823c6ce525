"""What a device or a back-end defines is offered, and nothing else is."""

from __future__ import annotations

import contextlib
import os
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from vhost_backend import (
    BackendUsageError,
    CryptoSessions,
    DeviceBackend,
    DeviceRefused,
    Listener,
    Mtu,
    QueueInfo,
    Rarp,
    Request,
    VhostUserBackend,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    Vring,
)
from vhost_backend.device.hooks import OF_A_DEVICE, HookGroup, provided
from vhost_backend.driver import DriverSession
from vhost_backend.features import RING_FEATURES
from vhost_backend.testing import attached, expect_errors, serving

P = vp.ProtocolFeatures
PATIENCE = 60.0
MAC = b"\x52\x54\x00\x01\x02\x03"
OBJECT = uuid.UUID(int=7)
CIPHER = vp.SymmetricSession(3, 0, 0, 0, 1, 1, 0, 0, key=bytes(16))
#: Whatever follows from a hook.
HOOKED = (
    P.CONFIG | P.RARP | P.MTU | P.CRYPTO_SESSION | P.SHARED_OBJECT | P.SHMEM | P.DEVICE_STATE
)  # fmt: skip


class Raw(VhostUserBackendBase):
    """A back-end of one's own that defines no more than it has to."""

    def __init__(self) -> None:
        self.told: list[object] = []
        self.event = threading.Event()

    def num_queues(self) -> int:
        return 1

    def features(self) -> int:
        return int(RING_FEATURES)

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        with vrings[0].get_mut() as state:
            batch = state.take(64)
            for chain in batch or ():
                chain.write(chain.read())
                state.add_used(chain, chain.written)
            state.signal_used_queue()
            return bool(batch)

    def tell(self, *what: object) -> None:
        self.told.extend(what)
        self.event.set()


class RawConfiguration(Raw):
    def get_config(self, offset: int, size: int) -> bytes:
        return b"configuration"[offset : offset + size]


class RawRarp(Raw, Rarp):
    def send_rarp(self, mac: bytes) -> None:
        self.tell(mac)


class RawMtu(Raw, Mtu):
    def net_set_mtu(self, mtu: int) -> None:
        self.tell(mtu)


class RawCrypto(Raw, CryptoSessions):
    def create_crypto_session(
        self, op_code: int, session: vp.SymmetricSession | vp.AsymmetricSession
    ) -> int:
        self.tell(session)
        return 77

    def close_crypto_session(self, session_id: int) -> None:
        self.tell(session_id)


class RawObjects(Raw):
    def get_shared_object(self, uuid: bytes) -> int | None:
        self.tell(uuid)
        return None


class RawMemory(Raw):
    def get_shmem_config(self) -> Sequence[int]:
        return [4096, 0, 8192]


class RawGpu(Raw):
    def set_gpu_socket(self, channel: vp.GpuBackendChannel) -> None:
        assert isinstance(channel, vp.GpuBackendChannel)
        channel.close()
        self.tell("a socket")


class RawState(Raw):
    def set_device_state_fd(self, direction: int, phase: int, fd: int) -> int | None:
        os.close(fd)
        self.tell((direction, phase))
        return None

    def check_device_state(self) -> bool:
        self.tell("checked")
        return True


def ask_configuration(backend: Raw, frontend: vp.Frontend) -> None:
    assert frontend.get_config(6, 4) == b"urat"
    frontend.set_config(0, b"x")  # the base's, which ignores it


def ask_rarp(backend: Raw, frontend: vp.Frontend) -> None:
    frontend.send_rarp(MAC)
    assert backend.told == [MAC]


def ask_mtu(backend: Raw, frontend: vp.Frontend) -> None:
    frontend.net_set_mtu(9000)
    assert backend.told == [9000]


def ask_crypto(backend: Raw, frontend: vp.Frontend) -> None:
    create = vp.CryptoOpcode.CIPHER_CREATE_SESSION
    assert frontend.create_crypto_session(create, CIPHER) == 77
    frontend.close_crypto_session(77)
    assert backend.told == [CIPHER, 77]


def ask_objects(backend: Raw, frontend: vp.Frontend) -> None:
    assert frontend.get_shared_object(OBJECT) is None
    assert backend.told == [OBJECT.bytes]


def ask_memory(backend: Raw, frontend: vp.Frontend) -> None:
    assert frontend.get_shmem_config() == (4096, 0, 8192)


def ask_gpu(backend: Raw, frontend: vp.Frontend) -> None:
    with frontend.open_gpu_channel():
        assert backend.event.wait(60)
    assert backend.told == ["a socket"]


def ask_state(backend: Raw, frontend: vp.Frontend) -> None:
    reader, writer = os.pipe()
    frontend.get_vring_base(0)
    assert frontend.set_device_state_fd(vp.TransferDirection.SAVE, writer) is None
    frontend.check_device_state()
    os.close(reader)
    os.close(writer)
    assert backend.told == [(0, 0), "checked"]


RAW: list[tuple[type[Raw], P, Callable[[Raw, vp.Frontend], None]]] = [
    (RawConfiguration, P.CONFIG, ask_configuration),
    (RawRarp, P.RARP, ask_rarp),
    (RawMtu, P.MTU, ask_mtu),
    (RawCrypto, P.CRYPTO_SESSION, ask_crypto),
    (RawObjects, P.SHARED_OBJECT, ask_objects),
    (RawMemory, P.SHMEM, ask_memory),
    (RawGpu, P(0), ask_gpu),
    (RawState, P.DEVICE_STATE, ask_state),
]


@pytest.mark.parametrize(("kind", "feature", "ask"), RAW, ids=[kind.__name__ for kind, _, _ in RAW])
def test_a_back_end_of_ones_own_is_offered_what_it_defines(
    kind: type[Raw], feature: P, ask: Callable[[Raw, vp.Frontend], None]
) -> None:
    backend = kind()
    with attached(backend, protocol_features=HOOKED) as session:
        assert session.protocol_features & HOOKED == feature
        ask(backend, session.frontend)


def test_what_a_back_end_does_not_define_is_not_offered() -> None:
    with attached(Raw(), protocol_features=HOOKED) as session:
        assert not session.protocol_features & HOOKED
        with pytest.raises(vp.RequestFailed):
            session.frontend.open_gpu_channel()


class WithoutTheBase:
    """Implements the Protocol alone, so it has to define what it has nothing to say on."""

    def __init__(self) -> None:
        self.channel: vp.BackendChannel | None = None

    num_queues = Raw.num_queues
    features = Raw.features
    handle_event = Raw.handle_event
    max_queue_size = VhostUserBackendBase.max_queue_size
    acked_features = VhostUserBackendBase.acked_features
    protocol_features = VhostUserBackendBase.protocol_features
    reset_device = VhostUserBackendBase.reset_device
    set_event_idx = VhostUserBackendBase.set_event_idx
    set_config = VhostUserBackendBase.set_config
    update_memory = VhostUserBackendBase.update_memory
    exit_event = VhostUserBackendBase.exit_event
    set_gpu_socket = VhostUserBackendBase.set_gpu_socket
    get_shmem_config = VhostUserBackendBase.get_shmem_config
    set_device_state_fd = VhostUserBackendBase.set_device_state_fd
    check_device_state = VhostUserBackendBase.check_device_state

    def queues_per_thread(self) -> Sequence[int]:
        return [1]

    def get_config(self, offset: int, size: int) -> bytes:
        return bytes(size)

    def get_shared_object(self, uuid: bytes) -> int | None:
        return None

    def set_backend_req_fd(self, channel: vp.BackendChannel) -> None:
        self.channel = channel


#: A front-end that gives its back-end a channel.
ANSWERS: dict[type[vp.Message], Callable[[vp.Message], bool]] = {
    vp.BackendConfigChange: lambda message: True
}


def test_the_bases_methods_say_no_without_the_base_too() -> None:
    backend: Any = WithoutTheBase()
    with attached(backend, protocol_features=HOOKED, handlers=ANSWERS) as session:
        assert session.protocol_features & HOOKED == P.CONFIG | P.SHARED_OBJECT
        assert session.frontend.get_config(0, 4) == bytes(4)
        assert isinstance(backend.channel, vp.BackendChannel)
        echo(session)


def test_a_back_end_around_another_has_what_that_has() -> None:
    class Around:
        """Passes everything on, as a wrapper that counts or logs."""

        def __init__(self, inner: VhostUserBackend) -> None:
            self._inner = inner

        def __getattr__(self, name: str) -> object:
            return getattr(self._inner, name)

    class Net(VirtioDevice, Mtu):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            request.write(request.read())

        def net_set_mtu(self, mtu: int) -> None:
            self.mtu = mtu

    device = Net()
    around: Any = Around(DeviceBackend.of(device))
    with attached(around, protocol_features=HOOKED) as session:
        assert session.protocol_features & HOOKED == P.MTU
        session.frontend.net_set_mtu(1500)
        assert device.mtu == 1500
        echo(session)


def echo(session: DriverSession) -> None:
    source, target = session.allocate(4), session.allocate(4)
    session.memory.write(source, b"ping")
    vring = session.vrings[0]
    vring.submit([(source, 4)], [(target, 4)])
    vring.kick()
    vring.completions()
    assert session.memory.read(target, 4) == b"ping"


# -- what counts as defined -----------------------------------------------------------------------


class Plain(VirtioDevice):
    def handle(self, queue: QueueInfo, request: Request) -> None:
        pass


def test_what_counts_as_defined() -> None:
    class Half(Plain, CryptoSessions):
        def close_crypto_session(self, session_id: int) -> None:
            pass

        send_rarp = None

    device: Any = Half()  # type: ignore[abstract]
    assert provided(device, VirtioDevice.handle) == device.handle
    for missing in (
        VirtioDevice.handle_batch,  # the base's
        CryptoSessions.create_crypto_session,  # the Protocol's
        Rarp.send_rarp,  # taken back
        Mtu.net_set_mtu,  # not there
    ):
        assert provided(device, missing) is None
    own = provided(device, CryptoSessions.close_crypto_session)
    assert own == device.close_crypto_session
    device.net_set_mtu = lambda mtu: 2 * mtu
    assert provided(device, Mtu.net_set_mtu) is device.net_set_mtu


# -- mistakes -------------------------------------------------------------------------------------


def anything(self: object, *arguments: object) -> None:
    pass


async def later(self: object, *arguments: object) -> None:
    pass


HALVES = [
    ("create_crypto_session", "close_crypto_session"),
    ("close_crypto_session", "create_crypto_session"),
    ("set_config", "get_config"),
]
DEVICE_HALVES = [*HALVES, ("save_state", "load_state"), ("load_state", "save_state")]
BACKEND_HALVES = [
    *HALVES,
    ("set_device_state_fd", "check_device_state"),
    ("check_device_state", "set_device_state_fd"),
]


@pytest.mark.parametrize(("has", "lacks"), DEVICE_HALVES)
def test_half_of_a_device_is_refused_by_name(has: str, lacks: str) -> None:
    device = type("Dev", (Plain,), {has: anything})()
    with pytest.raises(BackendUsageError, match=f"^Dev has {has} and no {lacks}$"):
        DeviceBackend.of(device)


@pytest.mark.parametrize(("has", "lacks"), BACKEND_HALVES)
def test_half_of_a_back_end_is_refused_by_name(has: str, lacks: str) -> None:
    backend = type("Own", (Raw,), {has: anything})()
    with pytest.raises(BackendUsageError, match=f"^Own has {has} and no {lacks}$"):
        VhostUserDaemon("test", backend)


@pytest.mark.parametrize(
    ("asked", "lacks"),
    [
        (P.RARP, "send_rarp"),
        (P.SHMEM | P.HOST_NOTIFIER, "get_shmem_config"),
        (P.CRYPTO_SESSION, "create_crypto_session and no close_crypto_session"),
    ],
)
def test_a_feature_without_its_hooks_is_refused_by_name(asked: P, lacks: str) -> None:
    device = type("Dev", (Plain,), {"protocol_features": asked})()
    own = type("Own", (Raw,), {"protocol_features": lambda self: asked})()
    for name, make in (
        ("Dev", lambda: DeviceBackend.of(device)),
        ("Own", lambda: VhostUserDaemon("test", own)),
    ):
        with pytest.raises(BackendUsageError, match=rf"^{name} asks for \w+ and has no {lacks}$"):
            make()


def test_what_a_device_may_use_without_a_hook() -> None:
    class Looking(Raw):
        def protocol_features(self) -> P:
            return P.SHARED_OBJECT | P.HOST_NOTIFIER | P.MQ

    wanted = P.SHARED_OBJECT | P.HOST_NOTIFIER | P.SHMEM
    with attached(Looking(), protocol_features=wanted) as session:
        assert session.protocol_features & wanted == P.SHARED_OBJECT | P.HOST_NOTIFIER


def test_a_configuration_needs_no_hook() -> None:
    device = type("Dev", (Plain,), {"config": b"abcd", "set_config": anything})()
    with attached(device, protocol_features=P.CONFIG) as session:
        assert session.frontend.get_config(0, 4) == b"abcd"
        session.frontend.set_config(0, b"x")


@pytest.mark.parametrize("group", OF_A_DEVICE, ids=lambda group: group.hooks[0])
def test_a_hook_that_nothing_would_await(group: HookGroup[Any]) -> None:
    device = type("Dev", (Plain,), dict.fromkeys(group.hooks, later))()
    with pytest.raises(BackendUsageError, match=f"Dev.{group.hooks[0]} is `async def`"):
        DeviceBackend.of(device)


def test_a_device_gets_every_call_of_a_back_end() -> None:
    """What `DeviceBackend` neither has nor passes on would end in the base's default."""
    calls = {name for name, value in vars(VhostUserBackendBase).items() if callable(value)}
    missing = {name for name in calls - set(vars(DeviceBackend)) if name[0] != "_"}
    assert missing == {"exit_event", "set_event_idx", "suspend_queue"}  # nothing for a device


# -- the hooks of a back-end that came after the Protocol -----------------------------------------


class Later(Raw):
    """Has a status byte, and fails what begins with a zero."""

    status_byte = True
    error_status = 9

    def handle_event(
        self, device_event: int, event_set: int, vrings: Sequence[Vring], thread_id: int
    ) -> bool:
        with vrings[0].get_mut() as state:
            batch = state.take(64)
            if batch:
                raise ValueError("no")
        return False

    def device_started(self) -> None:
        self.tell("started")

    def device_stopped(self) -> None:
        self.tell("stopped")


def test_later_hooks_of_a_back_end() -> None:
    backend = Later()
    with expect_errors("the back-end failed on queue 0"), attached(backend) as session:
        status = session.allocate(1)
        session.vrings[0].submit([], [(status, 1)])
        session.vrings[0].kick()
        session.vrings[0].completions()
        assert session.memory.read(status, 1) == b"\x09"
        assert backend.told == ["started"]
        session.stop_ring(0)
        assert backend.told == ["started", "stopped"]


# -- what a device refuses ------------------------------------------------------------------------


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def set_config(session: DriverSession) -> None:
    session.frontend.set_config(0, b"x")


def set_mtu(session: DriverSession) -> None:
    session.frontend.net_set_mtu(1500)


def kick_descriptor(session: DriverSession) -> None:
    session.stop_ring(0)
    session.start_ring(0)


def kick_in_band(session: DriverSession) -> None:
    session.stop_ring(0)
    session.frontend.vring_kick(0)


@pytest.mark.parametrize(
    ("hook", "ask", "request_name"),
    [
        ("set_config", set_config, "SET_CONFIG"),
        ("net_set_mtu", set_mtu, "NET_SET_MTU"),
        ("started", kick_descriptor, "SET_VRING_KICK"),
        ("started", kick_in_band, "VRING_KICK"),
    ],
)
def test_a_device_refuses_without_the_name_of_a_message(
    hook: str,
    ask: Callable[[DriverSession], None],
    request_name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    asleep = False

    def refuse(self: object, *arguments: object) -> None:
        if asleep:
            raise DeviceRefused("the device is asleep")

    device = type("Dev", (Plain,), {"config": b"abcd", hook: refuse})()
    features = P.CONFIG | P.MTU | P.INBAND_NOTIFICATIONS
    with attached(device, protocol_features=features, handlers=ANSWERS) as session:
        asleep = True
        with pytest.raises(vp.RequestFailed):
            ask(session)
        # What is said is said after the answer.
        until(lambda: "refused" in caplog.text, "nothing is said")
        assert f"test: {request_name} refused: the device is asleep" in caplog.messages


def test_a_refusal_after_a_wait_names_the_message_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    taken, go_on = threading.Event(), threading.Event()

    class Busy(VirtioDevice):
        def handle(self, queue: QueueInfo, request: Request) -> None:
            taken.set()
            go_on.wait(PATIENCE)

        def reset(self) -> None:
            raise DeviceRefused("not now")

    def reset(session: DriverSession) -> None:
        with contextlib.suppress(vp.ProtocolError):
            session.frontend.reset_device()

    with (
        Listener(tmp_path / "s") as listener,
        VhostUserDaemon("test", DeviceBackend.of(Busy()), drain_warning=0.05) as daemon,
        serving(daemon, listener),
        DriverSession.connect(tmp_path / "s", timeout=PATIENCE) as session,
    ):
        session.vrings[0].submit([], [(session.allocate(1), 1)])
        session.vrings[0].kick()
        assert taken.wait(PATIENCE)
        resetting = threading.Thread(target=reset, args=(session,))
        resetting.start()
        until(lambda: "test: RESET_DEVICE waits for" in caplog.text, "the reset does not wait")
        go_on.set()
        resetting.join(PATIENCE)
        until(lambda: "RESET_DEVICE refused: not now" in caplog.text, "nothing is said")
