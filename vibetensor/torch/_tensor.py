"""Tensor methods written in Python: conversions, iteration, pickling, printing, backward."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor

_ops = _C._ops


def is_tensor(obj: object) -> bool:
    """True if `obj` is a Tensor."""
    return isinstance(obj, Tensor)


def check_tensor(function: str, argument: str, value: object) -> None:
    """Raises TypeError, which names the function and its argument, unless `value` is a Tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"{function}(): argument '{argument}' must be Tensor, not {builtins.type(value).__name__}"
        )


def written(result: Tensor, out: Tensor | None) -> Tensor:
    """``out=``: the result in a given tensor, which is resized if need be."""
    if out is None:
        return result
    if out.requires_grad or result.requires_grad:
        raise RuntimeError("out=... arguments don't support automatic differentiation")
    return out.resize_(tuple(result.shape)).copy_(result)


def is_floating_point(input: Tensor) -> bool:
    """True if the dtype is a floating type."""
    check_tensor("is_floating_point", "input", input)
    return input.is_floating_point()


def is_complex(input: Tensor) -> bool:
    """Always False: there are no complex dtypes."""
    check_tensor("is_complex", "input", input)
    return input.is_complex()


def numel(input: Tensor) -> int:
    """The number of elements."""
    check_tensor("numel", "input", input)
    return input.numel()


def is_nonzero(input: Tensor) -> bool:
    """The truth of a single-element tensor."""
    check_tensor("is_nonzero", "input", input)
    if input.numel() != 1:
        raise RuntimeError(
            f"Boolean value of Tensor with {'no' if not input.numel() else 'more than one'} value is ambiguous"
        )
    return bool(input)


def _method(function: Any, name: str | None = None) -> Any:
    """Attaches a function to Tensor under its own name."""
    setattr(Tensor, name or function.__name__, function)
    return function


# --- conversion


_DTYPE_OF_TYPE = {float: _C.float64, int: _C.int64, bool: _C.bool}


def _is_dtype(value: Any) -> bool:
    """Whether `value` names a dtype: one of ours, or Python's float, int or bool."""
    return isinstance(value, _C.dtype) or any(value is known for known in _DTYPE_OF_TYPE)


def _is_device(value: Any) -> bool:
    return isinstance(value, (str, int, _C.device))


def _wrong(function: str, argument: str, wanted: str, value: object) -> TypeError:
    """The error for an argument of another type; a class that was passed is named itself."""
    if isinstance(value, builtins.type):
        given = f"the class {value.__name__}"
    else:
        given = builtins.type(value).__name__
    return TypeError(f"{function}(): {argument} must be {wanted}, not {given}")


def _parse_to(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool, bool, Any]:
    """The forms of Tensor.to: (dtype), (device[, dtype]), (other), with keywords."""
    device, dtype = kwargs.pop("device", None), kwargs.pop("dtype", None)
    non_blocking, copy = kwargs.pop("non_blocking", False), kwargs.pop("copy", False)
    memory_format = kwargs.pop("memory_format", None)
    other = kwargs.pop("other", None)
    if kwargs:
        raise TypeError(f"to() got an unexpected keyword argument '{next(iter(kwargs))}'")
    rest = list(args)
    if rest:
        first = rest.pop(0)
        on_device = first is None or _is_device(first)
        if (
            device is not None
            or other is not None
            or (dtype is not None and (rest or not on_device))
        ):
            raise TypeError("to() got a device, dtype or tensor both by position and by name")
        if isinstance(first, Tensor):
            other = first
        elif _is_dtype(first):
            dtype = first
        elif on_device:
            device = first
            if rest:
                dtype = rest.pop(0)
        else:
            raise _wrong("to", "the first argument", "torch.device, torch.dtype or Tensor", first)
    if rest:
        non_blocking = rest.pop(0)
    if rest:
        copy = rest.pop(0)
    if rest:
        raise TypeError(f"to() takes at most 4 positional arguments, got {len(args)}")
    if other is not None:
        check_tensor("to", "other", other)
        device, dtype = other.device, other.dtype
    if device is not None and not _is_device(device):
        raise _wrong("to", "argument 'device'", "torch.device", device)
    if dtype is not None and not _is_dtype(dtype):
        raise _wrong("to", "argument 'dtype'", "torch.dtype", dtype)
    return device, _DTYPE_OF_TYPE.get(dtype, dtype), non_blocking, copy, memory_format


@_method
def to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Converts dtype and/or device: to(dtype), to(device, dtype=None), to(other).

    Returns self if nothing changes and `copy` is False. Differentiable.
    """
    if len(args) == 1 and not kwargs and isinstance(args[0], _C.dtype):
        return self if self.dtype is args[0] else _ops._to_dtype(self, args[0])
    device, dtype, non_blocking, copy, memory_format = _parse_to(args, dict(kwargs))
    result = self
    if device is not None:
        target = _C.device(device)
        if target.type != self.device.type or (target.index is not None and target != self.device):
            moved = _ops.empty_like(result, device=target)
            result = moved.copy_(result, non_blocking)
    if dtype is not None and result.dtype is not dtype:
        result = _ops._to_dtype(result, dtype)
    if memory_format is not None and memory_format is not _C.preserve_format:
        result = result.contiguous(memory_format=memory_format)
    return result.clone() if copy and result is self else result


def _cast(name: str, dtype: Any) -> None:
    def cast(self: Tensor, memory_format: Any = None) -> Tensor:
        result = self if self.dtype is dtype else _ops._to_dtype(self, dtype)
        if memory_format is None or memory_format is _C.preserve_format:
            return result
        if result is self and memory_format is _C.contiguous_format:
            return result  # nothing to convert: the tensor itself, whatever its strides
        return result.contiguous(memory_format=memory_format)

    cast.__name__ = name
    cast.__doc__ = f"This tensor as {dtype}; self if it is already."
    _method(cast)


for _name in ("half", "float", "double", "bfloat16", "short", "int", "long", "bool"):
    _cast(_name, getattr(_C, _name))
_cast("byte", _C.uint8)
_cast("char", _C.int8)


@_method
def cpu(self: Tensor, memory_format: Any = None) -> Tensor:
    """This tensor in CPU memory; self if it is there already."""
    return self.to("cpu") if memory_format is None else self.to("cpu", memory_format=memory_format)


@_method
def cuda(
    self: Tensor, device: Any = None, non_blocking: bool = False, memory_format: Any = None
) -> Tensor:
    """This tensor on a CUDA device. Raises RuntimeError where there is no CUDA backend."""
    if device is not None and not _is_device(device):
        raise _wrong("cuda", "argument 'device'", "torch.device", device)
    if device is not None and _C.device(device).type != "cuda":
        raise RuntimeError(f"cuda(): the device must be a CUDA device, got {device}")
    options = {} if memory_format is None else {"memory_format": memory_format}
    return self.to("cuda" if device is None else device, non_blocking=non_blocking, **options)


@_method
def pin_memory(self: Tensor, device: Any = None) -> Tensor:
    """A copy in page-locked host memory, from which copies to a device run asynchronously.

    Self if it is there already, or where no device could use it.
    """
    del device
    import vibetensor.torch as torch

    return _C._pin_memory(self) if torch.cuda.is_available() else self


@_method
def record_stream(self: Tensor, stream: Any) -> None:
    """Tells that work on `stream` uses this CUDA tensor: its memory waits for that work when freed.

    The stream may be one of another device. One made by other code, which tells no device, is taken
    to be on the tensor's.
    """
    from vibetensor.torch.cuda.streams import as_stream

    stream = as_stream(stream, self.device)
    _C._record_stream(self, stream.device_index, stream.cuda_stream)


@_method
def is_pinned(self: Tensor, device: Any = None) -> bool:
    """Whether this tensor is in page-locked host memory."""
    del device
    return _C._is_pinned(self)


@_method
def type(self: Tensor, dtype: Any = None, non_blocking: bool = False) -> Any:
    """The type's name ('torch.FloatTensor'), or this tensor converted to `dtype`."""
    names = {
        "bool": "Bool",
        "uint8": "Byte",
        "int8": "Char",
        "int16": "Short",
        "int32": "Int",
        "int64": "Long",
        "float16": "Half",
        "bfloat16": "BFloat16",
        "float32": "Float",
        "float64": "Double",
        "float8_e4m3fn": "Float8_e4m3fn",
        "float8_e5m2": "Float8_e5m2",
    }
    if dtype is None:
        prefix = "torch.cuda." if self.is_cuda else "torch."
        return f"{prefix}{names[str(self.dtype).removeprefix('torch.')]}Tensor"
    if isinstance(dtype, str):
        wanted = dtype.rsplit(".", 1)[-1].removesuffix("Tensor")
        dtype = next((getattr(_C, k) for k, v in names.items() if v == wanted), None)
        if dtype is None:
            raise ValueError(f"invalid type: '{wanted}'")
    elif not _is_dtype(dtype):
        raise _wrong("type", "argument 'dtype'", "torch.dtype or a type's name", dtype)
    return self.to(dtype, non_blocking=non_blocking)


@_method
def type_as(self: Tensor, other: Tensor) -> Tensor:
    """This tensor converted to the dtype of `other`."""
    check_tensor("type_as", "other", other)
    return self.to(other.dtype)


_NOT_IN_NUMPY = {
    _C.bfloat16: "BFloat16",
    _C.float8_e4m3fn: "Float8_e4m3fn",
    _C.float8_e5m2: "Float8_e5m2",
}


@_method
def numpy(self: Tensor, *, force: bool = False) -> Any:
    """A NumPy array that shares this tensor's memory.

    Raises RuntimeError for tensors that require grad (outside no_grad) and TypeError for CUDA, bfloat16 or 8-bit float
    tensors, unless `force` (which detaches, copies to the CPU and widens these dtypes to float32).
    """
    import numpy as np

    source = self
    if force:
        source = source.detach().cpu()
        if source.dtype in _NOT_IN_NUMPY:
            source = source.float()
    if source.requires_grad and _C.is_grad_enabled():
        raise RuntimeError(
            "Can't call numpy() on Tensor that requires grad. Use tensor.detach().numpy() instead."
        )
    if source.is_cuda:
        raise TypeError(
            f"can't convert {source.device} device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
        )
    if source.dtype in _NOT_IN_NUMPY:
        name = str(source.dtype).removeprefix("torch.")
        bits = "" if source.dtype is _C.bfloat16 else ", or .view(torch.uint8) for the bits"
        raise TypeError(
            f"Got unsupported ScalarType {_NOT_IN_NUMPY[source.dtype]}: NumPy has no {name}; "
            f"use .float() first{bits}"
        )
    if source.numel() == 0:
        return np.empty(tuple(source.shape), dtype=_numpy_dtype(source.dtype))
    return np.asarray(_ArrayView(source))


def _numpy_dtype(dtype: Any) -> str:
    name = str(dtype).removeprefix("torch.")
    return "bool" if name == "bool" else name


class _ArrayView:
    """Holds the tensor while NumPy reads its array interface; the array keeps this object alive."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._tensor.__array_interface__


@_method
def __array__(self: Tensor, dtype: Any = None, copy: bool | None = None) -> Any:
    array = self.numpy()
    if dtype is not None and array.dtype != dtype:
        if copy is False:
            raise ValueError("unable to avoid a copy while converting the dtype")
        return array.astype(dtype)
    return array.copy() if copy else array


@_method
def __array_wrap__(
    self: Tensor, array: Any, context: Any = None, return_scalar: bool = False
) -> Any:
    """What a NumPy function of this tensor gives: a tensor on the CPU over NumPy's result."""
    del context, return_scalar
    return _C.from_numpy(array)


def _cuda_array_interface(self: Tensor) -> dict[str, Any]:
    """The device memory as Numba, CuPy and others read it (version 3 of the protocol)."""
    if not self.is_cuda:
        raise AttributeError(
            f"__cuda_array_interface__ is for CUDA tensors, this one is on {self.device}"
        )
    if self.requires_grad or self.grad_fn is not None:
        raise RuntimeError(
            "Can't get __cuda_array_interface__ on Variable that requires grad. "
            "If gradients aren't required, use var.detach() to get Variable that doesn't require grad."
        )
    kinds = {
        _C.bool: "|b1",
        _C.uint8: "|u1",
        _C.int8: "|i1",
        _C.int16: "<i2",
        _C.int32: "<i4",
        _C.int64: "<i8",
        _C.float16: "<f2",
        _C.float32: "<f4",
        _C.float64: "<f8",
    }
    if self.dtype not in kinds:
        raise TypeError(f"__cuda_array_interface__ has no type for {self.dtype}; convert it first")
    size = self.element_size()
    contiguous = self.is_contiguous()
    return {
        "shape": tuple(self.shape),
        "typestr": kinds[self.dtype],
        "data": (self.data_ptr() if self.numel() else 0, False),
        "strides": None if contiguous else tuple(size * step for step in self.stride()),
        "version": 3,
        "stream": _current_stream_number(self.get_device()),
    }


def _current_stream_number(index: int) -> int | None:
    """None, which asks for no ordering, on a stream that is captured: readers may wait for it."""
    from vibetensor.torch.cuda import _backend

    native = _backend.required()
    handle = native.current_stream(index)
    return (
        None if native.stream_is_captured(index, handle) else handle or 1
    )  # 1: the default stream


_C.Tensor.__cuda_array_interface__ = property(_cuda_array_interface)


# --- Python protocols


@_method
def __iter__(self: Tensor) -> Iterator[Tensor]:
    if self.dim() == 0:
        raise TypeError("iteration over a 0-d tensor")
    return iter(self.unbind(0))


@_method
def __contains__(self: Tensor, element: Any) -> bool:
    if not isinstance(element, (Tensor, int, float)) and not hasattr(element, "dtype"):
        raise RuntimeError(
            f"Tensor.__contains__ only supports Tensor or scalar, but you passed in a {builtins.type(element)}."
        )
    return bool((self == element).any())


@_method
def __reversed__(self: Tensor) -> Tensor:
    return self if self.dim() == 0 else self.flip(tuple(range(self.dim())))


@_method
def __format__(self: Tensor, spec: str) -> str:
    if self.dim() == 0 and builtins.type(self) is Tensor:
        return self.item().__format__(spec)
    return object.__format__(self, spec)


@_method
def __repr__(self: Tensor, *, tensor_contents: str | None = None) -> str:
    from vibetensor.torch._tensor_str import tensor_str

    return tensor_str(self, tensor_contents)


_method(__repr__, "__str__")


@_method
def __copy__(self: Tensor) -> Tensor:
    """A leaf of this class over the same memory, with the same Python attributes and without .grad."""
    result = Tensor._make_subclass(self.__class__, self.detach(), self.requires_grad)
    result.__dict__.update(self.__dict__)
    return result


def copied_leaf(tensor: Tensor, memo: dict[Any, Any]) -> Tensor:
    """A leaf of the tensor's class with a copy of its memory, as the memo of deepcopy knows it.

    Without .grad and Python attributes. Tensors that share a storage still share it in the copy.
    """
    if not tensor.is_leaf:
        raise RuntimeError(
            "Only Tensors created explicitly by the user (graph leaves) support the deepcopy protocol at the moment."
        )
    if id(tensor) in memo:
        return memo[id(tensor)]
    with _no_grad():
        storages = memo.setdefault("vibetensor storages", {})
        key = tensor._storage_key()
        if key not in storages:
            whole = _ops.as_strided(
                tensor.detach(), (tensor._storage_nbytes() // tensor.itemsize,), (1,), 0
            )
            storages[key] = whole.clone()
        base = storages[key]
        data = (
            _ops.as_strided(base, tuple(tensor.shape), tensor.stride(), tensor.storage_offset())
            if base.dtype is tensor.dtype
            else tensor.detach().clone()
        )
    result = Tensor._make_subclass(tensor.__class__, data, tensor.requires_grad)
    memo[id(tensor)] = result
    return result


@_method
def __deepcopy__(self: Tensor, memo: dict[Any, Any]) -> Tensor:
    if id(self) in memo:
        return memo[id(self)]
    import copy

    result = copied_leaf(self, memo)
    if self.grad is not None:
        # By deepcopy, which keeps the original: the memo knows it by an address that the next
        # gradient would otherwise have.
        result.grad = copy.deepcopy(self.grad, memo)
    result.__dict__.update(copy.deepcopy(self.__dict__, memo))
    return result


@_method
def __reduce_ex__(self: Tensor, protocol: int) -> Any:
    del protocol
    data = self.detach()
    # The memory from the first element to the last, once, so that strides stay: transposed,
    # stepped and expanded tensors too.
    steps = zip(self.shape, self.stride())
    extent = 1 + sum((size - 1) * step for size, step in steps) if self.numel() else 0
    span = _ops.as_strided(data, (extent,), (1,), data.storage_offset()).cpu()
    return (
        _rebuild,
        (
            self.__class__,
            bytes(_C._as_buffer(span)),
            str(self.dtype).removeprefix("torch."),
            tuple(self.shape),
            self.requires_grad,
            str(self.device),
            self.stride(),
            self.__dict__,
        ),
    )


def _rebuild(
    cls: Any, data: bytes, dtype: str, shape: tuple[int, ...], requires_grad: bool,
    device: str = "cpu", strides: tuple[int, ...] | None = None,
    attributes: dict[str, Any] | None = None,
) -> Tensor:  # fmt: skip
    """Unpickles a tensor, onto the device it was on: raw bytes, no code.

    Without `strides`, as older pickles are, the bytes are those of a contiguous tensor.
    """
    element = getattr(_C, dtype)
    extent = shape if strides is None else (len(data) // element.itemsize,)
    made = _C._from_buffer(bytearray(data), element, extent).to(device)
    if strides is not None:
        made = _ops.as_strided(made, shape, strides, 0)
    result = Tensor._make_subclass(cls, made, requires_grad)
    result.__dict__.update(attributes or {})
    return result


@_method
def __setstate__(self: Tensor, state: dict[str, Any]) -> None:
    self.__dict__.update(state)


class _no_grad:
    def __enter__(self) -> None:
        self._before = _C.is_grad_enabled()
        _C._set_grad_enabled(False)

    def __exit__(self, *exc: object) -> None:
        _C._set_grad_enabled(self._before)


# --- autograd


@_method
def backward(
    self: Tensor,
    gradient: Tensor | None = None,
    retain_graph: bool | None = None,
    create_graph: bool = False,
    inputs: Any = None,
) -> None:
    """Computes gradients of this tensor and adds them to the leaves' .grad.

    `gradient` has this tensor's shape and may be left out for a single element. Saved values are
    freed unless `retain_graph` (default: `create_graph`).
    """
    if inputs is None and not create_graph:
        _C._backward((self,), (gradient,), bool(retain_graph), False, None)
        return
    from vibetensor.torch import autograd

    autograd.backward(self, gradient, retain_graph, create_graph, inputs=inputs)


@_method
def detach_(self: Tensor) -> Tensor:
    """Cuts this tensor from its history in place."""
    if self._is_view():
        raise RuntimeError(
            "Can't detach views in-place. Use detach() instead. If you are using DistributedDataParallel (DDP) for training, "
            "and gradient_as_bucket_view is set as True, gradients are views of DDP buckets."
        )
    self.data = self.detach()
    _C._forget_history(self)
    return self


# --- small conveniences


@_method
def new_tensor(
    self: Tensor, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False
) -> Tensor:
    """A new tensor from data with this tensor's dtype and device."""
    return _C.tensor(
        data, dtype=dtype or self.dtype, device=device or self.device, requires_grad=requires_grad
    )


@_method
def is_same_size(self: Tensor, other: Tensor) -> bool:
    """True if both have the same shape."""
    check_tensor("is_same_size", "other", other)
    return self.shape == other.shape


@_method
def get_device(self: Tensor) -> int:
    """The CUDA device index, -1 for CPU tensors."""
    return -1 if self.is_cpu else self.device.index


@_method
def share_memory_(self: Tensor) -> Tensor:
    """Accepted for compatibility: worker processes copy tensors through shared memory themselves."""
    return self


@_method
def is_shared(self: Tensor) -> bool:
    """Always False: storages are private to the process."""
    return False


@_method
def untyped_storage(self: Tensor) -> UntypedStorage:
    """The bytes behind this tensor."""
    return UntypedStorage(self)


class UntypedStorage:
    """A handle on a tensor's storage: its address and size."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor

    def data_ptr(self) -> int:
        """The address of the first byte."""
        return self._tensor.data_ptr() - self._tensor.storage_offset() * self._tensor.itemsize

    def nbytes(self) -> int:
        """The size in bytes."""
        return self._tensor._storage_nbytes()

    def __len__(self) -> int:
        return self.nbytes()

    @property
    def device(self) -> Any:
        return self._tensor.device


Tensor.__module__ = "vibetensor.torch"
Tensor.__array_priority__ = 1000
