"""Safetensors files: `save_file`, `load_file`, `safe_open`, and their errors.

Loading maps the file: a tensor is a window onto it, pages come in when they are first read, and
writing to the tensor stays in this process (copy-on-write). The tensors keep the mapping alive.
Saving streams to a temporary file beside the target, syncs it and renames it, so a failed or killed
save leaves the old file as it was. Both directions are byte-compatible with the `safetensors`
package.

Every broken rule is its own class deriving from `SafetensorError` (`HeaderTooLarge`, `DataOverlap`,
`DuplicateKey`, …); missing files and full disks are `OSError`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import vibetensor.torch as torch
from vibetensor import _C

_native = _C.safetensors

SafetensorError = _native.SafetensorError
HeaderTooSmall = _native.HeaderTooSmall
HeaderTooLarge = _native.HeaderTooLarge
InvalidHeaderLength = _native.InvalidHeaderLength
InvalidHeaderStart = _native.InvalidHeaderStart
InvalidHeaderUtf8 = _native.InvalidHeaderUtf8
InvalidHeaderJson = _native.InvalidHeaderJson
InvalidHeaderPadding = _native.InvalidHeaderPadding
DuplicateKey = _native.DuplicateKey
InvalidMetadata = _native.InvalidMetadata
InvalidTensorInfo = _native.InvalidTensorInfo
UnknownDtype = _native.UnknownDtype
ShapeOverflow = _native.ShapeOverflow
MisalignedSize = _native.MisalignedSize
InvalidOffsets = _native.InvalidOffsets
DataHole = _native.DataHole
DataOverlap = _native.DataOverlap
SizeMismatch = _native.SizeMismatch
IncompleteBuffer = _native.IncompleteBuffer
TrailingData = _native.TrailingData
TensorNotFound = _native.TensorNotFound
UnsupportedDtype = _native.UnsupportedDtype
SharedStorage = _native.SharedStorage
InvalidIndex = _native.InvalidIndex


class InvalidTree(SafetensorError):
    """The JSON tree that `torch.save` puts into a file's metadata is malformed."""


if TYPE_CHECKING:
    from vibetensor.torch import Tensor

_DTYPE_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "I16": "int16",
    "I32": "int32",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_CODES = {name: code for code, name in _DTYPE_NAMES.items()}


def save_file(
    tensors: Mapping[str, Tensor],
    filename: str | os.PathLike[str],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes `tensors` (name → tensor of any shape, dtype, device and layout) to `filename`.

    Non-contiguous tensors are written row-major. Two names may share one whole tensor (it is
    written twice); tensors that overlap in part raise `SharedStorage`: save the base, or clone. For
    a module with tied weights use `save_model`, which writes them once.

    Errors: `SafetensorError` classes for what cannot be written, `OSError` from the file system; in
    both cases a file that was there stays untouched.
    """
    _native.save(_path(filename), *_writable(tensors, metadata))


def save(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """The bytes that `save_file` would write."""
    return _native.serialize(*_writable(tensors, metadata))


def load_file(filename: str | os.PathLike[str], device: Any = "cpu") -> dict[str, Tensor]:
    """All tensors of `filename`, in file order. On a CPU they are windows onto the mapped file."""
    with safe_open(filename, device=device) as file:
        return {name: file.get_tensor(name) for name in file.offset_keys()}


def load(data: bytes | bytearray | memoryview, device: Any = "cpu") -> dict[str, Tensor]:
    """All tensors of a file given as bytes. They share one copy of `data`."""
    buffer = bytearray(data)
    start, _, entries = _native.parse_header(buffer)
    return {
        name: _tensor(buffer, start, name, code, shape, begin, end).to(device)
        for name, code, shape, begin, end in entries
    }


class safe_open:
    """A Safetensors file whose tensors are made when asked for.

    Args:
        filename: the file; it is checked against every rule of the format at once.
        framework: "vt" or "pt"; both give this package's tensors.
        device: where tensors go.

    Use it as a context manager. Tensors outlive it.
    """

    def __init__(
        self, filename: str | os.PathLike[str], framework: str = "vt", device: Any = "cpu"
    ):
        if framework not in ("vt", "pt"):
            raise ValueError(f"safe_open: framework must be 'vt' or 'pt', not {framework!r}")
        self._device = device
        try:
            self._buffer, header = _native.open_file(_path(filename))
        except SafetensorError as error:
            raise type(error)(f"'{os.fspath(filename)}': {error}") from None
        self._start, self._metadata, entries = header
        self._entries = {
            name: (code, shape, begin, end) for name, code, shape, begin, end in entries
        }

    def __enter__(self) -> safe_open:
        return self

    def __exit__(self, *_: object) -> None:
        self._buffer = None

    def keys(self) -> list[str]:
        """Names in alphabetical order."""
        return sorted(self._entries)

    def offset_keys(self) -> list[str]:
        """Names in the order of their bytes in the file."""
        return list(self._entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.keys())

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def metadata(self) -> dict[str, str] | None:
        """The `__metadata__` of the header, or None."""
        return self._metadata

    def _entry(self, name: str) -> tuple[str, list[int], int, int]:
        if name not in self._entries:
            raise TensorNotFound(f"no tensor {name!r} in the file; it has {len(self)} others")
        return self._entries[name]

    def _window(self, name: str) -> Tensor:
        """The tensor `name` on the CPU."""
        if self._buffer is None:
            raise ValueError("safe_open: the file is closed; take tensors inside the with block")
        return _tensor(self._buffer, self._start, name, *self._entry(name))

    def get_tensor(self, name: str) -> Tensor:
        """The tensor `name`. Raises `TensorNotFound`, or `UnsupportedDtype` (such as F8_E8M0)."""
        return self._window(name).to(self._device)

    def get_slice(self, name: str) -> TensorSlice:
        """A handle whose indexing reads only what it needs: `file.get_slice("w")[:, ::8]`."""
        return TensorSlice(self, name, *self._entry(name)[:2])


class TensorSlice:
    """A tensor of an open file before it is read; index it to get a tensor."""

    def __init__(self, file: safe_open, name: str, code: str, shape: list[int]):
        self._file, self._name, self._code, self._shape = file, name, code, shape

    def get_shape(self) -> list[int]:
        return list(self._shape)

    def get_dtype(self) -> str:
        """The dtype in the format's own code, such as "F32"."""
        return self._code

    def __getitem__(self, index: Any) -> Tensor:
        return self._file._window(self._name)[index].to(self._file._device)


def _tensor(
    buffer: Any, start: int, name: str, code: str, shape: list[int], begin: int, end: int
) -> Tensor:
    if code not in _DTYPE_NAMES:
        raise UnsupportedDtype(
            f"tensor {name!r} of shape {shape} has dtype {code}, which vibetensor has no tensor "
            f"for; supported: {', '.join(_DTYPE_NAMES)}"
        )
    dtype = getattr(torch, _DTYPE_NAMES[code])
    offset = start + begin
    if offset % dtype.itemsize:
        # Other writers may leave the header unpadded; kernels need aligned elements.
        buffer, offset = bytearray(memoryview(buffer)[offset : start + end]), 0
    return _C._from_buffer(buffer, dtype, shape, offset)


def _writable(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None
) -> tuple[list[tuple[str, str, list[int], Any]], dict[str, str] | None]:
    """What the native writer takes: names, codes, shapes, and bytes of contiguous CPU tensors."""
    for name, tensor in tensors.items():
        if not isinstance(name, str):
            raise TypeError(f"save_file: tensor names must be strings, got {name!r}")
        _check_text(name, "the name")
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"save_file: {name!r} is {type(tensor).__name__}, not a tensor")
    _refuse_partial_overlap(tensors)
    arguments = []
    for name, tensor in tensors.items():
        packed = tensor.detach().cpu().contiguous()
        code = _CODES.get(str(packed.dtype).rpartition(".")[2])
        if code is None:
            raise UnsupportedDtype(
                f"tensor {name!r} has dtype {packed.dtype}, unknown to the format"
            )
        arguments.append((name, code, list(packed.shape), _C._as_buffer(packed)))
    if metadata is None:
        return arguments, None
    for text in (*metadata, *metadata.values()):
        if isinstance(text, str):  # what is none is refused by the writer
            _check_text(text, "the metadata's")
    return arguments, dict(metadata)


def _path(filename: str | os.PathLike[str]) -> bytes:
    encoded = os.fsencode(filename)
    if b"\0" in encoded:
        raise ValueError(f"embedded null byte in the path {filename!r}")
    return encoded


def _check_text(text: str, what: str) -> None:
    """The format is UTF-8; a str may hold halves of characters that have no such form."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SafetensorError(f"save_file: {what} {text!r} is not Unicode text: {error}") from None


def extent(tensor: Tensor) -> tuple[str, int, int]:
    """Device and the address range [begin, end) that the elements of `tensor` lie in."""
    begin = tensor.data_ptr()
    if tensor.numel() == 0:
        return str(tensor.device), begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
    return str(tensor.device), begin, begin + (last + 1) * tensor.element_size()


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """True if both are the same window on the same memory."""
    return (
        extent(a) == extent(b)
        and a.dtype == b.dtype
        and a.shape == b.shape
        and a.stride() == b.stride()
    )


def _refuse_partial_overlap(tensors: Mapping[str, Tensor]) -> None:
    ranges = sorted((extent(tensor), name) for name, tensor in tensors.items() if tensor.numel())
    reached: tuple[str, int, int] | None = None
    holder = ""
    for place, name in ranges:
        if reached and place[0] == reached[0] and place[1] < reached[2]:
            if not same_tensor(tensors[holder], tensors[name]):
                raise SharedStorage(
                    f"tensors {holder!r} of shape {list(tensors[holder].shape)} and {name!r} of "
                    f"shape {list(tensors[name].shape)} overlap in memory; loading could not "
                    "restore that. Save one of them, or clone() the other"
                )
            continue
        reached, holder = place, name


from vibetensor.io.model_safetensors import load_model, save_model  # noqa: E402
from vibetensor.io.sharded_safetensors import load_sharded, save_sharded  # noqa: E402

__all__ = [
    "load",
    "load_file",
    "load_model",
    "load_sharded",
    "safe_open",
    "save",
    "save_file",
    "save_model",
    "save_sharded",
    "TensorSlice",
    "SafetensorError",
    "HeaderTooSmall",
    "HeaderTooLarge",
    "InvalidHeaderLength",
    "InvalidHeaderStart",
    "InvalidHeaderUtf8",
    "InvalidHeaderJson",
    "InvalidHeaderPadding",
    "DuplicateKey",
    "InvalidMetadata",
    "InvalidTensorInfo",
    "UnknownDtype",
    "ShapeOverflow",
    "MisalignedSize",
    "InvalidOffsets",
    "DataHole",
    "DataOverlap",
    "SizeMismatch",
    "IncompleteBuffer",
    "TrailingData",
    "TensorNotFound",
    "UnsupportedDtype",
    "SharedStorage",
    "InvalidIndex",
    "InvalidTree",
]
