"""Load the C engine and bind its calls.

The library is found beside this package (a wheel brings it, an editable install builds it there).
In a source tree the hash of the sources inside the library is compared with the sources, since
nothing rebuilds it when they change.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from binascii import crc32
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any, Final

from .errors import EngineUnavailable
from .layout import ABI, QueueBlock
from .table import Memory

Call = Callable[[], int]

_CALLS: Final = (
    "vq_create",
    "vq_attach",
    "vq_recover",
    "vq_take",
    "vq_publish",
    "vq_cycle",
    "vq_rewind",
    "vq_untake",
    "vq_arm",
    "vq_disarm",
    "vq_ready",
)

LIBRARY_PATH: Final = os.path.join(os.path.dirname(__file__), "_engine", "libvirtqueue.so")


class StaleEngine(RuntimeWarning):
    """The library was not built from the sources in this tree: ``hatch run build-engine``."""


def source_hash(sources: str) -> str:
    """The hash that ``hatch_build.py`` puts into the library, of the sources in ``sources``.

    It tells versions apart and guards nothing, so it is one that every process can afford:
    ``hashlib`` would load OpenSSL, 3.7 MiB of an idle daemon.
    """
    digest = 0
    for name in sorted(name for name in os.listdir(sources) if name.endswith((".c", ".h"))):
        with open(os.path.join(sources, name), "rb") as file:
            content = file.read()
        digest = crc32(content, crc32(f"{name}\0{len(content)}\0".encode(), digest))
    return f"{digest:08x}"


class Library:
    """The loaded library, once with the GIL kept in calls and once with it released."""

    def __init__(self, path: str | os.PathLike[str] = LIBRARY_PATH) -> None:
        path = os.fspath(path)
        if not os.path.exists(path):
            raise ImportError(f"{path} does not exist (built with VIRTQUEUE_BUILD=none?)")
        try:
            self.held: Any = ctypes.PyDLL(path)
            self.released: Any = ctypes.CDLL(path)
            self.held.vq_abi.restype = ctypes.c_uint32
            self.held.vq_source_hash.restype = ctypes.c_char_p
            abi = self.held.vq_abi()
            # No argtypes: arguments are prebuilt ctypes objects, which costs a third of the time.
            for functions in (self.held, self.released):
                for name in _CALLS:
                    getattr(functions, name).restype = ctypes.c_int
                functions.vq_close.restype = None
                functions.vq_guard_install.restype = ctypes.c_int
                functions.vq_guard_watch.restype = ctypes.c_int
                functions.vq_guard_unwatch.restype = ctypes.c_int
                functions.vq_guard_watch_range.restype = ctypes.c_int
                functions.vq_guard_unwatch_range.restype = ctypes.c_int
                functions.vq_guard_events.restype = ctypes.c_uint32
                functions.vq_turn.restype = ctypes.c_int
                functions.vq_turn_held.restype = ctypes.c_int
                functions.vq_serve.restype = ctypes.c_int
                functions.vq_borrow.restype = ctypes.c_int
                functions.vq_give_back.restype = None
                functions.vq_file_handle.restype = ctypes.c_int
                functions.vq_transfer.restype = ctypes.c_int
                functions.vq_uring_open.restype = ctypes.c_int
                functions.vq_uring_transfer.restype = ctypes.c_int
                functions.vq_uring_close.restype = None
        except (OSError, AttributeError) as error:
            raise ImportError(f"{path} cannot be loaded: {error}") from error
        if abi != ABI:
            raise ImportError(f"{path} has ABI {abi}, this package needs {ABI}")
        self.path: str = path
        self.source_hash: str = self.held.vq_source_hash().decode()
        sources = os.path.normpath(os.path.join(os.path.dirname(__file__), "../../csrc"))
        if (
            path == LIBRARY_PATH
            and os.path.isdir(sources)
            and source_hash(sources) != self.source_hash
        ):
            warnings.warn(
                f"{path} was built from other sources than {sources}: run `hatch run build-engine`",
                StaleEngine,
                stacklevel=3,
            )


@lru_cache(maxsize=1)
def library() -> Library:
    """The engine's library; raises ImportError with the reason when there is none."""
    return Library()


class CEngine:
    """One queue's engine in C.  Not thread-safe: its owner makes one call at a time.

    The calls are bound to the block once, so that each costs one call into C and no conversion.
    """

    name = "c"

    def __init__(self, block: QueueBlock, release_gil: bool = False) -> None:
        loaded = library()
        self._block = block
        self.address: int = ctypes.addressof(block)
        """Host address of the block."""
        self._release_gil = release_gil
        self._released: bool | None = None
        argument = ctypes.c_void_p(self.address)
        result = loaded.held.vq_create(argument)
        if result < 0:
            raise EngineUnavailable(f"the C engine refuses the queue's block ({result})")
        self._close: Callable[[], None] = partial(loaded.held.vq_close, argument)
        self._bind(release_gil)

    def _bind(self, release_gil: bool) -> None:
        if release_gil is self._released:
            return
        self._released = release_gil
        loaded, argument = library(), ctypes.c_void_p(self.address)
        functions = loaded.released if release_gil else loaded.held
        self.attach: Call = partial(functions.vq_attach, argument)
        self.recover: Call = partial(functions.vq_recover, argument)
        self.take: Call = partial(functions.vq_take, argument)
        self.publish: Call = partial(functions.vq_publish, argument)
        self.cycle: Call = partial(functions.vq_cycle, argument)
        self.rewind: Call = partial(functions.vq_rewind, argument)
        self._untake: Callable[..., int] = partial(functions.vq_untake, argument)
        self.arm: Call = partial(functions.vq_arm, argument)
        self.disarm: Call = partial(functions.vq_disarm, argument)
        self.ready: Call = partial(functions.vq_ready, argument)

    def untake(self, heads: ctypes.Array[ctypes.c_uint16]) -> int:
        return self._untake(heads, ctypes.c_uint32(len(heads)))

    def set_memory(self, memory: Memory) -> None:
        """Keep the GIL in calls as long as an access to the new snapshot is bounded.

        The table itself is read from ``block.table`` when the engine attaches.
        """
        self._bind(self._release_gil or not getattr(memory, "bounded", True))

    def close(self) -> None:
        """Release the records of all chains in flight and the engine's memory."""
        self._close()


def create(block: QueueBlock, memory: Memory, *, release_gil: bool = False) -> CEngine:
    """An engine for the ring that the block describes.

    Calls keep the GIL, since they are short and bounded, as long as guest memory cannot make a
    thread wait.  With ``release_gil`` they give it up: for memory under userfaultfd (postcopy),
    behind FUSE, or mapped from Xen.
    """
    return CEngine(block, release_gil)
