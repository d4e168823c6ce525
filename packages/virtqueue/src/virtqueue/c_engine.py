"""Load the C engine and bind its calls.

The library is found beside this package (a wheel brings it, an editable install builds it there).
In a source tree the hash of the sources inside the library is compared with the sources, since
nothing rebuilds it when they change.
"""

from __future__ import annotations

import ctypes
import hashlib
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from .layout import ABI

LIBRARY_PATH = Path(__file__).parent / "_engine" / "libvirtqueue.so"


class StaleEngine(RuntimeWarning):
    """The library was not built from the sources in this tree: ``hatch run build-engine``."""


def source_hash(sources: Path) -> str:
    """The hash that ``hatch_build.py`` puts into the library, of the sources in ``sources``."""
    digest = hashlib.sha256()
    for path in sorted([*sources.glob("*.c"), *sources.glob("*.h")]):
        content = path.read_bytes()
        digest.update(f"{path.name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()[:32]


class Library:
    """The loaded library, once with the GIL kept in calls and once with it released."""

    def __init__(self, path: Path = LIBRARY_PATH) -> None:
        if not path.exists():
            raise ImportError(f"{path} does not exist (built with VIRTQUEUE_BUILD=none?)")
        try:
            self.held: Any = ctypes.PyDLL(str(path))
            self.released: Any = ctypes.CDLL(str(path))
            self.held.vq_abi.restype = ctypes.c_uint32
            self.held.vq_source_hash.restype = ctypes.c_char_p
            abi = self.held.vq_abi()
        except (OSError, AttributeError) as error:
            raise ImportError(f"{path} cannot be loaded: {error}") from error
        if abi != ABI:
            raise ImportError(f"{path} has ABI {abi}, this package needs {ABI}")
        self.path = path
        self.source_hash: str = self.held.vq_source_hash().decode()
        sources = Path(__file__).parents[2] / "csrc"
        if path == LIBRARY_PATH and sources.is_dir() and source_hash(sources) != self.source_hash:
            warnings.warn(
                f"{path} was built from other sources than {sources}: run `hatch run build-engine`",
                StaleEngine,
                stacklevel=3,
            )


@lru_cache(maxsize=1)
def library() -> Library:
    """The engine's library; raises ImportError with the reason when there is none."""
    return Library()
