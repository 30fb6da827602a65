"""Streams and events, with torch's names and the `__cuda_stream__` protocol of cuda.core."""

from __future__ import annotations

import threading
from typing import Any

from vibetensor.torch.cuda import _backend


class Stream:
    """A queue of device work. Ops run on the current stream of their tensors' device.

    Args:
        device: Where the stream is; None is the current device.
        priority: 0 is normal, negative numbers are more urgent.

    A stream made elsewhere is taken with :class:`ExternalStream` or :func:`as_stream`.
    """

    __slots__ = ("_device", "_handle", "_owner")

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self._device = _backend.device_index(device)
        self._handle = _backend.required().pool_stream(self._device, priority)
        self._owner: Any = None

    @staticmethod
    def _of(device: int, handle: int, owner: Any = None) -> Stream:
        stream = object.__new__(Stream)
        stream._device, stream._handle, stream._owner = device, handle, owner
        return stream

    @property
    def device(self) -> Any:
        """The device this stream is on."""
        import vibetensor.torch as torch

        return torch.device("cuda", self._device)

    @property
    def device_index(self) -> int:
        """The index of the device this stream is on."""
        return self._device

    @property
    def cuda_stream(self) -> int:
        """The driver's handle, as a number (0: the default stream)."""
        return self._handle

    stream_id = cuda_stream

    @property
    def priority(self) -> int:
        """0 is normal, negative numbers are more urgent."""
        return _backend.required().stream_priority(self._device, self._handle)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        """The lowest and the highest priority of the current device."""
        return _backend.required().priority_range()

    def query(self) -> bool:
        """Whether all work submitted has been done."""
        return _backend.required().stream_query(self._device, self._handle)

    def synchronize(self) -> None:
        """Waits until all work submitted has been done."""
        _backend.required().stream_synchronize(self._device, self._handle)

    def wait_event(self, event: Event) -> None:
        """Makes work submitted from now on wait for `event`."""
        event.wait(self)

    def wait_stream(self, stream: Any) -> None:
        """Makes work submitted from now on wait for what `stream` has been given so far."""
        self.wait_event(as_stream(stream).record_event())

    def record_event(self, event: Event | None = None) -> Event:
        """Records `event` (or a new one) here and returns it."""
        event = Event() if event is None else event
        event.record(self)
        return event

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._handle)

    def __enter__(self) -> Stream:
        context = stream(self)
        context.__enter__()
        _entered.contexts.append(context)
        return self

    def __exit__(self, *error: object) -> None:
        _entered.contexts.pop().__exit__(*error)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Stream):
            return NotImplemented
        return (self._device, self._handle) == (other._device, other._handle)

    def __hash__(self) -> int:
        return hash((self._device, self._handle))

    def __repr__(self) -> str:
        return f"<torch.cuda.Stream device=cuda:{self._device} cuda_stream={self._handle:#x}>"


class _Entered(threading.local):
    """The streams entered by ``with stream:`` on this thread, as streams are current per thread."""

    def __init__(self) -> None:
        self.contexts: list[StreamContext] = []


_entered = _Entered()


class ExternalStream(Stream):
    """A stream made by other code, which must outlive this object or be given up with :meth:`release`.

    Args:
        stream_ptr: The driver's handle as a number.
        device: Where it is; None is the current device.
    """

    __slots__ = ()

    def __init__(self, stream_ptr: int, device: Any = None) -> None:
        self._device = _backend.device_index(device)
        self._handle = int(stream_ptr)
        self._owner = None

    def release(self) -> None:
        """Gives the stream up, before the code that made it destroys it.

        Waits for its work and gives back the memory cached for it. Tensors made on it must be gone by
        then, as their memory is reused in its order, and so must those of other streams that were
        told of it by :meth:`Tensor.record_stream`.
        """
        _backend.required().release_stream(self._device, self._handle)


def as_stream(stream: Any, device: Any = None) -> Stream:
    """`stream` as ours: a Stream, or anything with the ``__cuda_stream__`` protocol."""
    if isinstance(stream, Stream):
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        pair: Any = protocol() if callable(protocol) else protocol
        version, handle = pair
        if version != 0:
            raise RuntimeError(f"__cuda_stream__ version {version} is not understood; expected 0")
        return Stream._of(_backend.device_index(device), int(handle), stream)
    handle = getattr(stream, "cuda_stream", None)
    if handle is not None:
        return Stream._of(_backend.device_index(device), int(handle), stream)
    raise TypeError(f"expected a CUDA stream, got {type(stream).__name__}")


class Event:
    """A mark in a stream, to wait for or to time.

    Args:
        enable_timing: Keep the time at which the mark is passed.
        blocking: Waiting threads sleep instead of spinning.
        interprocess: Can be shared with other processes; excludes timing.
    """

    def __init__(
        self,
        enable_timing: bool = False,
        blocking: bool = False,
        interprocess: bool = False,
        external: bool = False,
    ) -> None:
        del external
        if interprocess and enable_timing:
            raise ValueError("an interprocess event cannot have timing")
        self._event = _backend.required().Event(enable_timing, blocking, interprocess)

    def record(self, stream: Any = None) -> None:
        """Marks the point that `stream` (default: the current one) has reached."""
        target = current_stream() if stream is None else as_stream(stream)
        self._event.record(target._device, target._handle)

    def wait(self, stream: Any = None) -> None:
        """Makes later work of `stream` (default: the current one) wait for this event."""
        target = current_stream() if stream is None else as_stream(stream)
        self._event.wait(target._device, target._handle)

    def query(self) -> bool:
        """Whether the mark has been passed; True if nothing was recorded."""
        return self._event.query()

    def synchronize(self) -> None:
        """Waits until the mark has been passed."""
        self._event.synchronize()

    def elapsed_time(self, end_event: Event) -> float:
        """Milliseconds from this event to `end_event`."""
        return self._event.elapsed_time(end_event._event)

    @property
    def cuda_event(self) -> int:
        """The driver's handle as a number; 0 before the first record."""
        return self._event.handle

    @property
    def device(self) -> Any:
        """The device of the stream it was recorded in, or None."""
        import vibetensor.torch as torch

        index = self._event.device
        return None if index < 0 else torch.device("cuda", index)

    def __repr__(self) -> str:
        handle = self.cuda_event
        return f"<torch.cuda.Event {handle:#x}>" if handle else "<torch.cuda.Event uninitialized>"


def current_stream(device: Any = None) -> Stream:
    """The calling thread's current stream of a device (default: the current device)."""
    index = _backend.device_index(device)
    return Stream._of(index, _backend.required().current_stream(index))


def default_stream(device: Any = None) -> Stream:
    """The default stream of a device."""
    return Stream._of(_backend.device_index(device), 0)


def set_stream(stream: Any) -> None:
    """Makes `stream` the current one of its device; `with torch.cuda.stream(s)` is better."""
    if stream is None:
        return
    stream = as_stream(stream)
    _backend.required().set_current_stream(stream._device, stream._handle)


class StreamContext:
    """Makes a stream, and its device, current inside a with block; None changes nothing."""

    def __init__(self, stream: Any) -> None:
        self.stream = None if stream is None else as_stream(stream)

    def __enter__(self) -> Stream | None:
        if self.stream is not None:
            native = _backend.required()
            self._old_device = native.current_device()
            self._old = native.current_stream(self.stream._device)
            if self._old_device != self.stream._device:
                native.set_device(self.stream._device)
            native.set_current_stream(self.stream._device, self.stream._handle)
        return self.stream

    def __exit__(self, *error: object) -> None:
        if self.stream is not None:
            native = _backend.required()
            native.set_current_stream(self.stream._device, self._old)
            if self._old_device != self.stream._device:
                native.set_device(self._old_device)


def stream(stream: Any) -> StreamContext:
    """``with torch.cuda.stream(s):`` runs the ops of the block on `s`."""
    return StreamContext(stream)
