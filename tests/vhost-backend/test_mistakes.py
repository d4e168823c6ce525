"""Devices that cannot work are refused where they are given to us, with the attribute's name."""

import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import vhost_protocol as vp
from vhost_backend import (
    DeviceBackend,
    VhostUserBackend,
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    serve,
    serve_all,
    serve_async,
)
from vhost_backend.errors import BackendUsageError
from vhost_backend.testing import DriverSession, attached, expect_errors, served
from virtqueue import EngineName


def handle(self: object, queue: object, request: object) -> None:
    pass


async def later(self: object, *arguments: object) -> None:
    pass


@functools.wraps(later)
def decorated(self: object, *arguments: object) -> object:
    return later(self, *arguments)


def kind(**attributes: object) -> Any:
    return type("Dev", (VirtioDevice,), {"device_id": 42, "handle": handle, **attributes})


DEVICES: list[tuple[dict[str, object], str]] = [
    ({"num_queues": 0}, r"Dev.num_queues is 0: a number from 1 to 256"),
    ({"num_queues": -1}, r"Dev.num_queues is -1"),
    (
        {"create_crypto_session": handle},
        r"Dev has create_crypto_session and no close_crypto_session",
    ),
    ({"num_queues": 257}, r"Dev.num_queues is 257"),
    ({"num_queues": "2"}, r"Dev.num_queues is '2'"),
    ({"queue_size": 100}, r"Dev.queue_size is 100: a ring's size is a power of two"),
    ({"queue_size": 0}, r"Dev.queue_size is 0"),
    ({"queue_size": 65536}, r"Dev.queue_size is 65536: a number from 1 to 32768"),
    ({"features": 1 << 64}, r"Dev.features is 0x10000000000000000: a mask of bits 0 to 63"),
    ({"features": -1}, r"Dev.features is -0x1: a mask"),
    ({"features": None}, r"Dev.features is None"),
    ({"features": 1 << 40}, r"Dev.features is 0x10000000000: .*bit 40 \(RING_RESET\)"),
    ({"features": 1 << 38 | 1}, r"bit 38 \(NOTIFICATION_DATA\)"),
    ({"features": 1 << 24 | 1 << 41}, r"bit 24 \(NOTIFY_ON_EMPTY\), 41$"),
    ({"config": "text"}, r"Dev.config is 'text': a configuration space is bytes"),
    ({"device_id": -1}, r"Dev.device_id is -1"),
    ({"error_status": 256}, r"Dev.error_status is 256: a number from 0 to 255"),
    ({"error_status": 0, "status_byte": True}, r"Dev.error_status is 0: a number from 1 to 255"),
    ({"status_byte": 1}, r"Dev.status_byte is 1: True or False"),
    ({"handle": decorated}, r"Dev.handle is a plain function around an `async def`"),
    ({"handle_batch": later}, r"Dev.handle_batch is `async def`"),
    ({"stopped": later}, r"Dev.stopped is `async def`"),
    ({"get_config": later}, r"Dev.get_config is `async def`"),
    ({"handle": later, "handle_batch": handle}, r"its handle_batch would never be called"),
    ({"handle": VirtioDevice.handle}, r"Dev defines neither handle nor handle_batch"),
]


@pytest.mark.parametrize(
    ("attributes", "message"),
    DEVICES,
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_a_device_that_cannot_work(
    attributes: dict[str, object], message: str, tmp_path: Path
) -> None:
    device = kind(**attributes)()
    before = len(os.listdir("/proc/self/fd"))
    makers: list[Callable[[], object]] = [
        lambda: DeviceBackend.of(device),
        lambda: DeviceBackend(device),
        lambda: serve(device, tmp_path / "socket"),
        lambda: attached(device).__enter__(),
    ]
    for make in makers:
        with pytest.raises(BackendUsageError, match=message):
            make()
    assert len(os.listdir("/proc/self/fd")) == before


def test_a_device_may_be_set_up_in_many_ways() -> None:
    for attributes in (
        {"num_queues": 256, "queue_size": 32768},
        {"features": (1 << 24) - 1 | 0x3FFF << 50 | 1 << 27 | 1 << 32 | 1 << 36},
        {"config": bytearray(b"x")},
        {"status_byte": True, "error_status": 255},
        {"handle": later},
        {"handle": VirtioDevice.handle, "handle_batch": handle},
    ):
        DeviceBackend.of(kind(**attributes)())


@pytest.mark.parametrize("wrong", ["class", "nothing"])
def test_what_is_no_device(wrong: str, tmp_path: Path) -> None:
    device: Any = kind() if wrong == "class" else object()
    message = r"the class Dev, .*write Dev\(\)" if wrong == "class" else "is no VirtioDevice"
    with pytest.raises(BackendUsageError, match=message):
        serve(device, tmp_path / "socket")
    with pytest.raises(BackendUsageError, match=message):
        serve_all([(kind()(), tmp_path / "other"), (device, tmp_path / "socket")])
    with pytest.raises(BackendUsageError, match=message):
        serve_async(device, tmp_path / "socket").send(None)
    assert not list(tmp_path.iterdir())


class Complete(VhostUserBackendBase):
    masks: Any = (3,)
    offered: Any = 1 << 32
    size: Any = 256

    def num_queues(self) -> int:
        return 2

    def max_queue_size(self) -> int:
        return self.size  # type: ignore[no-any-return]

    def features(self) -> int:
        return self.offered  # type: ignore[no-any-return]

    def queues_per_thread(self) -> Sequence[int]:
        return self.masks  # type: ignore[no-any-return]

    def handle_event(self, *arguments: object) -> bool:
        return False


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("masks", [1], r"Complete.queues_per_thread\(\) is \[0b1\]: no worker has queue 1"),
        ("masks", [], r"no worker has queue 0, 1"),
        ("masks", [3, 2], r"two workers have queue 1"),
        ("masks", None, r"Complete.queues_per_thread\(\) is None"),
        ("masks", [-1], r"Complete.queues_per_thread\(\) is \[-1\]"),
        ("offered", 1 << 40, r"Complete.features\(\) is 0x10000000000: .*RING_RESET"),
        ("offered", 1 << 64, r"Complete.features\(\) is .*: a mask of bits"),
        ("size", 100, r"Complete.max_queue_size\(\) is 100"),
    ],
)
def test_a_back_end_that_cannot_work(name: str, value: object, message: str) -> None:
    backend = Complete()
    setattr(backend, name, value)
    with pytest.raises(BackendUsageError, match=message):
        VhostUserDaemon("test", backend)


def test_the_masks_may_have_more_queues_than_there_are() -> None:
    backend = Complete()
    backend.masks = [0xFFFF_FFFF]  # the reference's default
    with VhostUserDaemon("test", backend):
        pass


def test_a_back_end_that_forgets_a_method() -> None:
    class Forgetful(VhostUserBackend):
        def num_queues(self) -> int:
            return 1

        def handle_event(self, *arguments: object) -> bool:
            return False

    class Half(VhostUserBackendBase):
        def num_queues(self) -> int:
            return 1

    class Duck:
        def num_queues(self) -> int:
            return 1

    forgetful: Any = Forgetful  # which a type checker says, too
    for make, message in (
        (forgetful, "Forgetful does not define max_queue_size, features, acked_features"),
        (Half, "Half does not define handle_event: VhostUserBackendBase has defaults for all but"),
        (Duck, "Duck does not define max_queue_size"),
    ):
        backend: Any = make()
        with pytest.raises(BackendUsageError, match=message):
            VhostUserDaemon("test", backend)
        with pytest.raises(BackendUsageError, match=message):
            attached(backend).__enter__()
        name = make.__name__
        backend = make
        with pytest.raises(BackendUsageError, match=rf"the class {name}, .*write {name}\(\)"):
            VhostUserDaemon("test", backend)
    device: Any = kind()()
    with pytest.raises(BackendUsageError, match=r"DeviceBackend.of\(device\)"):
        VhostUserDaemon("test", device)


def coroutine(self: object, queue: object, request: object) -> object:
    return later(self)


def answer(self: object, queue: object, request: object) -> object:
    return b"answer"


def status(self: object, queue: object, request: Any) -> None:
    request.status = 2


def count(self: object, queue: object, request: Any) -> object:
    return request.write(b"answer")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (coroutine, "handle returned a coroutine that nothing awaits"),
        (answer, r"handle returned bytes: an answer is written with request.write\(\)"),
        (status, "request.status is 2, but the device has no status byte"),
    ],
)
def test_a_misuse_of_a_request_fails_it(engine: EngineName, wrong: object, message: str) -> None:
    with (
        expect_errors(f"Dev failed a request of queue 0(.|\n)*{message}"),
        attached(kind(handle=wrong)(), engine=engine) as session,
    ):
        vring = session.vrings[0]
        head = vring.submit([], [(session.allocate(16), 16)])
        vring.kick()
        assert vring.completions(60) == [(head, 0)]


def test_the_count_that_write_returns_may_be_returned() -> None:
    with attached(kind(handle=count)()) as session:
        vring = session.vrings[0]
        head = vring.submit([], [(session.allocate(16), 16)])
        vring.kick()
        assert vring.completions(60) == [(head, 6)]


def test_a_short_configuration_is_said() -> None:
    device = kind(get_config=lambda self, offset, size: b"ab")()
    with (
        expect_errors("Dev.get_config returned 2 bytes of 8 at 0"),
        attached(device) as session,
        pytest.raises(vp.RequestFailed),
    ):
        session.frontend.get_config(0, 8)
    with attached(kind(config=b"ab")()) as session:
        assert session.frontend.get_config(0, 8) == b"ab" + bytes(6)


def test_a_session_ends_after_its_back_end_has_let_go() -> None:
    stopped: list[bool] = []

    class Slow(VirtioDevice):
        device_id = 42
        handle = handle

        def stopped(self) -> None:
            stopped.append(True)

    with served(Slow()) as path:
        with DriverSession.connect(path):
            pass
        assert stopped


def test_the_devices_own_status_is_its_back_ends() -> None:
    """A worker fails with it what the device has taken and will not complete."""
    assert DeviceBackend(kind(status_byte=True, error_status=9)()).error_status == 9
