"""QEMU's own programs and a back-end want the same image: whoever comes second is refused."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.guest import MIB, Missing, in_ci, provide_program, skip_or_fail

import vhost_protocol as vp
from vhost_backend import BlockDevice
from vhost_backend.devices.blk import image_lock
from vhost_backend.driver.block import DRIVER_FEATURES
from vhost_backend.testing import attached


def program(name: str, package: str) -> str:
    try:
        return provide_program(name, package, fetch=in_ci())
    except Missing as reason:
        skip_or_fail(reason)


@pytest.fixture(scope="session")
def qemu() -> str:
    return program("qemu-system-x86_64", "qemu-system-x86")


@pytest.fixture(scope="session")
def qemu_img() -> str:
    return program("qemu-img", "qemu-utils")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_lock, "PATIENCE", 0.0)


def run(*command: str, said: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        input=said,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
    )


def with_disk(qemu: str, image: Path, kind: str) -> list[str]:
    """A virtual machine that has the image as its disk and stands still."""
    return [
        *(qemu, "-S", "-machine", "q35", "-accel", "tcg", "-nodefaults", "-display", "none"),
        *("-monitor", "stdio", "-device", "virtio-blk-pci,drive=disk", "-drive"),
        f"file={image},format=raw,if=none,id=disk,readonly={'on' if kind == 'reader' else 'off'}",
    ]


@contextmanager
def qemu_has(qemu: str, image: Path, kind: str) -> Iterator[None]:
    """QEMU has the image until the end."""
    with subprocess.Popen(
        with_disk(qemu, image, kind),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            assert process.stdin is not None
            assert process.stdout is not None
            process.stdin.write("info status\n")
            process.stdin.flush()
            said = []
            for line in process.stdout:
                said.append(line)
                if "VM status" in line:
                    break
            else:
                pytest.fail("".join(said))
            yield
        finally:
            process.kill()


@pytest.mark.parametrize("theirs", ["reader", "writer"])
@pytest.mark.parametrize("ours", ["reader", "writer"])
def test_qemu_comes_second(image: Path, qemu: str, ours: str, theirs: str) -> None:
    device = BlockDevice(image, read_only=ours == "reader")
    command = with_disk(qemu, image, theirs)
    with attached(device, features=DRIVER_FEATURES):
        done = run(*command, said="quit\n")
        if ours == theirs == "reader":
            assert done.returncode == 0, done.stdout
        else:
            assert done.returncode != 0
            assert "Failed to get" in done.stdout
    done = run(*command, said="quit\n")
    assert done.returncode == 0, done.stdout  # it is free again, though the device is still open
    device.close()


@pytest.mark.parametrize("theirs", ["reader", "writer"])
@pytest.mark.parametrize("ours", ["reader", "writer"])
def test_qemu_comes_first(
    image: Path, qemu: str, ours: str, theirs: str, caplog: pytest.LogCaptureFixture
) -> None:
    device = BlockDevice(image, read_only=ours == "reader")
    with qemu_has(qemu, image, theirs):
        if ours == theirs == "reader":
            with attached(device, features=DRIVER_FEATURES):
                pass
        else:
            with (
                pytest.raises(vp.RequestFailed),
                attached(device, features=DRIVER_FEATURES),
            ):
                pass
            assert "(qemu-system-x86" in caplog.text
    with attached(device, features=DRIVER_FEATURES):
        pass
    device.close()


def test_qemu_img_does_not_touch_a_disk_in_use(image: Path, qemu_img: str) -> None:
    device = BlockDevice(image)
    resize = (qemu_img, "resize", "-f", "raw", str(image), "2M")
    with attached(device, features=DRIVER_FEATURES):
        done = run(*resize)
        assert done.returncode != 0
        assert 'Failed to get "' in done.stdout
        assert image.stat().st_size == MIB
        # "--force-share" is for who knows what that means.
        assert run(qemu_img, "info", "--force-share", str(image)).returncode == 0
    assert run(*resize).returncode == 0
    assert image.stat().st_size == 2 * MIB
    device.close()
