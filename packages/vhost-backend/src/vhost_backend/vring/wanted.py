"""The memory that a ring waits for."""

from typing import NamedTuple


class Wanted(NamedTuple):
    """Memory that a ring waits for: the facts of a `Need`.

    The error itself would keep its frames alive, and a guest's memory with them.
    """

    address: int
    length: int
    access: int
