"""Addresses of Python buffers and buffers over addresses, without the buffer C API (absent from
the stable ABI of Python 3.10)."""

import ctypes


def address(view: memoryview) -> int:
    """The address of a contiguous memoryview's first byte, read-only ones included."""
    if not view.c_contiguous:
        raise ValueError("the buffer must be contiguous")
    flat = view.cast("B") if view.format != "B" or view.ndim != 1 else view
    if not flat.readonly:
        return ctypes.addressof(ctypes.c_char.from_buffer(flat))
    holder = ctypes.py_object(flat)
    buffer = _Buffer()
    if ctypes.pythonapi.PyObject_GetBuffer(holder, ctypes.byref(buffer), 0) != 0:
        raise ValueError("cannot read the buffer's address")
    try:
        return buffer.buf
    finally:
        ctypes.pythonapi.PyBuffer_Release(ctypes.byref(buffer))


def view(owner: object, pointer: int, nbytes: int) -> memoryview:
    """The bytes at `pointer` as a memoryview that keeps `owner` alive."""
    if nbytes == 0:
        return memoryview(b"")
    array = (ctypes.c_char * nbytes).from_address(pointer)
    array._owner = owner
    return memoryview(array).cast("B")


class _Buffer(ctypes.Structure):
    """Py_buffer of CPython."""

    _fields_ = [
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.POINTER(ctypes.c_ssize_t)),
        ("strides", ctypes.POINTER(ctypes.c_ssize_t)),
        ("suboffsets", ctypes.POINTER(ctypes.c_ssize_t)),
        ("internal", ctypes.c_void_p),
    ]
