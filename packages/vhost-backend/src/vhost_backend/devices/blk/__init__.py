"""A disk on a file or block device.

The numbers of virtio-blk are public: `from vhost_backend.devices.blk import SECTOR, T_IN, ...`.
"""

from .virtio_blk import (
    F_BLK_SIZE,
    F_DISCARD,
    F_FLUSH,
    F_MQ,
    F_RO,
    F_SEG_MAX,
    F_TOPOLOGY,
    F_WRITE_ZEROES,
    ID_LENGTH,
    S_IOERR,
    S_OK,
    S_UNSUPP,
    SECTOR,
    T_DISCARD,
    T_FLUSH,
    T_GET_ID,
    T_IN,
    T_OUT,
    T_WRITE_ZEROES,
)

__all__ = [
    "F_BLK_SIZE",
    "F_DISCARD",
    "F_FLUSH",
    "F_MQ",
    "F_RO",
    "F_SEG_MAX",
    "F_TOPOLOGY",
    "F_WRITE_ZEROES",
    "ID_LENGTH",
    "SECTOR",
    "S_IOERR",
    "S_OK",
    "S_UNSUPP",
    "T_DISCARD",
    "T_FLUSH",
    "T_GET_ID",
    "T_IN",
    "T_OUT",
    "T_WRITE_ZEROES",
]
