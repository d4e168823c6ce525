"""The devices that come with the library."""

from .blk.device import BlockDevice

__all__ = ["BlockDevice"]
