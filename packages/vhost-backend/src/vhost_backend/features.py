"""Virtio feature bits that concern every device or that the transport itself interprets.

Source: virtio 1.3, section 6 "Reserved Feature Bits"; vhost-user.rst for bits 26 and 30.
"""

from __future__ import annotations

from enum import IntFlag


class VirtioFeature(IntFlag):
    """Device-independent feature bits, as a mask (not bit numbers)."""

    NOTIFY_ON_EMPTY = 1 << 24
    LOG_ALL = 1 << 26
    ANY_LAYOUT = 1 << 27
    INDIRECT_DESC = 1 << 28
    EVENT_IDX = 1 << 29
    PROTOCOL_FEATURES = 1 << 30
    VERSION_1 = 1 << 32
    ACCESS_PLATFORM = 1 << 33
    RING_PACKED = 1 << 34
    IN_ORDER = 1 << 35
    ORDER_PLATFORM = 1 << 36
    NOTIFICATION_DATA = 1 << 38
    RING_RESET = 1 << 40


#: The features that the rings of this library offer for every device.
RING_FEATURES = (
    VirtioFeature.INDIRECT_DESC
    | VirtioFeature.EVENT_IDX
    | VirtioFeature.VERSION_1
    | VirtioFeature.RING_PACKED
    | VirtioFeature.ACCESS_PLATFORM
)
