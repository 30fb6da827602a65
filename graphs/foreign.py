"""Functions from outside as ops of a captured step: kernels that others launch on our stream (Triton,
CuPy, plugins), or any host function on the CPU, with declared reads and writes.

Recorded, a call is one opaque op of the tape, `_foreign`. On the CPU a replay calls the function again;
on a CUDA device it is called once, as the step is lowered, and what it launches becomes part of the
graph.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs.structure import flatten, unflatten

NAME = "_foreign"  # of the op

_Function = TypeVar("_Function", bound=Callable[..., Any])


def foreign(
    function: Callable[..., Any],
    *args: Any,
    writes: Sequence[Any],
    reads: Sequence[Any] | None = None,
    **kwargs: Any,
) -> None:
    """Calls ``function(*args, **kwargs)``, which works on the tensors among its arguments by means
    that are not ours: kernels of Triton or CuPy, a library, NumPy.

    Eagerly it just calls. While a step is captured the call is one op on the tape. On tensors of
    the CPU every replay calls the function, with tensors where the replay has them. On a CUDA device
    it is called once, as the step becomes a graph: it launches on ``torch.cuda.current_stream()``,
    which is being captured then, may allocate tensors (from the step's pool), and cannot wait for
    the device or read values.

    args, kwargs: what the function gets: tensors, also in tuples, lists and dicts, and constants,
    which every replay has as they were. All tensors it uses are among them, on one device.

    writes: those of the tensors that it changes, at least one. It may read them too.

    reads: those that it only reads; None for all the others. What it does besides is not seen: a
    call whose writes nobody reads may be left out, as any op.

    Returns None, whatever the function returns: results go into tensors that it is given.

    Raises ValueError where the declaration does not fit the arguments, RuntimeError for a tensor
    that requires grad while gradients are recorded (call it in ``autograd.Function``), and what the
    function raises.
    """
    # One name for each tensor: the same one may be given several times.
    leaves, spec = flatten((args, kwargs))
    given = _Tensors(leaf for leaf in leaves if isinstance(leaf, vt.Tensor))
    name = _name(function)
    changed = _declared(name, given, writes, "writes")
    if reads is None:
        read = _Tensors(t for t in given if t not in changed)
    else:
        read = _declared(name, given, reads, "reads")
        for tensor in given:
            if tensor not in changed and tensor not in read:
                raise ValueError(
                    f"foreign({name}): the argument of {tuple(tensor.shape)} {tensor.dtype} is "
                    "neither in reads nor in writes"
                )
        read = _Tensors(t for t in read if t not in changed)
    _check(name, function, changed, read)
    places = [
        _Place(
            *(("writes", changed.index(leaf)) if leaf in changed else ("reads", read.index(leaf)))
        )
        if isinstance(leaf, vt.Tensor)
        else leaf
        for leaf in leaves
    ]
    recorded = _C.graphs.recording() is not None
    # As replays have them: tensors without history.
    tensors = [[t.detach() if t.requires_grad else t for t in part] for part in (changed, read)]
    _C._ops._foreign(*tensors, ForeignCall(function, places, spec, recorded))


def foreign_op(
    *, writes: str | Iterable[str], reads: str | Iterable[str] | None = None
) -> Callable[[_Function], _Function]:
    """A decorator: calls of the function are `foreign` ones.

    ``@foreign_op(writes="out")`` above ``def scale(x, out, factor)``.

    writes, reads: names of its parameters, whose tensors (one, or those in a container) it changes,
    and only reads. Raises ValueError for a name that is no parameter.
    """
    changed = (writes,) if isinstance(writes, str) else tuple(writes)
    read = (reads,) if isinstance(reads, str) else None if reads is None else tuple(reads)

    def decorate(function: _Function) -> _Function:
        signature = inspect.signature(function)
        for name in (*changed, *(read or ())):
            if name not in signature.parameters:
                raise ValueError(f"foreign_op: {_name(function)} has no parameter {name!r}")

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> None:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()

            def tensors(names: Iterable[str]) -> list[Any]:
                found = flatten([bound.arguments[name] for name in names])[0]
                return [x for x in found if isinstance(x, vt.Tensor)]

            declared = None if read is None else tensors(read)
            foreign_of(function, bound.args, bound.kwargs, tensors(changed), declared)

        return call  # type: ignore[return-value]

    return decorate


def foreign_of(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    writes: Sequence[Any],
    reads: Sequence[Any] | None,
) -> None:
    """`foreign` for arguments of any names, `reads` and `writes` among them."""
    if "reads" in kwargs or "writes" in kwargs:
        function, kwargs = functools.partial(_with_keywords, function), {"keywords": kwargs}
    foreign(function, *args, writes=writes, reads=reads, **kwargs)


def _with_keywords(function: Callable[..., Any], *args: Any, keywords: dict[str, Any]) -> Any:
    return function(*args, **keywords)


class _Place:
    """Where an argument's tensor is in what an op is given."""

    __slots__ = ("index", "kind")

    def __init__(self, kind: str, index: int) -> None:
        self.kind, self.index = kind, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Place) and (self.kind, self.index) == (other.kind, other.index)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"{self.kind}[{self.index}]"


class ForeignCall:
    """The argument of the op: a function and its arguments, with places for tensors.

    Two are equal if they do the same: one function, and constants that are equal.
    """

    __slots__ = ("__weakref__", "_function", "_places", "_recorded", "_spec")

    def __init__(
        self, function: Callable[..., Any], places: list[Any], spec: Any, recorded: bool
    ) -> None:
        self._function, self._places, self._spec = function, places, spec
        self._recorded = recorded

    def __call__(self, writes: tuple[Any, ...], reads: tuple[Any, ...]) -> None:
        tensors = {"writes": writes, "reads": reads}
        leaves = [tensors[x.kind][x.index] if type(x) is _Place else x for x in self._places]
        args, kwargs = unflatten(self._spec, leaves)
        if not self._recorded:
            self._function(*args, **kwargs)
            return
        devices = dict.fromkeys((vt.device("cpu"), writes[0].device))
        generators = [_C._default_generator(device) for device in devices]
        before = [generator.get_state().tolist() for generator in generators]
        self._function(*args, **kwargs)
        if [generator.get_state().tolist() for generator in generators] != before:
            raise RuntimeError(
                f"foreign({self.name}) draws from a default generator, which no replay could repeat: "
                "draw outside of it, and pass the tensor"
            )

    @property
    def name(self) -> str:
        """The function's."""
        return _name(self._function)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ForeignCall):
            return NotImplemented
        return (
            _same(self._function, other._function)
            and self._spec == other._spec
            and len(self._places) == len(other._places)
            and all(_same(a, b) for a, b in zip(self._places, other._places))
        )

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        constants = [repr(x) for x in self._places if type(x) is not _Place]
        return f"<{', '.join([self.name, *constants])}>"


class _Tensors(list[Any]):
    """Tensors, each once, compared by identity."""

    def __init__(self, tensors: Iterable[Any]) -> None:
        super().__init__({id(t): t for t in tensors}.values())

    def __contains__(self, tensor: object) -> bool:
        return any(t is tensor for t in self)

    def index(self, tensor: Any, *_: Any) -> int:
        return next(i for i, t in enumerate(self) if t is tensor)


def _declared(name: str, given: _Tensors, declared: Any, what: str) -> _Tensors:
    if isinstance(declared, vt.Tensor):
        declared = [declared]
    found = _Tensors(declared)
    for tensor in found:
        if not isinstance(tensor, vt.Tensor):
            raise TypeError(f"foreign({name}): {what} has tensors, not {type(tensor).__name__}")
        if tensor not in given:
            raise ValueError(
                f"foreign({name}): a tensor of {tuple(tensor.shape)} {tensor.dtype} in {what} is no "
                "argument; the function gets every tensor that it uses as one, as replays have "
                "others in their place"
            )
    return found


def _check(name: str, function: Any, changed: _Tensors, read: _Tensors) -> None:
    if not callable(function):
        raise TypeError(f"foreign: {function!r} is not callable")
    if not changed:
        raise ValueError(
            f"foreign({name}): writes is empty; a function that changes no tensor is no op of a step"
        )
    device = changed[0].device
    for tensor in (*changed, *read):
        if tensor.device != device:
            raise ValueError(
                f"foreign({name}): tensors on {device} and {tensor.device}; they are on one device"
            )
        if tensor.requires_grad and vt.is_grad_enabled():
            raise RuntimeError(
                f"foreign({name}): an argument of {tuple(tensor.shape)} requires grad, and nobody "
                "knows the derivative. Call it in the forward of an autograd.Function, or on "
                "detach()ed tensors"
            )
    for tensor in changed:
        if any(n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride())):
            raise ValueError(
                f"foreign({name}): it would write into an expanded tensor of {tuple(tensor.shape)}, "
                "some of whose elements are one memory; clone() it"
            )
    plain, bound = _unbound(function)
    for cell in getattr(plain, "__closure__", None) or ():
        try:
            bound.append(cell.cell_contents)
        except ValueError:  # not bound yet
            continue
    for contents in bound:
        if isinstance(contents, vt.Tensor):
            raise ValueError(
                f"foreign({name}): the function refers to a tensor of {tuple(contents.shape)} outside "
                "of it; pass it as an argument, as replays have others in their place"
            )


def _unbound(function: Any) -> tuple[Any, list[Any]]:
    """The function below its `partial`s, and what they bind to it."""
    bound: list[Any] = []
    while isinstance(function, functools.partial):
        inner = function.args[0] if function.func is _with_keywords else function.func
        if inner is function.func:
            bound += [*function.args, *function.keywords.values()]
        function = inner
    return function, bound


def _name(function: Any) -> str:
    function = _unbound(function)[0]
    found = getattr(function, "__qualname__", None) or getattr(function, "__name__", None)
    return found if isinstance(found, str) else type(function).__name__


def _same(a: Any, b: Any) -> bool:
    """Whether two constants are the same argument; functions that are made anew at each call are if
    their code and what they are bound to are."""
    if a is b:
        return True
    if isinstance(a, types.FunctionType) and isinstance(b, types.FunctionType):
        return (
            a.__code__ == b.__code__
            and _same(a.__defaults__, b.__defaults__)
            and _same(a.__kwdefaults__, b.__kwdefaults__)
            and _same(_contents(a), _contents(b))
        )
    if isinstance(a, functools.partial) and isinstance(b, functools.partial):
        return _same((a.func, a.args, a.keywords), (b.func, b.args, b.keywords))
    if type(a) is not type(b):
        return False
    if isinstance(a, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    try:
        return bool(a == b) or bool(a != a and b != b)
    except (TypeError, ValueError):  # an array, say
        return False


def _contents(function: types.FunctionType) -> tuple[Any, ...]:
    return tuple(cell.cell_contents for cell in function.__closure__ or ())
