"""Addresses of Python's buffers."""

import ctypes
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from typing_extensions import Buffer


class _PyBuffer(ctypes.Structure):
    buf: int | None
    len: int

    _fields_: ClassVar = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.c_void_p),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_void_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    ]


_get_buffer = ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.py_object, ctypes.c_void_p, ctypes.c_int)(
    ("PyObject_GetBuffer", ctypes.pythonapi)
)
_release_buffer = ctypes.PYFUNCTYPE(None, ctypes.c_void_p)(("PyBuffer_Release", ctypes.pythonapi))
_new_bytes = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.c_void_p, ctypes.c_ssize_t)(
    ("PyBytes_FromStringAndSize", ctypes.pythonapi)
)
_bytes_address = ctypes.PYFUNCTYPE(ctypes.c_size_t, ctypes.py_object)(
    ("PyBytes_AsString", ctypes.pythonapi)
)


class BufferAddress:
    """Address and size of a contiguous buffer, which cannot move inside the ``with`` block.

    Raises:
        BufferError, TypeError: as Python does for objects that are no (writable) buffers.
    """

    __slots__ = ("_buffer", "_data", "_writable")

    def __init__(self, data: "Buffer", writable: bool) -> None:
        self._data = data
        self._writable = int(writable)  # PyBUF_SIMPLE or PyBUF_WRITABLE
        self._buffer = _PyBuffer()

    def __enter__(self) -> tuple[int, int]:
        buffer = self._buffer
        _get_buffer(self._data, ctypes.addressof(buffer), self._writable)
        return buffer.buf or 0, buffer.len

    def __exit__(self, *_: object) -> None:
        _release_buffer(ctypes.addressof(self._buffer))


def new_bytes(length: int) -> tuple[bytes, int]:
    """A bytes object and its address; the caller must fill it before any other code sees it."""
    data: bytes = _new_bytes(None, length)
    return data, _bytes_address(data)


def address_of(data: bytes) -> int:
    """Address of a bytes object's content, which never moves."""
    address: int = _bytes_address(data)
    return address
