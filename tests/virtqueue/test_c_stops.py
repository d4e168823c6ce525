"""The C engine stopped after each store of taking, completing and recovering in turn.

A build of the library for tests dies, as by SIGKILL, right after the n-th store it makes to the
ring or the in-flight region.  Whatever n is, the next process takes up what was in flight: no
chain is lost, and none comes back twice.
"""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from guest_memory import GuestMemory
from virtqueue import InflightRegion, c_library, inflight_size
from virtqueue.engine import c as c_engine

TEST_STOP = Path(__file__).parent / "c" / "test_stop.c"
BUILD = Path(__file__).parents[2] / "packages" / "virtqueue" / "hatch_build.py"

pytestmark = [
    pytest.mark.skipif(not BUILD.exists(), reason="the C sources are not there"),
    # The engine itself may have been built by the ziglang of a build environment that is gone.
    pytest.mark.skipif(
        shutil.which("cc") is None and importlib.util.find_spec("ziglang") is None,
        reason="no C compiler and no ziglang",
    ),
]


@pytest.fixture(scope="module")
def stopping(tmp_path_factory: pytest.TempPathFactory) -> c_library.Library:
    path = tmp_path_factory.mktemp("engine") / "libvirtqueue.so"
    flags = ("-DVQ_TEST_STOP", "-I.", str(TEST_STOP))  # the compiler runs in csrc
    arguments = ["--output", str(path), *(f"--flag={flag}" for flag in flags)]
    subprocess.run([sys.executable, BUILD, *arguments], check=True, capture_output=True)
    return c_library.Library(path)


@pytest.fixture
def engine() -> str:
    return "c"


CHAINS = 6
STRIDE = 1 if os.environ.get("VIRTQUEUE_LONG_TESTS") else 7
"""Every store takes a minute; a different seventh of them for each parameter set is the rule."""


def serve(rig: Any, library: c_library.Library, stop_at: int) -> None:
    """In a process of its own: take all, complete out of order; dies at a store, or ends.

    Some takes are undone in between.
    """
    c_engine.library = lambda: library  # type: ignore[assignment, attr-defined]
    ctypes.c_uint32.in_dll(library.held, "vq_test_stop_at").value = stop_at
    # A mapping of its own, as another process has.
    rig.memory = GuestMemory.map([(rig.memory.regions[0], rig.fd)])
    device = rig.new_device(base=None)
    kept = list(device.take(4))
    device.give_back(kept[1:])
    del kept[1:]
    while True:
        held = [*device.take(4), *kept]
        kept = []
        if not held:
            return
        for chain in [*held[1::2], *held[::2]]:
            chain.write(chain.read())
            device.complete(chain)
            if len(held) < 4:
                device.publish()
        device.publish()


def in_child(rig: Any, library: c_library.Library, stop_at: int) -> bool:
    """Whether it died of the stop."""
    pid = os.fork()
    if not pid:
        try:
            serve(rig, library, stop_at)
            os._exit(0)
        finally:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL)
    return code != 0


@pytest.mark.filterwarnings("ignore:This process.*fork:DeprecationWarning")
@pytest.mark.parametrize("in_order", [False, True])
def test_death_after_every_store(
    make_rig: Any, stopping: c_library.Library, packed: bool, in_order: bool
) -> None:
    stop_at, died = (2 * packed + 3 * in_order) % STRIDE + 1 - STRIDE, True
    while died:
        stop_at += STRIDE
        rig = make_rig(packed=packed, size=7 if packed else 8, device=False, in_order=in_order)
        shared = mmap.mmap(-1, inflight_size(rig.config.size, packed))
        address = ctypes.addressof(ctypes.c_uint8.from_buffer(shared))
        rig.inflight = InflightRegion(address, len(shared), shared)
        expected: dict[int, tuple[int, bytes]] = {}
        returned: list[bytes] = []

        def collect(expected: Any = expected, returned: Any = returned, rig: Any = rig) -> None:
            for identity, written in rig.driver.collect():
                room, text = expected.pop(identity)  # KeyError: it came back twice
                assert rig.memory.read(room, written) == text
                returned.append(text)

        died = False
        number = 0
        # Two deaths: the second, a little later, often falls into the recovery of the first.
        for stop in (stop_at, stop_at // 3 + 1, 0):
            while number < CHAINS * 2 and rig.driver.free >= 2 and len(expected) < CHAINS // 2:
                text = b"request %03d" % number
                room = rig.room(16)
                expected[rig.driver.add([rig.text(text)], [room])] = (room[0], text)
                number += 1
            rig.driver.publish()
            died |= in_child(rig, stopping, stop) and stop == stop_at
            collect()
        assert not expected, f"lost after store {stop_at}"
        assert len(returned) == number
    assert stop_at > 20
