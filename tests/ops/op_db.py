"""torch's own operator samples (op_db) carried over to vibetensor, and how results are compared."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

import vibetensor.torch as vt

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

DTYPES = ("float32", "float64", "int64", "bool", "bfloat16")
# Kernels are written for all dtypes at once: of these, each operator is called with one, its turn
# decided by its name, on a few samples.
MORE_DTYPES = ("float16", "uint8", "int8", "int16", "int32")
SAMPLES_OF_MORE = 3
# Absolute and relative, by the dtype of the result: a few roundings of its type.
TOLERANCE = {
    "float64": (1e-8, 1e-8),
    "float32": (2e-5, 2e-5),
    "float16": (4e-3, 4e-3),
    "bfloat16": (3e-2, 3e-2),
}
SAMPLES_PER_CASE = 14
LARGEST_SAMPLE = 200_000

# What these return is random or uninitialised: dtype, shape and layout are compared, not values.
RANDOM = {
    "bernoulli", "cauchy", "empty", "empty_like", "empty_permuted", "empty_strided",
    "exponential", "geometric", "log_normal", "multinomial", "new_empty", "new_empty_strided",
    "normal", "rand_like", "randint", "randint_like", "randn", "randn_like", "resize_",
    "resize_as_", "uniform", "nn.functional.dropout", "nn.functional.dropout2d",
    "nn.functional.alpha_dropout", "nn.functional.feature_alpha_dropout", "nn.functional.dropout3d",
    "nn.functional.rrelu", "nn.functional.gumbel_softmax",
}  # fmt: skip
# op_db names these after the op they test in place.
IN_PLACE_BY_NAME = {"cauchy", "exponential", "geometric", "log_normal", "uniform"}


class Untranslatable(Exception):
    """A sample uses something that vibetensor does not have: a dtype, a layout, a Python callable."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One operator of op_db and the same callable in both libraries."""

    info: Any
    path: str

    @property
    def name(self) -> str:
        variant = self.info.variant_test_name
        return f"{self.info.name}.{variant}" if variant else self.info.name

    def is_random(self, sample: Any) -> bool:
        """Whether the result of the sample depends on random numbers or uninitialised memory."""
        if self.info.name in RANDOM:
            return True
        if self.info.name == "nn.functional.scaled_dot_product_attention":
            return sample.kwargs.get("dropout_p", 0.0) > 0
        if self.info.name == "nn.functional.multi_head_attention_forward":
            return sample.args[9] > 0 and sample.kwargs["training"]
        return False

    def callable(self, library: Any) -> Callable[..., Any]:
        return _resolve(library, self.path)


def _walk(library: Any, path: str) -> Any:
    return functools.reduce(
        lambda found, name: getattr(found, name, None), path.split("."), library
    )


def _resolve(library: Any, path: str) -> Any:
    found = _walk(library, path)
    if isinstance(_walk(torch, path), property) or not callable(_walk(torch, path)):
        return lambda self: getattr(self, path.removeprefix("Tensor."))
    return found


def _path_of(info: Any) -> str | None:
    """Where the operator lives, the same path in both libraries; None if vibetensor lacks it."""
    name = info.name + "_" if info.name in IN_PLACE_BY_NAME else info.name
    if info.name == "normal" and info.variant_test_name == "in_place":
        name = "normal_"
    for path in (name, f"Tensor.{name}"):
        theirs, ours = _walk(torch, path), _walk(vt, path)
        is_function = callable(theirs) and not isinstance(theirs, (torch.dtype, type))
        if path.startswith("Tensor.") and theirs is not None:
            is_function = True  # properties such as T
        if is_function:
            if ours is None and path == name:
                continue  # a method there, perhaps a function only in torch
            return path if ours is not None else None
    return None


def cases() -> list[Case]:
    """Every operator of op_db that vibetensor has, in op_db's order."""
    found = ((info, _path_of(info)) for info in op_db)
    return [Case(info, path) for info, path in found if path is not None]


# --- samples


def _seed() -> None:
    torch.manual_seed(20)
    random.seed(20)
    np.random.seed(20)


def _numel(value: Any) -> int:
    if isinstance(value, torch.Tensor):
        return value.numel()
    if isinstance(value, (list, tuple)):
        return sum(_numel(v) for v in value)
    if isinstance(value, dict):
        return sum(_numel(v) for v in value.values())
    return 0


def _spread(items: list[Any], count: int) -> list[tuple[int, Any]]:
    """At most `count` items with their positions, evenly over the list."""
    if len(items) <= count:
        return list(enumerate(items))
    picks = [round(i * (len(items) - 1) / (count - 1)) for i in range(count)]
    return [(i, items[i]) for i in dict.fromkeys(picks)]


def its_other_dtype(case: Case) -> list[str]:
    """One of MORE_DTYPES that the operator takes, the same in every run; or none."""
    taken = [d for d in MORE_DTYPES if getattr(torch, d) in case.info.dtypes]
    return taken and [taken[zlib.crc32(case.name.encode()) % len(taken)]]


def samples(
    case: Case, dtype: str, requires_grad: bool = False, count: int = SAMPLES_PER_CASE
) -> list[tuple[int, Any]]:
    """Numbered samples; every second one of float64 is not contiguous."""
    _seed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = itertools.islice(
            case.info.sample_inputs("cpu", getattr(torch, dtype), requires_grad=requires_grad), 400
        )
        small = [s for s in made if _numel((s.input, s.args, s.kwargs)) <= LARGEST_SAMPLE]
        picked = _spread(small, count)
        if dtype != "float64":
            return picked
        return [(n, s.noncontiguous() if i % 2 else s) for i, (n, s) in enumerate(picked)]


def error_samples(case: Case) -> Iterator[tuple[int, Any]]:
    """The operator's own wrong calls, numbered."""
    if case.info.error_inputs_func is None:
        return
    _seed()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield from enumerate(case.info.error_inputs("cpu"))


# --- conversion


class Translator:
    """Copies a sample's arguments for both libraries; each tensor once, so aliases stay aliases."""

    def __init__(self, grad: bool = False) -> None:
        self.grad = grad
        self._made: dict[int, tuple[Any, Any]] = {}
        self.theirs: list[Any] = []
        self.ours: list[Any] = []

    def tensor(self, source: Any) -> tuple[Any, Any]:
        if id(source) not in self._made:
            self._made[id(source)] = self._copy(source)
        return self._made[id(source)]

    def _copy(self, source: Any) -> tuple[Any, Any]:
        if source.layout is not torch.strided or source.is_quantized:
            raise Untranslatable(str(source.layout))
        if source.dim() > 64:
            raise Untranslatable("a tensor has at most 64 dimensions")
        name = str(source.dtype).removeprefix("torch.")
        if not hasattr(vt, name) or source.device.type != "cpu":
            raise Untranslatable(f"{name} on {source.device}")
        whole = source.detach()
        span = 1 + sum((n - 1) * s for n, s in zip(source.shape, source.stride()))
        flat = whole.as_strided((span if source.numel() else 0,), (1,)).clone()
        mine = vt.tensor(vt.from_dlpack(flat.clone()))
        theirs = flat.as_strided(tuple(source.shape), source.stride(), 0)
        ours = mine.as_strided(tuple(source.shape), source.stride(), 0)
        if self.grad and source.requires_grad:
            theirs, ours = theirs.detach().requires_grad_(), ours.detach().requires_grad_()
            self.theirs.append(theirs)
            self.ours.append(ours)
        return theirs, ours

    def __call__(self, value: Any) -> tuple[Any, Any]:
        """The value for torch and for vibetensor."""
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, torch.Size):
            return value, vt.Size(value)
        if isinstance(value, (list, tuple)):
            pairs = [self(v) for v in value]
            return type(value)(p[0] for p in pairs), type(value)(p[1] for p in pairs)
        if isinstance(value, dict):
            pairs_of = {k: self(v) for k, v in value.items()}
            return {k: p[0] for k, p in pairs_of.items()}, {k: p[1] for k, p in pairs_of.items()}
        if isinstance(value, slice):
            parts = [self(v) for v in (value.start, value.stop, value.step)]
            return value, slice(*(p[1] for p in parts))
        if isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
            name = str(value).removeprefix("torch.")
            if not hasattr(vt, name):
                raise Untranslatable(name)
            return value, getattr(vt, name)
        if isinstance(value, torch.device):
            return value, vt.get_default_device() if str(value) == "cpu" else vt.device(str(value))
        if dataclasses.is_dataclass(value) and hasattr(vt.nn, type(value).__name__):
            fields = {f.name: self(getattr(value, f.name))[1] for f in dataclasses.fields(value)}
            return value, getattr(vt.nn, type(value).__name__)(**fields)
        if isinstance(value, (complex, torch.Generator)) or callable(value):
            raise Untranslatable(type(value).__name__)
        return value, value


# --- comparison


def leaves(result: Any) -> list[Any]:
    """The tensors and numbers of a result, in order."""
    if isinstance(result, (tuple, list)) and not isinstance(result, (torch.Size, vt.Size)):
        return [leaf for item in result for leaf in leaves(item)]
    return [result]


def array(value: Any) -> np.ndarray:
    """A tensor of either library as float64 (or exact int64) NumPy values."""
    value = value.detach().cpu()
    if isinstance(value, torch.Tensor):
        value = value.resolve_neg()
        if value._is_zerotensor():
            value = value + 0
    if value.is_floating_point():
        return value.double().numpy()
    return value.numpy()


def compare(ours: Any, theirs: Any, scale: float = 1, values: bool = True) -> None:
    """Same dtype, shape and values within tolerance of the dtype."""
    if not isinstance(theirs, torch.Tensor):
        assert not isinstance(ours, vt.Tensor), f"{ours!r} is a tensor, torch gives {theirs!r}"
        if isinstance(theirs, float):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
        else:
            assert ours == theirs
        return
    assert isinstance(ours, vt.Tensor), f"{type(ours)} instead of a tensor"
    assert str(ours.dtype) == str(theirs.dtype), f"{ours.dtype}, torch has {theirs.dtype}"
    assert tuple(ours.shape) == tuple(theirs.shape), f"{ours.shape}, torch has {theirs.shape}"
    if not values:
        return
    atol, rtol = TOLERANCE.get(str(theirs.dtype).removeprefix("torch."), (0.0, 0.0))
    mine, expected = array(ours), array(theirs)
    np.testing.assert_allclose(mine, expected, atol=atol * scale, rtol=rtol * scale, equal_nan=True)


_POSITIONAL = {
    "argsort": ("dim", "descending"),
    "kthvalue": ("k", "dim", "keepdim"),
    "sort": ("dim", "descending"),
    "topk": ("k", "dim", "largest", "sorted"),
}


def same_order(case: Case, sample: Any, ours: list[Any], theirs: list[Any]) -> None:
    """Makes indices of equal elements comparable: replaces them by the elements they name.

    Which of several equal elements an index names is not defined for these operators.
    """
    if case.info.name not in _POSITIONAL or sample.input.dim() == 0 or sample.kwargs.get("stable"):
        return
    for library, results in ((vt, ours), (torch, theirs)):
        at = 0 if case.info.name == "argsort" else 1
        given = dict(zip(_POSITIONAL[case.info.name], sample.args)) | sample.kwargs
        dim, index = given.get("dim", -1), results[at]
        if case.info.name == "kthvalue" and not given.get("keepdim", False):
            index = index.unsqueeze(dim)
        values = Translator().tensor(sample.input)[0 if library is torch else 1]
        results[at] = values.gather(dim, index)


def _storage(value: Any) -> int:
    return value.untyped_storage().data_ptr()


def compare_views(ours: Any, theirs: Any, my_inputs: list[Any], their_inputs: list[Any]) -> None:
    """Where torch returns a view of an input so do we, with its strides and offset."""
    if not isinstance(theirs, torch.Tensor) or theirs.numel() == 0:
        return
    for mine, its in zip(my_inputs, their_inputs):
        shared = _storage(its) == _storage(theirs)
        assert shared == (_storage(mine) == _storage(ours)), (
            f"{'a view' if shared else 'a copy'} in torch"
        )
        if shared:
            long = [i for i, n in enumerate(theirs.shape) if n > 1]
            mine_at = ([ours.stride()[i] for i in long], ours.storage_offset())
            its_at = ([theirs.stride()[i] for i in long], theirs.storage_offset())
            assert mine_at == its_at, f"strides and offset {mine_at}, torch has {its_at}"


def tensors_in(value: Any, kind: Any) -> list[Any]:
    """Every tensor of a library inside nested arguments."""
    if isinstance(value, kind):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [t for item in value for t in tensors_in(item, kind)]
    return []
