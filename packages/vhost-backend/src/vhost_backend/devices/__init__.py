"""The devices that come with the library."""

from .blk import BlockDevice

__all__ = ["BlockDevice"]
