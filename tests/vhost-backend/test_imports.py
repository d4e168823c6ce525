"""What a daemon loads, and when: memory that it holds for months, and time that a guest waits for.

`-X importtime` names every module in the order in which it is imported, on stderr, so what stands
behind the daemon's own line was imported after it had begun to listen.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import vhost_backend
from vhost_backend.driver import BlockDriver, DriverSession
from vhost_backend.driver.block import DRIVER_FEATURES
from virtqueue import EngineName

OURS = ("guest_memory", "vhost_backend", "vhost_protocol", "virtqueue")
#: What an idle daemon does without, and what each would add to its proportional share of memory in
#: KiB (CPython 3.11, beside the daemon's 13,500; no figure: at most 100, or not measured). Where
#: the code imports one of these late, this is why.
UNWANTED = {
    *("asyncio", "vhost_protocol.sockets.aio", "vhost_backend.daemon.in_loop"),  # 4500
    *("_hashlib", "_ssl", "hashlib", "ssl"),  # 1100, and 3800 where no other process has OpenSSL
    *("dataclasses",),  # 1100
    *("ast", "inspect"),  # 950
    *("pathlib", "urllib.parse"),  # 600
    *("vhost_backend.driver", "virtqueue.queue.driver"),  # 500
    *("tempfile",),  # 400
    *("bz2", "lzma", "shutil"),  # 250
    *("uuid",),  # 160
    *("concurrent.futures", "ctypes.util", "email", "http", "json", "numpy", "platform"),
    *("prometheus_client", "random", "rich", "subprocess", "wsgiref"),
    *("vhost_backend.daemon.prometheus",),
    *("vhost_protocol.trace", "vhost_protocol.sockets.blocking.frontend"),
    *("virtqueue.engine.python.ring", "vhost_xen"),
}
#: What cannot be done without, and so whatever this Python's standard library imports for it.
STANDARD = (
    "import argparse, ctypes, logging, socket, typing; typing.NamedTuple('T', [('x', 'int')])"
)


def imported(text: str) -> set[str]:
    return set(re.findall(r"^import time:.*\| *([\w.]+)$", text, re.MULTILINE))


def imported_by(*arguments: str) -> set[str]:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return imported(done.stderr)


def of_ours(modules: set[str]) -> set[str]:
    return {module for module in modules if module.split(".")[0] in OURS}


def test_an_idle_daemon_holds_what_it_uses_and_nothing_else(
    tmp_path: Path, image: Path, engine: EngineName
) -> None:
    path, errors = tmp_path / "s", tmp_path / "errors"
    with errors.open("w") as file:
        process = subprocess.Popen(
            [
                *(sys.executable, "-X", "importtime", "-m", "vhost_backend", "blk"),
                *(f"--socket-path={path}", f"--blk-file={image}"),
            ],
            stderr=file,
            env={**os.environ, "VIRTQUEUE_ENGINE": engine},
        )
    try:
        while "vhost-backend: serving" not in errors.read_text():
            assert process.poll() is None, errors.read_text()
        idle = imported(errors.read_text())
        with DriverSession.connect(path, features=DRIVER_FEATURES) as session:
            BlockDriver(session).write(0, b"x" * 512)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
    assert "vhost_backend.devices.blk.device" in idle
    unwanted = UNWANTED - ({"virtqueue.engine.python.ring"} if engine == "python" else set())
    assert idle & unwanted <= imported_by("-c", STANDARD)
    later = imported(errors.read_text().partition("vhost-backend: serving")[2])
    assert later & {"inspect", *of_ours(later)} == set()


def test_help_and_capabilities_load_no_device() -> None:
    for arguments in (("--help",), ("--version",), ("blk", "--help")):
        loaded = of_ours(imported_by("-m", "vhost_backend", *arguments))
        assert {module.split(".")[0] for module in loaded} == {"vhost_backend"}, arguments
        assert "vhost_backend.daemon.threaded" not in loaded
    asked = imported_by("-m", "vhost_backend", "blk", "--print-capabilities")
    assert asked & {"argparse", "logging", "vhost_backend.cli.blk"} == set()


def test_names_are_imported_when_they_are_used() -> None:
    assert of_ours(imported_by("-c", "import vhost_backend")) == {
        "vhost_backend",
        "vhost_backend._version",
    }
    assert "asyncio" not in imported_by("-c", "from vhost_backend import VirtioDevice, serve")


def test_every_name_is_there() -> None:
    assert sorted(vhost_backend.__all__) == dir(vhost_backend)
    for name in vhost_backend.__all__:
        if name != "MetricsServer":  # needs an extra
            assert getattr(vhost_backend, name).__doc__ or name == "Vring", name
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = vhost_backend.Nonsense


def test_no_module_hides_a_name() -> None:
    """A module that is imported becomes an attribute of its package."""
    modules = {path.stem for path in Path(vhost_backend.__file__).parent.iterdir()}
    assert modules & set(vhost_backend.__all__) == set()
