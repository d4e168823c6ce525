"""What every message value is made of: an immutable slotted object with a wire layout.

A message class names its request, lists its fields as annotations and gives its layout as a
``struct`` string without byte order (``x`` is padding: zero when sent, ignored when received,
because C front-ends send what lies there).  The metaclass turns that into slots, a constructor that
checks every range, equality, a hash and a ``repr``.  It stands in for ``dataclasses``, whose import
and code generation for some ninety classes would cost three times the whole package's import.

Constructors raise ``LocalProtocolError``.  The codec calls the same checks for what it receives and
turns what they raise into ``BadPayload``: one rule, two culprits.
"""

import re
import sys
from collections.abc import Callable, Iterator
from enum import Enum, IntEnum
from struct import Struct
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar, dataclass_transform

from ..errors import LocalProtocolError

LITTLE = "<"
BIG = ">"
NATIVE = LITTLE if sys.byteorder == "little" else BIG

_LIMITS = {
    "B": (0, 0xFF),
    "H": (0, 0xFFFF),
    "I": (0, 0xFFFF_FFFF),
    "Q": (0, 0xFFFF_FFFF_FFFF_FFFF),
    "i": (-0x8000_0000, 0x7FFF_FFFF),
    "q": (-0x8000_0000_0000_0000, 0x7FFF_FFFF_FFFF_FFFF),
}
#: How numbers from the wire become fields, by field.
Converters = dict[str, Callable[[Any], Any]]

_ITEM = re.compile(r"(\d*)([a-zA-Z?])")


class Wire(NamedTuple):
    """What the meaning of bytes depends on besides the bytes.

    Attributes:
        order: ``"<"`` or ``">"``; messages are in the machine's native order.
        xen: XEN_MMAP is negotiated, so memory regions carry two more fields.
        postcopy: POSTCOPY_LISTEN was sent, so a short memory message acknowledges bases.
    """

    order: str = NATIVE
    xen: bool = False
    postcopy: bool = False


@dataclass_transform(frozen_default=True)
class MessageType(type):
    """Makes slotted immutable classes out of annotated fields and a layout."""

    _setters: tuple[Callable[[Any, Any], None], ...]

    def __new__(
        mcls,
        name: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        *,
        layout: str | None = None,
        code: IntEnum | None = None,
        **kwargs: Any,
    ) -> "MessageType":
        own = [
            field
            for field, kind in namespace.get("__annotations__", {}).items()
            if not field.startswith("_") and "ClassVar" not in str(kind)
        ]
        fields: tuple[str, ...] = ()
        defaults: dict[str, Any] = {}
        for base in bases:
            fields += getattr(base, "_fields", ())
            defaults.update(getattr(base, "_defaults", {}))
        fields += tuple(own)
        defaults.update({f: namespace.pop(f) for f in own if f in namespace})
        # Slots belong to the final classes alone: an abstract class only hands its fields down, so
        # that no message is an instance of another and ``isinstance`` can dispatch.
        abstract = namespace.pop("_abstract", False)
        namespace["__slots__"] = () if abstract else fields
        namespace["__match_args__"] = fields
        namespace["_fields"] = fields
        namespace["_defaults"] = defaults
        namespace["_code"] = code
        namespace["request_name"] = name if code is None else code.name
        cls = super().__new__(mcls, name, bases, namespace, **kwargs)
        if not abstract:
            cls._setters = tuple([cls.__dict__[f].__set__ for f in fields])
        if layout is not None:
            _attach_layout(cls, fields, layout)
        return cls


def _attach_layout(cls: type, fields: tuple[str, ...], layout: str) -> None:
    limits: list[tuple[str, int, int]] = []
    sizes: list[tuple[str, int]] = []
    names = iter(fields)
    for count, kind in _ITEM.findall(layout):
        if kind == "x":
            continue
        if kind == "s":
            sizes.append((next(names), int(count)))
            continue
        limits += [(next(names), *_LIMITS[kind]) for _ in range(int(count or 1))]
    little = Struct(LITTLE + layout)
    type.__setattr__(cls, "_limits", tuple(limits))
    type.__setattr__(cls, "_bytes", tuple(sizes))
    type.__setattr__(cls, "_structs", {LITTLE: little, BIG: Struct(BIG + layout)})
    if "_sizes" not in cls.__dict__:
        type.__setattr__(cls, "_sizes", (little.size,))


class Message(metaclass=MessageType):
    """A value that travels: immutable, compared by type and fields, hashable, picklable."""

    _abstract = True

    #: The request this is, or answers, if it is one alone.
    _code: ClassVar[IntEnum | None]
    #: The specification's name of the request that this is or answers; else the class's.
    request_name: ClassVar[str]
    _fields: ClassVar[tuple[str, ...]]
    _defaults: ClassVar[dict[str, Any]]
    _setters: ClassVar[tuple[Callable[[Any, Any], None], ...]]
    _limits: ClassVar[tuple[tuple[str, int, int], ...]] = ()
    _bytes: ClassVar[tuple[tuple[str, int], ...]] = ()
    _structs: ClassVar[dict[str, Struct]]
    #: Payload sizes the message can have; ``range`` for those with a variable part.
    _sizes: ClassVar[tuple[int, ...] | range]
    #: How a number from the wire becomes a field: an enum, ``bool``, ...
    _convert: ClassVar[Converters] = {}
    #: Fields that must never be shown: keys.
    _secret: ClassVar[frozenset[str]] = frozenset()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if kwargs or len(args) != len(self._fields):
            args = self._bind(args, kwargs)
        for (name, low, high), value in self._limited(args):
            if not low <= value <= high:
                raise LocalProtocolError(
                    name, value, f"must be {low} to {high:#x}", request=self.request_name
                )
        self._store(args)

    def _limited(self, args: tuple[Any, ...]) -> Iterator[tuple[tuple[str, int, int], Any]]:
        index = self._fields.index
        for limit in self._limits:
            yield limit, args[index(limit[0])]

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        name = type(self).__name__
        if len(args) > len(self._fields):
            raise TypeError(f"{name} takes {len(self._fields)} arguments, {len(args)} given")
        values = dict(self._defaults)
        values.update(zip(self._fields, args, strict=False))
        for key, value in kwargs.items():
            if key not in self._fields or key in self._fields[: len(args)]:
                raise TypeError(f"{name}: argument {key!r} is unknown or given twice")
            values[key] = value
        missing = [f for f in self._fields if f not in values]
        if missing:
            raise TypeError(f"{name}: missing {', '.join(missing)}")
        return tuple(values[f] for f in self._fields)

    def _store(self, values: tuple[Any, ...]) -> None:
        """Convert, set and check the fields; the one way into an object."""
        convert = self._convert
        if convert:
            converted = []
            for name, value in zip(self._fields, values, strict=True):
                if name in convert:
                    try:
                        value = convert[name](value)
                    except ValueError as error:
                        raise self._wrong(name, value, str(error)) from None
                converted.append(value)
            values = tuple(converted)
        for setter, value in zip(self._setters, values, strict=True):
            setter(self, value)
        for name, size in self._bytes:
            if len(getattr(self, name)) != size:
                raise self._wrong(name, getattr(self, name), f"must be {size} bytes")
        self._check()

    def _check(self) -> None:
        """Raise for values that fit their field and are wrong all the same."""

    @classmethod
    def _wrong(cls, field: str, value: object, rule: str) -> LocalProtocolError:
        return LocalProtocolError(field, value, rule, request=cls.request_name)

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot set {name!r}")

    def __delattr__(self, name: str) -> None:
        raise AttributeError(f"{type(self).__name__} is immutable: cannot delete {name!r}")

    def _values(self) -> tuple[Any, ...]:
        return tuple([getattr(self, f) for f in self._fields])

    def __eq__(self, other: object) -> bool:
        if type(self) is not type(other):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._values()

    def __repr__(self) -> str:
        shown = ", ".join(f"{f}={self._show(f)}" for f in self._fields)
        return f"{type(self).__name__}({shown})"

    def _show(self, field: str) -> str:
        value = getattr(self, field)
        if field in self._secret:
            return f"<{len(value)} secret bytes>"
        return show(value)

    @classmethod
    def _decode(cls, payload: bytes, wire: Wire) -> "Message":
        """Read a payload whose size is one of ``_sizes``; raises LocalProtocolError on values."""
        return cls._build(cls._structs[wire.order].unpack(payload))

    @classmethod
    def _build(cls, values: tuple[Any, ...]) -> "Message":
        self = object.__new__(cls)
        self._store(values)
        return self

    def _encode(self, wire: Wire) -> bytes:
        return self._structs[wire.order].pack(*self._values())


def show(value: object) -> str:
    """Show a field so that a person can read it: big numbers in hexadecimal, long data cut."""
    if isinstance(value, int) and not isinstance(value, bool):
        if isinstance(value, Enum):
            return value.name or "0"
        return str(value) if -4096 < value < 4096 else f"{value:#x}"
    if isinstance(value, (bytes, bytearray)):
        text = value[:32].hex()
        return f"<{len(value)} bytes {text}{'...' if len(value) > 32 else ''}>"
    if isinstance(value, tuple):
        return "[" + ", ".join(show(item) for item in value) + "]"
    return repr(value)


class Reply(Message):
    """An answer to a request."""

    _abstract = True


ReplyT = TypeVar("ReplyT", bound=Reply, covariant=True)


class Request(Message, Generic[ReplyT]):
    """A message that starts an exchange; its parameter is the kind of answer it can get."""

    _abstract = True


def to_bool(value: int) -> bool:
    """Read a field that the specification gives two values."""
    if value not in (0, 1):
        raise ValueError("must be 0 or 1")
    return bool(value)


def known_bits(flags: type[Any], mask: int) -> Callable[[int], Any]:
    """Make a converter to ``flags`` that refuses reserved bits."""

    def convert(value: int) -> Any:
        if value & ~mask:
            raise ValueError(f"reserved bits must be zero (known bits: {mask:#x})")
        return flags(value)

    return convert


def member(kind: type[Any]) -> Callable[[int], Any]:
    """Make a converter to an enum that says which values there are."""

    def convert(value: int) -> Any:
        try:
            return kind(value)
        except ValueError:
            known = ", ".join(f"{int(m)} ({m.name})" for m in kind)
            raise ValueError(f"must be one of {known}") from None

    return convert
