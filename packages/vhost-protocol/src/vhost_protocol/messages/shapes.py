"""Payloads that requests of both sides share."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from .constants import IotlbAccess, IotlbType
from .message import Converters, Message, ReplyT, Request, Wire, known_bits, member
from .replies import Ack

if TYPE_CHECKING:
    from uuid import UUID


class RingOnly(Request[ReplyT], layout="II"):
    """A ring index and a number that is reserved."""

    _abstract = True

    index: int
    num: int = 0


class Iotlb(Request[Ack], layout="QQQBB6x"):
    # ``struct vhost_iotlb_msg``: 26 bytes of fields, 32 with the end padding, which may hold
    # anything.
    _abstract = True

    iova: int
    size: int
    user_address: int
    access: IotlbAccess
    type: IotlbType

    _convert: ClassVar[Converters] = {
        "access": known_bits(IotlbAccess, 3),
        "type": member(IotlbType),
    }

    def _check(self) -> None:
        if self.iova + self.size > 1 << 64:
            raise self._wrong("iova", self.iova, "the range ends beyond 64 bits")


class SharedObject(Request[ReplyT]):
    # The UUID's bytes travel in the order in which a UUID is written, in either byte order.
    _abstract = True

    uuid: UUID

    _sizes = (16,)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> Message:
        # Imported here: it costs a third of this package's import and few devices share objects.
        from uuid import UUID

        return cls._build((UUID(bytes=payload),))

    def _encode(self, wire: Wire) -> bytes:
        return self.uuid.bytes
