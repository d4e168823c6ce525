"""virtio-blk's numbers: features, request types, status bytes (virtio 1.3, 5.2).

Features are masks, not bit numbers.
"""

from __future__ import annotations

from typing import Final

#: Bytes of a sector, the unit of capacities and positions.
SECTOR: Final = 512
#: Bytes of the identity that T_GET_ID reads.
ID_LENGTH: Final = 20

# Feature bits (virtio 1.3, 5.2.3), as masks.
F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14

# Request types and states (5.2.6).
T_IN: Final = 0
T_OUT: Final = 1
T_FLUSH: Final = 4
T_GET_ID: Final = 8
T_DISCARD: Final = 11
T_WRITE_ZEROES: Final = 13
S_OK: Final = 0
S_IOERR: Final = 1
S_UNSUPP: Final = 2
