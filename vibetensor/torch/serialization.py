"""`torch.save` and `torch.load` without pickle: loading a file never runs code.

The file is a Safetensors file. Its tensors are numbered; the metadata entry "vibetensor.tree" holds
the nesting around them as JSON (see `_Encoder`). Any Safetensors reader can list the tensors.
Saved and restored exactly: dict (any keys that can be saved), OrderedDict, list, tuple, set,
frozenset, str, bytes, int, float, complex, bool, None, torch.Size, torch.dtype, torch.device,
tensors and parameters (dtype, device, strides, requires_grad, and that two of them share memory),
NumPy arrays; NumPy scalars come back as Python numbers, other mappings as dict. Elements that no
saved tensor shows are not written: a tensor with such gaps, x[:, ::2] say, comes back contiguous.
Anything else is refused with its place in the object.
"""

from __future__ import annotations

import math
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import IO, Any

import vibetensor.torch as torch

_TREE = "vibetensor.tree"
_MAX_DEPTH = 200
_MAX_DECIMAL_BITS = 1024
# The field that holds a value which is written as a string.
_LEAVES = {"int": "hex", "float": "value", "bytes": "hex", "device": "name", "dtype": "name"}

_CONVERT = """\
{name} is a {kind}. Loading it can run any code that is inside, so vibetensor does not. Convert it \
once, where PyTorch and safetensors are installed and you trust the file:
    import torch, safetensors.torch
    state = torch.load("{name}", map_location="cpu", weights_only=True)
    state = state.get("model", state)  # or whichever entry is the state_dict
    safetensors.torch.save_file({{k: v.clone().contiguous() for k, v in state.items()}}, \
"{target}")
and load that with torch.load or vibetensor.safetensors.load_file."""


def save(
    obj: Any,
    f: str | os.PathLike[str] | IO[bytes],
    pickle_protocol: int | None = None,
    _use_new_zipfile_serialization: bool = True,
) -> None:
    """Saves `obj` to a path (atomically: the old file or the whole new one) or a binary file.

    `pickle_protocol` and `_use_new_zipfile_serialization` mean nothing here and are accepted for
    torch's signature. Raises TypeError, with the place, for what is not in the list of the module's
    docstring, such as a Module (save its `state_dict()`).
    """
    import json

    from vibetensor.io import safetensors

    encoder = _Encoder()
    tree = {"root": encoder.encode(obj, "obj", 0), "tensors": encoder.finish()}
    metadata = {"format": "vibetensor", _TREE: json.dumps(tree, allow_nan=False)}
    if isinstance(f, (str, os.PathLike)):
        safetensors.save_file(encoder.data, f, metadata)
    else:
        f.write(safetensors.save(encoder.data, metadata))


def load(
    f: str | os.PathLike[str] | IO[bytes],
    map_location: Any = None,
    *,
    weights_only: bool | None = None,
    mmap: bool | None = None,
) -> Any:
    """Loads what `save` wrote, or the dict of tensors of any other Safetensors file.

    Args:
        f: a path or a binary file.
        map_location: where tensors go: None (where they were saved), a device, a dict from saved to
            new device names, or a function of (tensor on the CPU, saved device name) that returns
            the tensor, or None for the default.
        weights_only: accepted for torch's signature; code is never loaded.
        mmap: True leaves tensors of the CPU in the file, which is mapped: they are read as they are
            first used and change with it, so the file must not be written in place meanwhile.

    Raises RuntimeError for a pickle or a torch `.pt` file, with the way to convert it, and where
    tensors were saved on a device that is not here and go nowhere else; `SafetensorError` classes for
    a damaged file: `InvalidTree` where its JSON tree is not one that `save` writes.
    """
    import json

    from vibetensor.io import safetensors

    if isinstance(f, (str, os.PathLike)):
        with open(f, "rb") as file:
            _refuse_pickle(file.read(9), f)
        with safetensors.safe_open(f) as opened:
            tensors = {name: opened.get_tensor(name) for name in opened.offset_keys()}
            metadata = opened.metadata()
    else:
        content = f.read()
        _refuse_pickle(content[:9], getattr(f, "name", None))
        tensors = safetensors.load(content)
        metadata = safetensors._native.parse_header(content)[1]
    place = _placer(map_location)
    if not mmap:
        place = _read(place)
    if not metadata or _TREE not in metadata:
        return {name: place(tensor, "cpu") for name, tensor in tensors.items()}
    try:
        tree = json.loads(metadata[_TREE])
    except (ValueError, RecursionError) as error:
        raise safetensors.InvalidTree(f"torch.load: {_TREE!r} is not JSON: {error}") from error
    if not isinstance(tree, dict) or not {"root", "tensors"} <= tree.keys():
        raise safetensors.InvalidTree(f'torch.load: {_TREE!r} has no "root" and "tensors"')
    return _Decoder(tree["tensors"], tensors, place).decode(tree["root"])


def _refuse_pickle(head: bytes, name: Any) -> None:
    if head.startswith(b"PK\x03\x04"):
        kind = "PyTorch .pt file (a zip with a pickle)"
    # The length of a Safetensors header may begin with the same two bytes; its "{" tells.
    elif head[:2] in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5") and head[8:9] != b"{":
        kind = "pickle"
    else:
        return
    shown = os.fspath(name) if isinstance(name, (str, os.PathLike)) else "model.pt"
    target = os.path.splitext(shown)[0] + ".safetensors"
    raise RuntimeError("torch.load: " + _CONVERT.format(name=shown, kind=kind, target=target))


def _placer(map_location: Any) -> Callable[[Any, str], Any]:
    def place(tensor: Any, saved: str) -> Any:
        if map_location is None:
            target = saved
        elif isinstance(map_location, Mapping):
            target = map_location.get(saved, saved)
        elif callable(map_location) and not isinstance(map_location, (str, torch.device)):
            result = map_location(tensor, saved)
            if result is not None:
                return result
            target = saved
        else:
            target = map_location
        if target == saved and not _is_there(saved):
            raise RuntimeError(
                f"torch.load: the file has tensors that were saved on {saved}, which is not here; "
                "pass map_location='cpu', or where else they are to go"
            )
        return tensor.to(target)

    return place


def _is_there(name: str) -> bool:
    try:
        torch.empty(0, device=name)
    except torch.OutOfMemoryError:
        return True
    except RuntimeError:
        return False
    return True


def _read(place: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
    """The same, in memory of its own where it would be the file's."""

    def read(tensor: Any, saved: str) -> Any:
        placed = place(tensor, saved)
        inside = isinstance(placed, torch.Tensor) and placed._storage_key() == tensor._storage_key()
        return placed.clone() if inside else placed

    return read


class _Encoder:
    """Turns an object into JSON values. A JSON object with the key "$" is something that JSON
    lacks: {"$": "tuple", "items": […]}, {"$": "dict", "items": [[key, value], …]},
    {"$": "tensor", "id": n}.

    Tensors are put aside in `data`; those that overlap in memory become windows on one saved run of
    elements, so that they share memory again when loaded.
    """

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self._tensors: list[Any] = []
        self._ids: dict[int, int] = {}
        self._open: set[int] = set()

    def encode(self, value: Any, where: str, depth: int) -> Any:
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is int:
            # Python reads and writes very long decimal numbers only where it is told to.
            short = value.bit_length() <= _MAX_DECIMAL_BITS
            return value if short else {"$": "int", "hex": hex(value)}
        if kind is float:
            finite = value == value and abs(value) != float("inf")
            return value if finite else {"$": "float", "value": repr(value)}
        if isinstance(value, torch.Tensor):
            return {"$": "tensor", "id": self._tensor_id(value)}
        if kind.__module__ == "numpy":
            return self._numpy(value, where, depth)
        if kind is bytes:
            return {"$": "bytes", "hex": value.hex()}
        if kind is complex:
            parts = [self.encode(part, where, depth) for part in (value.real, value.imag)]
            return {"$": "complex", "items": parts}
        if isinstance(value, torch.dtype):
            return {"$": "dtype", "name": str(value).rpartition(".")[2]}
        if isinstance(value, torch.device):
            return {"$": "device", "name": str(value)}
        return self._container(value, where, depth)

    def _numpy(self, value: Any, where: str, depth: int) -> Any:
        if hasattr(value, "__array_interface__") and value.ndim:
            tensor = torch.from_numpy(value.copy())
            return {"$": "ndarray", "id": self._tensor_id(tensor)}
        item = value.item()
        if type(item).__module__ != "builtins":
            raise TypeError(f"torch.save: {where} is a NumPy {value.dtype}, which cannot be saved")
        return self.encode(item, where, depth)

    def _container(self, value: Any, where: str, depth: int) -> Any:
        if depth > _MAX_DEPTH or id(value) in self._open:
            raise ValueError(f"torch.save: {where} contains itself or is nested too deeply")
        self._open.add(id(value))
        try:
            if isinstance(value, Mapping):
                return self._mapping(value, where, depth + 1)
            names = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset"}
            name = "Size" if isinstance(value, torch.Size) else names.get(type(value))
            if name is None:
                raise TypeError(self._refusal(value, where))
            items = [self.encode(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
            return items if name == "list" else {"$": name, "items": items}
        finally:
            self._open.discard(id(value))

    def _mapping(self, value: Mapping[Any, Any], where: str, depth: int) -> Any:
        ordered = isinstance(value, OrderedDict)
        if not ordered and "$" not in value and all(type(key) is str for key in value):
            return {k: self.encode(v, f"{where}[{k!r}]", depth) for k, v in value.items()}
        items = [
            [
                self.encode(k, f"key {_shown(k)} of {where}", depth),
                self.encode(v, f"{where}[{_shown(k)}]", depth),
            ]
            for k, v in value.items()
        ]
        node = {"$": "OrderedDict" if ordered else "dict", "items": items}
        if ordered and hasattr(value, "_metadata"):  # versions that Module.load_state_dict reads
            node["metadata"] = self.encode(value._metadata, where + "._metadata", depth)
        return node

    @staticmethod
    def _refusal(value: Any, where: str) -> str:
        advice = "convert it to dicts, lists, numbers, strings and tensors first"
        if hasattr(value, "state_dict"):
            advice = "save its state_dict()"
        elif hasattr(value, "__dict__"):
            advice += ", for example with vars() or dataclasses.asdict()"
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        return f"torch.save: {where} is a {name}; objects are not pickled: {advice}"

    def _tensor_id(self, tensor: Any) -> int:
        if id(tensor) not in self._ids:
            self._ids[id(tensor)] = len(self._tensors)
            self._tensors.append(tensor)  # also keeps the id from being reused
        return self._ids[id(tensor)]

    def finish(self) -> list[dict[str, Any]]:
        """Fills `data` and returns what each tensor id is: its data, window, device and role."""
        from vibetensor.io.safetensors import SharedStorage, extent

        places = {index: extent(tensor) for index, tensor in enumerate(self._tensors)}
        groups: list[list[int]] = []
        reached = ("", 0)
        for index in sorted(places, key=places.__getitem__):
            device, begin, end = places[index]
            if groups and reached[0] == device and begin < reached[1]:
                groups[-1].append(index)
            else:
                groups.append([index])
            reached = (device, max(end, reached[1] if reached[0] == device else 0))
        table: list[dict[str, Any]] = [{} for _ in self._tensors]
        for group in sorted(groups, key=min):
            key = str(len(self.data))
            first = self._tensors[group[0]].detach()
            begin, end = places[group[0]][1], max(places[index][2] for index in group)
            elements = (end - begin) // first.element_size()
            packed = tuple(first.stride()) == _packed_strides(first.shape)
            alone = len(group) == 1 and (packed or first.numel() < elements)
            if len({self._tensors[index].dtype for index in group}) > 1:
                raise SharedStorage(
                    "torch.save: tensors of different dtypes share memory; clone() one of them"
                )
            if alone:
                self.data[key] = first
            else:
                self.data[key] = first.as_strided((elements,), (1,), first.storage_offset())
            for index in group:
                tensor = self._tensors[index]
                entry: dict[str, Any] = {"data": key, "device": str(tensor.device)}
                if not alone:
                    offset = (places[index][1] - begin) // tensor.element_size()
                    entry["window"] = [list(tensor.shape), list(tensor.stride()), offset]
                if tensor.requires_grad:
                    entry["requires_grad"] = True
                if isinstance(tensor, torch.nn.Parameter):
                    entry["parameter"] = True
                table[index] = entry
        return table


def _packed_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor as it is loaded."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _shown(key: Any) -> str:
    try:
        return repr(key)
    except ValueError:  # an int too long for Python to print
        return f"(a long {type(key).__name__})"


class _Decoder:
    """The reverse of `_Encoder`. The file may hold anything: every step checks what it takes, and
    refuses it with `InvalidTree`."""

    def __init__(self, table: Any, data: dict[str, Any], place: Callable[..., Any]):
        self._entries = [self._checked(entry, data) for entry in _is(list, table, '"tensors"')]
        self._data = data
        self._place = place
        self._placed: dict[tuple[str, str], Any] = {}
        self._made: dict[int, Any] = {}

    @staticmethod
    def _checked(entry: Any, data: dict[str, Any]) -> dict[str, Any]:
        entry = _is(dict, entry, "a tensor's entry")
        if _is(str, entry.get("data"), "a tensor's data") not in data:
            raise _invalid(f"there is no data {entry['data']!r}")
        _device(_is(str, entry.get("device"), "a tensor's device"))
        for flag in ("requires_grad", "parameter"):
            _is(bool, entry.get(flag, False), flag)
        floating = data[entry["data"]].is_floating_point()
        if entry.get("requires_grad") and not floating:
            raise _invalid(f"a tensor of {data[entry['data']].dtype} cannot require gradients")
        if "window" in entry:
            _check_window(entry["window"], data[entry["data"]])
        return entry

    def decode(self, node: Any, depth: int = 0) -> Any:
        if depth > _MAX_DEPTH + 2:  # deeper than what `_Encoder` takes
            raise _invalid("it is nested too deeply")
        if isinstance(node, list):
            return [self.decode(item, depth + 1) for item in node]
        if not isinstance(node, dict):
            return node
        kind = node.get("$")
        if kind is None:
            return {key: self.decode(value, depth + 1) for key, value in node.items()}
        if kind in ("tensor", "ndarray"):
            index = _is(int, node.get("id"), "a tensor's id")
            if not 0 <= index < len(self._entries):
                raise _invalid(f"there is no tensor {index}; it lists {len(self._entries)}")
            if kind == "tensor":
                return self._tensor(index)
            return self._array(index)
        if kind in ("dict", "OrderedDict"):
            return self._mapping(node, depth)
        if kind in ("tuple", "set", "frozenset", "Size", "complex"):
            return self._container(kind, node, depth)
        return self._leaf(kind, node)

    def _mapping(self, node: dict[str, Any], depth: int) -> Any:
        pairs = []
        for pair in _is(list, node.get("items"), "the items of a mapping"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise _invalid(f"an item of a mapping is {pair!r:.60}, not a key and a value")
            key, value = self.decode(pair[0], depth + 1), self.decode(pair[1], depth + 1)
            _hashable(key, "a key")
            pairs.append((key, value))
        if node["$"] == "dict":
            return dict(pairs)
        result = OrderedDict(pairs)
        if "metadata" in node:
            result._metadata = self.decode(node["metadata"], depth + 1)  # type: ignore
        return result

    def _container(self, kind: str, node: dict[str, Any], depth: int) -> Any:
        items = _is(list, node.get("items"), f"the items of a {kind}")
        items = [self.decode(item, depth + 1) for item in items]
        if kind == "tuple":
            return tuple(items)
        if kind == "complex":
            if len(items) != 2:
                raise _invalid(f"a complex number has {len(items)} parts")
            parts = [_is(float, part, "a part of a complex number") for part in items]
            try:
                return complex(*parts)
            except OverflowError as error:
                raise _invalid(f"a part of a complex number is no float: {error}") from error
        if kind == "Size":
            return torch.Size([_is_extent(item, "an extent of a Size") for item in items])
        for item in items:
            _hashable(item, f"an element of a {kind}")
        return set(items) if kind == "set" else frozenset(items)

    def _leaf(self, kind: Any, node: dict[str, Any]) -> Any:
        field = _LEAVES.get(str(kind))
        if field is None:
            raise _invalid(f"it holds a {kind!r:.60}, which this version does not know")
        text = _is(str, node.get(field), f"the {field} of a {kind}")
        try:
            if kind == "float":
                return float(text)
            if kind == "int":
                return int(text, 16)
            if kind == "bytes":
                return bytes.fromhex(text)
            if kind == "device":
                return _device(text)
        except ValueError as error:
            raise _invalid(f"{text!r:.60} is no {kind}: {error}") from error
        dtype = getattr(torch, text, None)
        if not isinstance(dtype, torch.dtype):
            raise _invalid(f"there is no dtype {text!r:.60}")
        return dtype

    def _array(self, index: int) -> Any:
        data = self._data[self._entries[index]["data"]]
        try:
            return data.numpy().copy()
        except TypeError as error:
            raise _invalid(f"NumPy has no arrays of {data.dtype}") from error

    def _tensor(self, index: int) -> Any:
        if index not in self._made:
            entry = self._entries[index]
            source = (entry["data"], entry["device"])
            if source not in self._placed:
                self._placed[source] = self._place(self._data[entry["data"]], entry["device"])
            tensor = self._placed[source]
            if "window" in entry:
                shape, stride, offset = entry["window"]
                tensor = tensor.as_strided(shape, stride, tensor.storage_offset() + offset)
            if entry.get("parameter"):
                tensor = torch.nn.Parameter(tensor, entry.get("requires_grad", False))
            elif entry.get("requires_grad"):
                tensor = tensor.detach().requires_grad_()
            self._made[index] = tensor
        return self._made[index]


def _invalid(what: str) -> Exception:
    from vibetensor.io.safetensors import InvalidTree

    return InvalidTree(f"torch.load: the file's {_TREE!r} is not valid: {what}")


def _is(kind: type, value: Any, what: str) -> Any:
    """`value`, which must be of a JSON type (a number of either sort where `kind` is float)."""
    matches = isinstance(value, (int, float) if kind is float else kind)
    if not matches or (isinstance(value, bool) and kind is not bool):
        raise _invalid(f"{what} is {value!r:.60}, not a {kind.__name__}")
    return value


def _is_extent(value: Any, what: str) -> int:
    if not 0 <= _is(int, value, what) < 2**63:
        raise _invalid(f"{what} is {_shown(value):.60}")
    return value


def _device(name: str) -> Any:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise _invalid(f"{name!r:.60} is no device: {error}") from error


def _hashable(value: Any, what: str) -> None:
    try:
        hash(value)
    except TypeError as error:
        raise _invalid(f"{what} is a {type(value).__name__}") from error


def _check_window(window: Any, data: Any) -> None:
    """A window is (shape, stride, offset) in elements of its data, and lies inside of it."""
    if not isinstance(window, list) or len(window) != 3:
        raise _invalid(f"a window is {window!r:.60}, not shape, stride and offset")
    shape, stride = (_is(list, part, "a part of a window") for part in window[:2])
    if len(shape) != len(stride):
        raise _invalid(f"a window has {len(shape)} extents and {len(stride)} strides")
    for number in (*shape, *stride, window[2]):
        _is_extent(number, "a number of a window")
    if len(shape) > 64 or math.prod(shape) >= 2**63:
        raise _invalid(f"a window has the shape {shape!r:.60}")
    last = window[2] + sum((size - 1) * step for size, step in zip(shape, stride))
    if 0 not in shape and last >= data.numel():
        raise _invalid(f"a window ends at element {last} of {data.numel()}")


__all__ = ["load", "save"]
