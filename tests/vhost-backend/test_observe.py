"""Counters: in the process, on SIGUSR1, and for Prometheus."""

import errno
import logging
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import vhost_protocol as vp
from vhost_backend import (
    BlockDevice,
    DeviceBackend,
    ListenError,
    MetricsServer,
    QueueInfo,
    Request,
    VhostBackendError,
    VhostUserDaemon,
    VirtioDevice,
    report,
    serve_all,
)
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES


def test_counters_count(image: Path) -> None:
    ours, theirs = socket.socketpair()
    with VhostUserDaemon("disk", DeviceBackend(BlockDevice(image))) as daemon:
        daemon.start_connection(ours)
        with DriverSession(vp.Frontend(theirs, timeout=60), features=DRIVER_FEATURES) as session:
            driver = BlockDriver(session)
            for _ in range(5):
                driver.read(0, 512)
            (entry,) = report([daemon])
            assert (entry.device, entry.queue, entry.running) == ("disk", 0, True)
            assert entry.counters["requests"] == 5
            assert 1 <= entry.counters["batches"] <= 5
            assert entry.counters["notifications_sent"] >= 1
            assert entry.counters["errors"] == 0
            # Header, data and status byte; they are kept when the ring is stopped.
            assert entry.counters["bytes"] == 5 * (16 + 512 + 1)
            driver.write(0, bytes(1024))
            session.stop_ring(0)
            (entry,) = report([daemon])
            assert entry.counters["bytes"] == 5 * (16 + 512 + 1) + 16 + 1024 + 1


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_metrics_are_served(tmp_path: Path, image: Path, kind: str) -> None:
    pytest.importorskip("prometheus_client")
    with VhostUserDaemon("disk", DeviceBackend(BlockDevice(image, num_queues=2))) as daemon:
        where = f"unix:{tmp_path / 'metrics'}" if kind == "unix" else "127.0.0.1:0"
        server = MetricsServer(where, [daemon])
        server.start()
        try:
            if kind == "unix":
                with socket.socket(socket.AF_UNIX) as client:
                    client.settimeout(60)
                    client.connect(str(tmp_path / "metrics"))
                    client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
                    text = b"".join(iter(lambda: client.recv(65536), b"")).decode()
            else:
                url = f"http://127.0.0.1:{server.port}/metrics"
                with urllib.request.urlopen(url, timeout=60) as response:
                    text = response.read().decode()
        finally:
            server.close()
    assert 'vhost_queue_requests_total{device="disk",queue="1"} 0.0' in text
    assert 'vhost_queue_running{device="disk",queue="0"} 0.0' in text
    assert not (tmp_path / "metrics").exists()


@pytest.mark.parametrize("where", ["nonsense", "0.0.0.0:1", "192.0.2.1:80", "127.0.0.1:99999"])
def test_metrics_stay_on_this_machine(where: str) -> None:
    pytest.importorskip("prometheus_client")
    with pytest.raises(VhostBackendError):
        MetricsServer(where, [])


def test_a_taken_metrics_port_is_one_error() -> None:
    pytest.importorskip("prometheus_client")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ListenError):
            MetricsServer(f"127.0.0.1:{taken.getsockname()[1]}", [])


def test_sigusr1_prints_the_counters(tmp_path: Path, image: Path) -> None:
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "vhost_backend", "blk", "--num-queues=2"),
            f"--socket-path={tmp_path / 's'}",
            f"--blk-file={image}",
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stderr is not None
        assert "serving" in process.stderr.readline()
        process.send_signal(signal.SIGUSR1)
        for queue in range(2):
            line = process.stderr.readline()
            assert line.startswith(f"{image} queue {queue}: stopped in_flight=0 requests=0 ")
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        assert process.stderr is not None
        process.stderr.close()


class Two(NamedTuple):
    """Two devices that one process serves."""

    devices: Sequence[VirtioDevice]
    names: list[str]


class Silent(VirtioDevice):
    device_id = 4

    def handle(self, queue: QueueInfo, request: Request) -> None:
        """Answer nothing."""


class Named(Silent):
    name = "a name of its own"


def two_disks(folder: Path) -> Two:
    paths = [folder / "a.img", folder / "b.img"]
    for path in paths:
        path.write_bytes(bytes(4096))
    return Two([BlockDevice(path) for path in paths], [str(path) for path in paths])


def one_disk_twice(folder: Path) -> Two:
    (folder / "a.img").write_bytes(bytes(4096))
    devices = [BlockDevice(folder / "a.img", read_only=True) for _ in range(2)]
    return Two(devices, [f"{folder / 'a.img'} on {folder / name}" for name in ("0.sock", "1.sock")])


def two_of_a_class(folder: Path) -> Two:
    return Two(
        [Silent(), Silent()],
        [f"Silent on {folder / '0.sock'}", f"Silent on {folder / '1.sock'}"],
    )


def two_names(folder: Path) -> Two:
    return Two([Silent(), Named()], ["Silent", "a name of its own"])


@pytest.mark.parametrize("make", [two_disks, one_disk_twice, two_of_a_class, two_names])
def test_two_devices_of_one_process_are_told_apart(
    tmp_path: Path, make: Callable[[Path], Two]
) -> None:
    pytest.importorskip("prometheus_client")
    devices, names = make(tmp_path)
    pairs = [(device, tmp_path / f"{index}.sock") for index, device in enumerate(devices)]
    answers: list[str] = []

    def ask() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(tmp_path / "metrics"))
            client.sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
            answers.append(b"".join(iter(lambda: client.recv(65536), b"")).decode())
        os.kill(os.getpid(), signal.SIGTERM)

    asking = threading.Thread(target=ask)
    serve_all(pairs, metrics=f"unix:{tmp_path / 'metrics'}", ready=asking.start)
    asking.join()
    series = [
        line.rsplit(" ", 1)[0] for line in answers[0].splitlines() if line.startswith("vhost_")
    ]
    assert len(set(series)) == len(series)
    for name in names:
        assert f'vhost_queue_running{{device="{name}",queue="0"}}' in series


def silent(server: MetricsServer) -> socket.socket:
    """A client of the metrics that is being served, and says nothing."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=60)
    client.sendall(b"GET /")
    return client


def test_a_silent_client_of_the_metrics_keeps_nothing_waiting(image: Path) -> None:
    pytest.importorskip("prometheus_client")
    with VhostUserDaemon("disk", DeviceBackend(BlockDevice(image))) as daemon:
        server = MetricsServer("127.0.0.1:0", [daemon])
        server.start()
        with silent(server):
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=60) as response:
                assert b"vhost_queue_running" in response.read()
            closing = threading.Thread(target=server.close, daemon=True)
            closing.start()
            closing.join(60)
            assert not closing.is_alive()


def test_a_client_of_the_metrics_that_resets_has_no_traceback(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("prometheus_client")
    caplog.set_level(logging.DEBUG, "vhost_backend")
    server = MetricsServer("127.0.0.1:0", [])
    server.start()
    try:
        with silent(server) as client:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        end = time.monotonic() + 60
        while not caplog.records:
            assert time.monotonic() < end, "the reset was not noticed"
            time.sleep(0.01)
    finally:
        server.close()
    assert capsys.readouterr().err == ""


def test_metrics_do_not_spin_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("prometheus_client")
    from vhost_backend.daemon import prometheus

    pauses = threading.Semaphore(0)
    monkeypatch.setattr(prometheus, "_pause", pauses.release)
    server = MetricsServer("127.0.0.1:0", [])
    server.start()
    accept = server._server._accept
    failures = 3

    def short() -> Any:
        nonlocal failures
        if failures:
            failures -= 1
            raise OSError(errno.EMFILE, "no descriptors")
        return accept()

    server._server._accept = short  # type: ignore[method-assign]
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=60) as response:
            assert response.status == 200
        for _ in range(3):
            assert pauses.acquire(timeout=60)
    finally:
        server.close()


def test_metrics_of_a_disk_whose_path_is_not_utf_8(tmp_path: Path) -> None:
    pytest.importorskip("prometheus_client")
    path = os.fsencode(tmp_path) + b"/\xff.img"
    with open(path, "wb") as file:
        file.truncate(4096)
    device = BlockDevice(os.fsdecode(path))
    with VhostUserDaemon(device.name, DeviceBackend(device)) as daemon:
        server = MetricsServer("127.0.0.1:0", [daemon])
        server.start()
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{server.port}/", timeout=60) as response:
                assert rb'\\udcff.img",queue="0"} 0.0' in response.read()
        finally:
            server.close()
    device.close()
