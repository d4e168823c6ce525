"""Every exception this package raises, sorted by whose fault it is.

``LocalProtocolError`` means the caller is about to break the protocol: nothing has been sent.
``RemoteProtocolError`` means the peer broke it: the connection is unusable from then on.
``OutOfResources`` means this process or machine lacks something: the peer did nothing wrong.
The rest are neither's fault: the peer left, was too slow, or said no.
"""

from __future__ import annotations

from typing import Self


class ProtocolError(Exception):
    """Base of every exception raised on purpose by this package.

    Attributes:
        request: name of the request concerned (``"SET_MEM_TABLE"``), or ``None``.
    """

    def __init__(self, message: str, *, request: str | None = None) -> None:
        super().__init__(message)
        self.request: str | None = request

    def __str__(self) -> str:
        text = super().__str__()
        return f"{self.request}: {text}" if self.request else text


class RuleError(ProtocolError):
    """A rule of the protocol is broken; the subclasses say by whom.

    Attributes:
        field: the part of the message that is wrong (``"flags"``, ``"fds"``, ``"index"``).
        value: what stood there.
        rule: what the specification asks for instead, in words.
        request: name of the request concerned, or ``None`` when it is not known.
    """

    def __init__(self, field: str, value: object, rule: str, *, request: str | None = None) -> None:
        where = f"{request}.{field}" if request else field
        super().__init__(f"{where} is {shorten(value)}: {rule}", request=request)
        self.field: str = field
        self.value: object = value
        self.rule: str = rule

    def __str__(self) -> str:
        return str(self.args[0])  # which names the request with the field

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), self.field, self.value, self.rule, self.request)

    def bare(self) -> Self:
        """The same facts without the traceback: what may be kept.

        An error that was raised holds every frame it went through, and all that those refer to.
        """
        return type(self)(self.field, self.value, self.rule, request=self.request)


class LocalProtocolError(RuleError):
    """We would break the protocol; nothing was sent and the connection is as it was."""


class RemoteProtocolError(RuleError):
    """The peer broke the protocol; the connection must be closed."""


class BadHeader(RemoteProtocolError):
    """Version, direction or reserved bits of a message header are wrong."""


class UnknownRequest(RemoteProtocolError):
    """The request code is not one of the specification's."""


class BadSize(RemoteProtocolError):
    """The payload size is not one the message can have; found before the payload is read."""


class BadPayload(RemoteProtocolError):
    """A field of a payload has a value that the specification excludes."""


class BadDescriptors(RemoteProtocolError):
    """File descriptors are missing, too many, or came with the wrong byte of a message."""


class NotAllowed(RemoteProtocolError):
    """The message is well formed, but not legal in this state of the connection."""


class UnexpectedReply(RemoteProtocolError):
    """A reply arrived that answers nothing, or something else than what was asked."""


class ConnectionClosed(ProtocolError):
    """The peer closed the connection.

    Attributes:
        partial: how many bytes of an unfinished message had been read (0 between messages).
    """

    def __init__(self, message: str, *, partial: int = 0, request: str | None = None) -> None:
        super().__init__(message, request=request)
        self.partial: int = partial


class Timeout(ProtocolError, TimeoutError):
    """The peer did not answer, or did not read, in the time given.

    The stream may stand in the middle of a message, so the connection cannot be used further.

    Attributes:
        seconds: the time that was allowed.
    """

    def __init__(self, seconds: float, *, request: str | None = None) -> None:
        super().__init__(f"no progress within {seconds:g} s", request=request)
        self.seconds: float = seconds

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.seconds,), {"request": self.request}


class RequestFailed(ProtocolError):
    """The peer understood the request and answered that it failed.

    Attributes:
        value: the non-zero u64 of the answer.
    """

    def __init__(self, request: str, value: int) -> None:
        super().__init__(f"the peer answered {value:#x} (0 is success)", request=request)
        self.value: int = value

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.request, self.value)


class OutOfResources(ProtocolError):
    """This process or machine ran out of descriptors, memory or buffers.

    Neither the peer's fault nor a bug; the stream may stand inside a message, so the connection
    cannot be used further.

    Attributes:
        errno: what the kernel said (``EMFILE``, ``ENOMEM``, ``ENOBUFS``, ...).
    """

    def __init__(self, message: str, errno: int, *, request: str | None = None) -> None:
        super().__init__(message, request=request)
        self.errno: int = errno

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.args[0], self.errno), {"request": self.request}


class DescriptorsLost(OutOfResources):
    """The kernel dropped passed descriptors: this process has reached its limit.

    Raised for a truncated ``SCM_RIGHTS`` message, which cannot be acted on.  What was received of
    it has been closed.
    """


def _rebuild(
    kind: type[RuleError], field: str, value: object, rule: str, request: str | None
) -> RuleError:
    return kind(field, value, rule, request=request)


def shorten(value: object) -> str:
    """Show a value in an error: hexadecimal for numbers, cut when it is long."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{int(value)}" if -1024 < value < 1024 else f"{int(value):#x}"
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
