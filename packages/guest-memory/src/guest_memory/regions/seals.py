"""File seals: operations on a memfd that no process can do any more (fcntl(2), "File Sealing")."""

import fcntl

_F_ADD_SEALS = 1033
_F_GET_SEALS = 1034
_F_SEAL_SHRINK = 2
_F_SEAL_GROW = 4


def cannot_shrink(fd: int) -> bool:
    """Tell whether no process can ever shorten the file again."""
    try:
        return bool(fcntl.fcntl(fd, _F_GET_SEALS) & _F_SEAL_SHRINK)
    except (OSError, ValueError):  # not a memfd, or no file at all
        return False


def fix_size(fd: int) -> None:
    """Seal a memfd against being shortened and extended; raises `OSError`."""
    fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW)
