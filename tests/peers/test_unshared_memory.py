"""QEMU started without the words that share guest memory: the daemon says which are missing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from tests.support.guest import MIB, Missing, in_ci, provide_program, skip_or_fail

PRIVATE = "memory-backend-memfd,id=mem,size=256M,share=off"


@pytest.fixture(scope="session")
def qemu() -> str:
    try:
        return provide_program("qemu-system-x86_64", "qemu-system-x86", fetch=in_ci())
    except Missing as reason:
        skip_or_fail(reason)


@pytest.mark.parametrize(
    ("machine", "said"),
    [
        (["-machine", "q35"], "the ring is not in the memory that the front-end shares"),
        (
            ["-object", PRIVATE, "-machine", "q35,memory-backend=mem"],
            "no request has come, and its rings are blank",
        ),
    ],
    ids=["no object", "share=off"],
)
def test_the_missing_words_are_named(
    tmp_path: Path, qemu: str, machine: list[str], said: str
) -> None:
    """The firmware looks for something to boot, so no guest is needed."""
    image, path = tmp_path / "disk.img", tmp_path / "s"
    image.write_bytes(bytes(MIB))
    daemon = subprocess.Popen(
        [
            *(sys.executable, "-m", "vhost_backend", "blk"),
            *(f"--socket-path={path}", f"--blk-file={image}"),
        ],
        stderr=subprocess.PIPE,
        text=True,
    )
    guest = None
    try:
        deadline = time.monotonic() + 60
        while not path.exists():
            assert daemon.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.01)
        guest = subprocess.Popen(
            [
                *(qemu, "-m", "256M", "-accel", "tcg", "-nodefaults", "-display", "none", *machine),
                *("-chardev", f"socket,id=disk,path={path}"),
                *("-device", "vhost-user-blk-pci,chardev=disk,bootindex=0"),
            ],
            stderr=subprocess.DEVNULL,
        )
        assert daemon.stderr is not None
        for line in daemon.stderr:  # the test's own time limit is the deadline
            if said in line:
                break
        else:
            pytest.fail("the daemon has ended without the word")
        assert "share=on" in line
        assert line.startswith(f"vhost-backend: {image}: ")
    finally:
        if guest is not None:
            guest.kill()
            guest.wait()
        daemon.kill()
        daemon.wait()
        assert daemon.stderr is not None
        daemon.stderr.close()
