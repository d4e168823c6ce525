"""The Rust ``vhost`` crate's front-end drives our block daemon, and a control, through its life."""

import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
IMAGE_BYTES = 1 << 20


@pytest.fixture(scope="session")
def frontend() -> Path:
    cargo = shutil.which("cargo")
    if cargo is None or subprocess.run([cargo, "--version"], capture_output=True).returncode:
        pytest.skip("cargo is not installed")
    command = [cargo, "build", "--release", "--locked", "--quiet"]
    built = subprocess.run(command, cwd=HERE, capture_output=True, text=True, timeout=600)
    assert built.returncode == 0, built.stderr
    return HERE / "target" / "release" / "rust-frontend"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(IMAGE_BYTES))
    return path


@contextmanager
def running(command: list[str], socket: Path) -> Iterator[None]:
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            end = time.monotonic() + 60
            while not socket.exists():
                assert process.poll() is None, process.communicate()[1].decode()
                assert time.monotonic() < end, f"{command[0]} does not listen"
                time.sleep(0.01)
            yield
            assert process.poll() is None, process.communicate()[1].decode()
        finally:
            process.terminate()


def drive(frontend: Path, socket: Path) -> str:
    result = subprocess.run([frontend, socket], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, f"{result.stdout}{result.stderr}"
    assert "input and output: 9 requests" in result.stdout
    assert "stopped at 9, started again" in result.stdout
    assert "done: 19 requests" in result.stdout
    return result.stdout


@pytest.mark.timeout(700)
def test_our_daemon(frontend: Path, tmp_path: Path, image: Path) -> None:
    socket = tmp_path / "socket"
    module = [sys.executable, "-m", "vhost_backend", "blk"]
    with running([*module, f"--socket-path={socket}", f"--blk-file={image}"], socket):
        first = drive(frontend, socket)
        assert "memory slots: 509" in first
        # The daemon accepts the next front-end, and starts with nothing left from the last.
        assert drive(frontend, socket) == first
    assert any(image.read_bytes()[-(1 << 16) :])


@pytest.mark.timeout(700)
def test_control(frontend: Path, tmp_path: Path, image: Path) -> None:
    """QEMU's storage daemon passes the same steps: the steps are right."""
    daemon = shutil.which("qemu-storage-daemon")
    if daemon is None:
        pytest.skip("qemu-storage-daemon is not installed")
    socket = tmp_path / "socket"
    blockdev = f"driver=file,node-name=disk,filename={image}"
    export = f"type=vhost-user-blk,id=export,node-name=disk,addr.type=unix,addr.path={socket}"
    command = [daemon, "--blockdev", blockdev, "--export", f"{export},writable=on"]
    with running(command, socket):
        assert "memory slots" in drive(frontend, socket)
