"""Find the C library, load it and check it.

The library is found beside this package (a wheel brings it, an editable install builds it there).
In a source tree the hash of the sources inside the library is compared with the sources, since
nothing rebuilds it when they change.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from binascii import crc32
from functools import lru_cache
from typing import Any, Final

from .layout import ABI

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
