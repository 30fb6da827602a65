"""Messages between the loader and a worker, with tensors in shared memory.

A message is a pickle whose tensors and large buffers lie beside it, 64-byte aligned, in one
anonymous memory file. The file has no name: it is made, written, and its descriptor sent over the
socket, so nothing stays behind when either side is killed at any point. The receiver maps it and
its tensors are views of the mapping, which lives exactly as long as they do. Small messages skip
the file and go through the socket whole.

Pickle is only ever used between a process and the workers it started.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import mmap
import os
import pickle
import socket
import struct
import weakref
from collections.abc import Iterator
from typing import Any

import vibetensor.torch as torch
from vibetensor import _C

_ALIGN = 64
# What goes through the socket whole. Small against a socket's buffer, so that a send after a
# check that the socket is writable does not block (see DataLoader's dispatch).
INLINE_BYTES = 16384
_HEAD = struct.Struct("<?QQQ")  # in a file?, bytes of buffer table, of pickle, of everything


def _anonymous_file(size: int) -> int:
    """A descriptor of a nameless file of ``size`` bytes in memory."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("vibetensor", os.MFD_CLOEXEC)
    else:
        import tempfile

        with tempfile.TemporaryFile() as file:  # unlinked from the start
            fd = os.dup(file.fileno())
    try:
        os.ftruncate(fd, size)
    except BaseException:
        os.close(fd)
        raise
    return fd


_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
)  # fmt: skip
_libc.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
_FAILED = ctypes.c_void_p(-1).value


def _map(fd: int, size: int) -> memoryview:
    """The first ``size`` bytes of a file, writable, for as long as anything refers to them.

    Python's own mapping would keep a descriptor open, and a program that keeps its batches would
    run out of them.
    """
    access = mmap.PROT_READ | mmap.PROT_WRITE
    address = _libc.mmap(None, size, access, mmap.MAP_SHARED, fd, 0)
    if address == _FAILED:
        code = ctypes.get_errno()
        raise OSError(code, f"cannot map {size} bytes of shared memory: {os.strerror(code)}")
    memory = (ctypes.c_ubyte * size).from_address(address)
    unmap = weakref.finalize(memory, _libc.munmap, address, size)
    unmap.atexit = False  # tensors may outlive the finalizers
    return memoryview(memory).cast("B")


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _name(dtype: Any) -> str:
    return str(dtype).rpartition(".")[2]


def _tensor_in(buffer: Any, offset: int, dtype: str, shape: Any) -> Any:
    """A tensor over bytes of ``buffer``, which it keeps alive."""
    return _C._from_buffer(buffer, getattr(torch, dtype), tuple(shape), offset)


class _Pickler(pickle.Pickler):
    """Takes tensors and large buffers out of the stream and assigns them places."""

    def __init__(self, stream: Any) -> None:
        super().__init__(stream, protocol=5, buffer_callback=self._take_buffer)
        self.tensors: list[tuple[Any, int]] = []
        self.buffers: list[tuple[memoryview, int]] = []
        self.size = 0
        # By id, with the object itself: once it is gone another one may have its id.
        self._placed: dict[int, tuple[Any, tuple[Any, ...]]] = {}

    def _place(self, nbytes: int) -> int:
        offset = _aligned(self.size)
        self.size = offset + nbytes
        return offset

    def persistent_id(self, obj: Any) -> Any:
        if type(obj) is not torch.Tensor:
            return None
        if id(obj) not in self._placed:
            if obj.requires_grad and not obj.is_leaf:
                raise RuntimeError(
                    "a tensor with a graph cannot be sent to another process: call detach() on "
                    f"it first (shape {tuple(obj.shape)}, {obj.dtype})"
                )
            tensor = obj.detach().cpu()
            offset = self._place(tensor.numel() * tensor.element_size())
            self.tensors.append((tensor, offset))
            placed = (offset, _name(tensor.dtype), tuple(tensor.shape), obj.requires_grad)
            self._placed[id(obj)] = (obj, placed)
        return self._placed[id(obj)][1]

    def _take_buffer(self, buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        self.buffers.append((view, self._place(view.nbytes)))
        return False  # out of band


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, memory: Any, base: int, buffers: list[memoryview]) -> None:
        super().__init__(stream, buffers=buffers)
        self._memory = memory
        self._base = base

    def persistent_load(self, placed: Any) -> Any:
        offset, dtype, shape, requires_grad = placed
        tensor = _tensor_in(self._memory, self._base + offset, dtype, shape)
        return tensor.requires_grad_() if requires_grad else tensor


def _no_descriptor_left() -> OSError:
    import resource

    limit, highest = resource.getrlimit(resource.RLIMIT_NOFILE)
    return OSError(
        errno.EMFILE,
        f"a batch came from a worker, but this process has all of the {limit} files open that it "
        "may have: close some, or raise the limit with `ulimit -n` or "
        f"resource.setrlimit(resource.RLIMIT_NOFILE, ...), to {highest} at most",
    )


class Channel:
    """One end of a socket pair between the loader and a worker."""

    def __init__(self, connection: Any) -> None:
        self.connection = connection

    def fileno(self) -> int:
        return self.connection.fileno()

    def close(self) -> None:
        self.connection.close()

    @contextlib.contextmanager
    def _socket(self) -> Iterator[socket.socket]:
        """The connection as a socket, over which descriptors can go."""
        end = socket.socket(fileno=self.fileno())
        try:
            yield end
        finally:
            end.detach()

    def send(self, message: Any) -> None:
        """Sends a message; BrokenPipeError or ConnectionResetError when the other end is gone."""
        stream = io.BytesIO()
        pickler = _Pickler(stream)
        pickler.dump(message)
        # Layout: table of buffers, pickle, then the memory that both point into.
        table = pickle.dumps([(view.nbytes, offset) for view, offset in pickler.buffers])
        body = stream.getvalue()
        base = _aligned(len(table) + len(body))
        total = base + pickler.size
        in_file = total > INLINE_BYTES
        fd = _anonymous_file(total) if in_file else -1
        try:
            memory: Any = _map(fd, total) if in_file else bytearray(total)
            memory[: len(table)] = table
            memory[len(table) : len(table) + len(body)] = body
            for view, offset in pickler.buffers:
                memory[base + offset : base + offset + view.nbytes] = view
            for tensor, offset in pickler.tensors:
                target = _tensor_in(memory, base + offset, _name(tensor.dtype), tensor.shape)
                target.copy_(tensor)
            head = _HEAD.pack(in_file, len(table), len(body), total)
            if in_file:
                self.connection.send_bytes(head)
                with self._socket() as end:
                    socket.send_fds(end, [b"f"], [fd])
            else:
                self.connection.send_bytes(head + bytes(memory))
        finally:
            if fd >= 0:
                os.close(fd)

    def receive(self) -> Any:
        """The next message; EOFError or a ConnectionError when the other end is gone, an OSError of
        EMFILE when this process may open no more files."""
        data = self.connection.recv_bytes()
        in_file, table_size, body_size, total = _HEAD.unpack_from(data)
        if in_file:
            with self._socket() as end:
                _, fds, flags, _ = socket.recv_fds(end, 1, 1)
            if not fds and flags & socket.MSG_CTRUNC:
                raise _no_descriptor_left()
            if not fds:
                raise EOFError("the sender died between a message and its memory")
            try:
                memory: Any = _map(fds[0], total)
            finally:
                os.close(fds[0])
        else:
            memory = bytearray(memoryview(data)[_HEAD.size :])
        view = memoryview(memory)
        base = _aligned(table_size + body_size)
        table = pickle.loads(view[:table_size])
        buffers = [view[base + offset : base + offset + size] for size, offset in table]
        stream = io.BytesIO(view[table_size : table_size + body_size])
        return _Unpickler(stream, memory, base, buffers).load()
