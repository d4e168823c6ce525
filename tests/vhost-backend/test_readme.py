"""The README's examples run as they stand."""

import re
from pathlib import Path
from typing import Any

import vhost_backend
from vhost_backend import (
    VhostUserBackendBase,
    VhostUserDaemon,
    VirtioDevice,
    VringEpollHandler,
    VringMutex,
    VringRwLock,
    VringState,
)
from vhost_backend.device.hooks import CONFIGURATION, OF_A_TYPE
from vhost_backend.testing import attached

# In a checkout the tests lie beside the packages, in an sdist inside of the package.
_CHECKOUT = Path(__file__).parents[2] / "packages" / "vhost-backend"
README = (_CHECKOUT if _CHECKOUT.is_dir() else Path(__file__).parents[1]) / "README.md"


def test_the_examples() -> None:
    device, use = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len([line for line in device.splitlines() if line.strip()]) <= 15
    names: dict[str, Any] = {"__name__": "example"}
    exec(device, names)
    assert issubclass(names["Entropy"], VirtioDevice)
    exec(use, names)
    assert names["attached"] is attached


#: Every public name of rust-vmm's crate: types, traits, and what can be called on them.
REFERENCE = """
    VhostUserBackend VhostUserBackendMut Bitmap Vring
    num_queues max_queue_size features acked_features protocol_features reset_device set_event_idx
    get_config set_config update_memory set_backend_req_fd get_shared_object set_gpu_socket
    queues_per_thread exit_event handle_event set_device_state_fd check_device_state
    get_shmem_config
    VhostUserDaemon start start_client wait serve get_epoll_handlers ShutdownHandle
    VringEpollHandler register_listener unregister_listener send_exit_event
    VringState VringMutex VringRwLock VringT VringStateGuard VringStateMutGuard
    get_ref get_mut add_used signal_used_queue enable_notification disable_notification
    needs_notification set_enabled set_queue_info queue_next_avail set_queue_next_avail
    set_queue_next_used queue_used_idx set_queue_size set_queue_event_idx set_queue_ready set_kick
    read_kick set_call set_err is_enabled get_kick get_call get_queue get_queue_mut
    BitmapMmapRegion AtomicBitmapMmap MmapLogReg BitmapReplace MemRegionBitmap
    Error Result VhostUserHandlerError VringEpollError VringEpollResult GuestMemoryAtomic
    process_queue
"""


def _rows() -> list[tuple[str, str]]:
    text = README.read_text()
    table = text[text.index("| rust-vmm `vhost-user-backend` | here |") :].split("\n\n")[0]
    return [
        (row.split("|")[1], row.split("|")[2]) for row in table.replace("\\|", " ").splitlines()[2:]
    ]


def test_the_table_names_all_that_the_reference_has() -> None:
    there = set(re.findall(r"\w+", " ".join(left for left, _ in _rows())))
    assert not set(REFERENCE.split()) - there


def test_what_has_the_same_name_is_there() -> None:
    kinds = (
        VhostUserBackendBase,
        VhostUserDaemon,
        VringEpollHandler,
        VringMutex,
        VringRwLock,
        VringState,
    )
    for left, right in _rows():
        if "the same" not in right:
            continue
        for name in re.findall(r"`(?:\w+::)?(\w+)(?:\(\))?`", left.split(";")[0]):
            owners = [kind for kind in kinds if hasattr(kind, name)]
            assert owners, name
            if "flavours" in right:
                assert set(owners) >= {VringMutex, VringRwLock, VringState}, name


def test_the_table_of_hooks_is_that_of_the_library() -> None:
    text = README.read_text()
    table = text[text.index("| Protocol | methods | offered |") :].split("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:4]] for row in table.splitlines()[2:]]
    said = {}
    for kind, methods, offered in rows:
        assert hasattr(vhost_backend, kind.strip("`"))
        said[tuple(re.findall(r"`(\w+)\(", methods))] = offered
    groups = [group for group in OF_A_TYPE if group is not CONFIGURATION]
    assert said == {group.hooks: group.features.name or "\N{EN DASH}" for group in groups}
