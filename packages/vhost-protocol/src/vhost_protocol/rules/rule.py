"""Which message may be sent when, with what, and what answers it: one row for each request.

Everything that knows the protocol reads these rows: both endpoints, the tracer, the documentation's
table and the tests.  A rule that lives in an ``if`` of one endpoint is one that the other endpoint
and the tracer do not know.  So every rule is a column of a row.  ``checks.py`` says what a column
asks for; a rule that is more than a fact of its row is a function there, in the column ``also``.

Reading a row:

``message``       the value class; ``variants`` are other payloads under the same code
``answer``        when an answer comes: see Answer
``replies``       the classes an answer can have
``fds``           how many descriptors come along: see Fds; ``reply_fds`` for the answer
``needs``         protocol features that must be negotiated
``fds_need``      protocol features that must be negotiated to bring descriptors
``gpu_needs``     the same as ``needs``, of the GPU protocol
``virtio``        VIRTIO feature bit that must be negotiated with SET_FEATURES
``offered``       VIRTIO feature bit that the back-end must have offered in GET_FEATURES
``kept``          * VIRTIO feature bit that SET_FEATURES, once it was sent, must have set
``after_owner``   * front-ends send SET_OWNER first
``not_owned``     * not between SET_OWNER and RESET_OWNER
``not_with``      * protocol features that exclude the message
``reserved``      * fields that must be 0
``both_halves``   * field that holds a driver's and a device's half on a packed ring
``also``          functions for what no other column can say

A broken row is an error.  The columns with a * are not fatal when the peer breaks them, because
deployed peers do and mean no harm; the breach is reported beside the message and counted
(``Session.tolerated``), and our own end refuses to do the same.

``kept``: DPDK's virtio-user before 20.11 enables rings without having negotiated bit 30.  QEMU's
virtio-net enables them before SET_FEATURES, which breaks nothing: the bit has been offered.
``after_owner``: the specification gives SET_OWNER no place in the sequence.
``not_owned``: DPDK before 20.11 sends SET_OWNER again at each start of a port.
``not_with``: QEMU up to 10 sends the postcopy messages although CONFIGURE_MEM_SLOTS is negotiated.
``reserved``: DPDK and SPDK leave the last ring's state in GET_VRING_BASE's second field.
``both_halves``: DPDK gives a packed ring's base as the driver's half alone; both are meant.
"""

from collections.abc import Callable
from enum import Enum, IntEnum
from typing import Any, NamedTuple

from ..messages import replies as a
from ..messages.constants import GpuProtocolFeatures, ProtocolFeatures
from ..messages.message import Reply, Request
from .negotiated import Negotiated


class Answer(Enum):
    """When a request is answered."""

    #: With an Ack, if REPLY_ACK is negotiated and the request says NEED_REPLY.
    IF_ASKED = "if asked"
    #: With an Ack, if the request says NEED_REPLY, negotiated or not: front-ends wait for it.
    IF_FLAGGED = "if flagged"
    #: Always.
    ALWAYS = "always"
    #: Always once LOG_SHMFD is negotiated, else as IF_ASKED.
    WITH_LOG_SHMFD = "with LOG_SHMFD"
    #: With the mapped addresses between POSTCOPY_LISTEN and POSTCOPY_END, else as IF_ASKED.
    IN_POSTCOPY = "in postcopy, else if asked"
    #: Never: the protocol has no acknowledgement (GPU).
    NEVER = "never"


class Fds(Enum):
    """How many descriptors a message brings."""

    NONE = "0"
    ONE = "1"
    OPTIONAL = "0 or 1"
    UNLESS_NO_FD = "1 unless no_fd"
    PER_REGION = "1 a region"
    UNLESS_DISABLED = "1 unless 0 x 0"
    UNLESS_EMPTY = "1 unless size 0"
    UNLESS_ERROR = "0 or 1, 0 with an error"


class Violation(NamedTuple):
    """A broken rule.

    Attributes:
        field: what is wrong.
        value: what stood there.
        rule: what the specification asks for.
        tolerated: deployed peers do this and it does no harm; not an error when received.
        descriptors: it is about the descriptors passed.
    """

    field: str
    value: object
    rule: str
    tolerated: bool = False
    descriptors: bool = False


#: Says which rules a message breaks, sent now with so many descriptors.
Check = Callable[[Negotiated, Any, int], tuple[Violation, ...]]


class Rule(NamedTuple):
    """One row; see the head of this file."""

    code: IntEnum
    message: type[Request[Any]]
    answer: Answer = Answer.IF_ASKED
    replies: tuple[type[Reply], ...] = (a.Ack,)
    fds: Fds = Fds.NONE
    reply_fds: Fds = Fds.NONE
    needs: ProtocolFeatures = ProtocolFeatures(0)
    virtio: int | None = None
    offered: int | None = None
    kept: int | None = None
    after_owner: bool = False
    not_owned: bool = False
    not_with: ProtocolFeatures = ProtocolFeatures(0)
    reserved: tuple[str, ...] = ()
    both_halves: str | None = None
    variants: tuple[type[Request[Any]], ...] = ()
    gpu_needs: GpuProtocolFeatures = GpuProtocolFeatures(0)
    fds_need: ProtocolFeatures = ProtocolFeatures(0)
    also: tuple[Check, ...] = ()

    @property
    def name(self) -> str:
        """The specification's name of the request, without its prefix."""
        return self.code._name_  # what the property `name` returns, which takes five times as long

    @property
    def messages(self) -> tuple[type[Request[Any]], ...]:
        """Every class that this request's payload can be."""
        return (self.message, *self.variants)
