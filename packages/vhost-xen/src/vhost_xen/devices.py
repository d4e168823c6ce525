"""Checks whether this machine has the device files for Xen mappings."""

from __future__ import annotations

import os
import sys

from .errors import XenUnavailable


def check_devices(folder: str | os.PathLike[str] = "/dev/xen") -> None:
    """Raise XenUnavailable, with one line that says why, when there are no Xen device files.

    This is for programs whose user asks for Xen guests. `XenMapper` itself needs no device files:
    it works on the open files that a front-end sends.
    """
    if not sys.platform.startswith("linux"):
        raise XenUnavailable("Xen mappings need Linux")
    missing = [
        name for name in ("privcmd", "gntdev") if not os.path.exists(os.path.join(folder, name))
    ]
    if missing:
        raise XenUnavailable(
            f"no {' and no '.join(os.path.join(folder, name) for name in missing)}: "
            "is this a Xen domain, with the modules xen-privcmd and xen-gntdev loaded?"
        )
