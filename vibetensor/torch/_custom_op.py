"""Ops of the user's own, under torch's names: custom_op, register_fake, register_autograd, ops.

An op is known by a qualified name, `namespace::name`, and called as `vibetensor.ops.namespace.name`.
In a captured step the ops that its functions run are what is recorded.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, overload

from vibetensor import _C
from vibetensor.torch import _recording
from vibetensor.torch.autograd.function import Function, FunctionCtx

if TYPE_CHECKING:
    from vibetensor.torch._custom_op_schema import Schema

Implementation = Callable[..., Any]
DEVICES = ("cpu", "cuda")


class CustomOpDef:
    """An op made by `custom_op`. Call it, or add to it with its register methods."""

    def __init__(
        self, name: str, schema: Schema, function: Implementation | None, devices: Sequence[str]
    ) -> None:
        self._qualified = name
        self._schema = schema
        self._implementations: dict[str, Implementation] = {}
        self._backward: Callable[..., Any] | None = None
        self._setup_context: Callable[..., Any] | None = None
        self._function = _function_of(self)
        self.__name__ = name.partition("::")[2]
        self.__doc__ = function.__doc__ if function else None
        if function is not None:
            for device in devices:
                self._implementations[device] = function

    @property
    def schema(self) -> str:
        """The op's schema as text."""
        return str(self._schema)

    def __repr__(self) -> str:
        return f"<CustomOpDef({self._qualified})>"

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        values = self._schema.bind(self._qualified, args, kwargs)
        return self._call(values)

    def _call(self, values: list[Any]) -> Any:
        grad = _C.is_grad_enabled() and any(
            isinstance(v, _C.Tensor) and v.requires_grad for v in values
        )
        if not grad:
            return self._run(values)
        for a, v in zip(self._schema.arguments, values):
            if a.mutated and v is not None and v.requires_grad:
                raise RuntimeError(
                    f"{self._qualified} changes '{a.name}' in place, which requires grad: an op that "
                    "changes its arguments has no gradient. Call it under no_grad"
                )
        return self._function.apply(*values)

    def _run(self, values: list[Any]) -> Any:
        """The op below autograd, with its results checked."""
        given = [
            (a.name, v) for a, v in zip(self._schema.arguments, values) if isinstance(v, _C.Tensor)
        ]
        if not given:
            raise RuntimeError(f"{self._qualified}: every tensor is None: one must be given")
        device = given[0][1].device
        function = self._implementations.get(device.type)
        if function is None:
            raise NotImplementedError(
                f"{self._qualified} has no implementation for {device.type}: "
                f"register one with register_kernel('{device.type}')"
            )
        _recording.rely_on(self, ("_implementations", "_backward", "_setup_context"))
        results = self._as_tuple(_by_schema(function, self._schema, values))
        for a, v in zip(self._schema.arguments, values):
            if a.mutated and isinstance(v, _C.Tensor):
                _C._increment_version(v)  # it may have been written through NumPy, say
        storages = {v._storage_key(): name for name, v in reversed(given)}
        for at, r in enumerate(results):
            if name := storages.get(r._storage_key()):
                itself = any(r is v for _, v in given)
                raise RuntimeError(
                    f"{self._qualified}: result {at} is {'' if itself else 'a view of '}the argument "
                    f"'{name}'{' itself' if itself else ''}. A custom op returns new tensors: return a "
                    "clone, or declare that it changes the argument"
                )
        return self._unpacked(results)

    def _as_tuple(self, results: Any) -> tuple[Any, ...]:
        expected = len(self._schema.results)
        items: Any = (results,) if self._schema.single else results
        if items is None and expected == 0:
            items = ()
        if not isinstance(items, tuple | list) or [isinstance(r, _C.Tensor) for r in items] != (
            [True] * expected
        ):
            raise TypeError(
                f"{self._qualified}: its implementation must return "
                f"{'a tensor' if self._schema.single else f'{expected} tensors'}, as the schema "
                f"{self._schema} says, and returned {type(results).__name__}"
            )
        return tuple(items)

    def _unpacked(self, results: tuple[Any, ...]) -> Any:
        if not self._schema.results:
            return None
        return results[0] if self._schema.single else results

    def register_kernel(
        self, device_types: str | Sequence[str], func: Implementation | None = None, /
    ) -> Callable[..., Any]:
        """Adds the implementation for tensors of these device types; also a decorator."""
        devices = _devices(self._qualified, device_types)

        def add(function: Implementation) -> Implementation:
            # Another dict, as captures look at whether it is the one that they relied on.
            added = dict.fromkeys(devices, function)
            self._implementations = {**self._implementations, **added}
            return function

        return add if func is None else add(func)

    def register_fake(self, fn: Implementation, /) -> Implementation:
        """Takes a shape rule: a function of the op's arguments that returns tensors like its results,
        made with `empty` and the like.

        It is for programs written for torch, is not called and not kept: captured steps are recorded
        by running the op, so nothing here has to know results without their values."""
        return fn

    def register_autograd(
        self, backward: Callable[..., Any], /, *, setup_context: Callable[..., Any] | None = None
    ) -> None:
        """Adds the gradient.

        `backward(ctx, *grads)` returns a gradient (or None) for each argument of the op;
        `setup_context(ctx, inputs, output)` runs after the forward and saves for it, and takes a
        `keyword_only_inputs` where the op has keyword-only arguments.
        """
        if self._schema.mutates:
            raise RuntimeError(
                f"{self._qualified}: an op that changes its arguments in place has no gradient"
            )
        if not callable(backward) or not (setup_context is None or callable(setup_context)):
            raise TypeError(f"{self._qualified}: backward and setup_context must be functions")
        self._backward, self._setup_context = backward, setup_context


def _by_schema(function: Implementation, schema: Schema, values: Sequence[Any]) -> Any:
    """Calls `function` with positional and keyword arguments as the schema has them."""
    positional = [v for a, v in zip(schema.arguments, values) if not a.keyword_only]
    keywords = {a.name: v for a, v in zip(schema.arguments, values) if a.keyword_only}
    return function(*positional, **keywords)


def _function_of(op: CustomOpDef) -> type[Function]:
    """The op as an autograd.Function; its context is the one that the user's functions get."""
    schema = op._schema

    def forward(ctx: FunctionCtx, *values: Any) -> Any:
        output = op._run(list(values))
        if op._backward is not None and op._setup_context is not None:
            needs = ctx.needs_input_grad
            named = list(zip(schema.arguments, values, needs))
            inputs = tuple(v for a, v, _ in named if not a.keyword_only)
            keywords = {a.name: v for a, v, _ in named if a.keyword_only}
            ctx.needs_input_grad = tuple(n for a, _, n in named if not a.keyword_only)
            if keywords:
                op._setup_context(
                    ctx=ctx, inputs=inputs, keyword_only_inputs=keywords, output=output
                )
            else:
                op._setup_context(ctx=ctx, inputs=inputs, output=output)
        return output

    def backward(ctx: FunctionCtx, *grads: Any) -> Any:
        if op._backward is None:
            raise RuntimeError(
                f"Trying to backward through {op._qualified} but no autograd formula was registered. "
                f"Give it one with register_autograd"
            )
        given = op._backward(ctx, *grads)
        given = given if isinstance(given, tuple | list) else (given,)
        positional = [a for a in schema.arguments if not a.keyword_only]
        if len(given) != len(positional):
            raise RuntimeError(
                f"{op._qualified}: its backward returned {len(given)} gradients for "
                f"{len(positional)} arguments: return one, or None, for each"
            )
        rest = [None] * (len(schema.arguments) - len(positional))
        return (*given, *rest)

    name = op._qualified.replace("::", "_")
    body = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    return type(name, (Function,), body)


_ops: dict[str, CustomOpDef] = {}


def _qualified(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z_]\w*::[A-Za-z_]\w*", name):
        raise ValueError(f"'{name}' cannot be an op's name: it is 'namespace::name'")
    return name


def _devices(op: str, device_types: str | Sequence[str] | None) -> tuple[str, ...]:
    if device_types is None:
        return DEVICES
    devices = (device_types,) if isinstance(device_types, str) else tuple(device_types)
    if unknown := [d for d in devices if d not in DEVICES]:
        raise ValueError(f"{op}: unknown device type '{unknown[0]}'; they are {', '.join(DEVICES)}")
    return devices


def define(
    name: str,
    schema: Schema,
    function: Implementation | None,
    devices: Sequence[str] = DEVICES,
) -> CustomOpDef:
    """Adds an op. Raises ValueError for a name that is taken, unless the module that made it is being
    loaded again (its function has the same file and name)."""
    _qualified(name)
    if (known := _ops.get(name)) is not None and not _same_place(known, function):
        raise ValueError(f"op '{name}' is registered already")
    op = _ops[name] = CustomOpDef(name, schema, function, devices)
    return op


def _same_place(known: CustomOpDef, function: Implementation | None) -> bool:
    def place(f: Any) -> tuple[Any, ...] | None:
        code = getattr(f, "__code__", None)
        return None if code is None else (code.co_filename, f.__qualname__)

    mine = place(function)
    return mine is not None and any(place(f) == mine for f in known._implementations.values())


@overload
def custom_op(
    name: str,
    fn: None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
) -> Callable[[Implementation], CustomOpDef]: ...


@overload
def custom_op(
    name: str,
    fn: Implementation,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
) -> CustomOpDef: ...


def custom_op(
    name: str,
    fn: Implementation | None = None,
    /,
    *,
    mutates_args: str | Iterable[str],
    device_types: str | Sequence[str] | None = None,
    schema: str | None = None,
) -> Any:
    """Makes a function an op, `vibetensor.ops.NAMESPACE.NAME`; also a decorator.

    name: "namespace::name". fn: the implementation for tensors of `device_types` (default: every
    device). mutates_args: the names of the arguments it changes in place. schema: the op's arguments
    and results as text; by default they come from the annotations: Tensor, int, float, bool, str,
    Sequence[int], Sequence[float], dtype, device and Optional of those; it returns a Tensor, a tuple
    of Tensors or None.

    Raises ValueError for a name, a schema or annotations that are none.
    """
    from vibetensor.torch._custom_op_schema import infer, parse

    mutated = (mutates_args,) if isinstance(mutates_args, str) else tuple(mutates_args)

    def make(function: Implementation) -> CustomOpDef:
        parsed = infer(function, mutated) if schema is None else parse(schema)
        if schema is not None and set(parsed.mutates) != set(mutated):
            raise ValueError(
                f"{name}: mutates_args is {list(mutated)}, and the schema {schema} says "
                f"{list(parsed.mutates)}"
            )
        return define(name, parsed, function, _devices(name, device_types))

    return make if fn is None else make(fn)


def found(op: str | CustomOpDef) -> CustomOpDef:
    """The op of that name. Raises ValueError."""
    if isinstance(op, CustomOpDef):
        return op
    if op not in _ops:
        raise ValueError(f"no custom op is called '{op}'")
    return _ops[op]


def register_kernel(
    op: str | CustomOpDef,
    device_types: str | Sequence[str],
    func: Implementation | None = None,
    /,
) -> Any:
    """`CustomOpDef.register_kernel` of the op of that name."""
    return found(op).register_kernel(device_types, func)


def register_fake(op: str | CustomOpDef, func: Implementation | None = None, /) -> Any:
    """`CustomOpDef.register_fake` of the op of that name; also a decorator."""
    return found(op).register_fake if func is None else found(op).register_fake(func)


def register_autograd(
    op: str | CustomOpDef,
    backward: Callable[..., Any],
    /,
    *,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """`CustomOpDef.register_autograd` of the op of that name."""
    found(op).register_autograd(backward, setup_context=setup_context)


class _Namespace:
    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, name: str) -> CustomOpDef:
        op = _ops.get(f"{self._name}::{name}")
        if op is None:
            raise AttributeError(f"no custom op is called '{self._name}::{name}'")
        return op

    def __dir__(self) -> list[str]:
        mine = self._name + "::"
        return sorted(n.removeprefix(mine) for n in _ops if n.startswith(mine))


class _Ops:
    """The custom ops by namespace and name: `ops.NAMESPACE.NAME(...)`."""

    def __getattr__(self, name: str) -> _Namespace:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Namespace(name)

    def __dir__(self) -> list[str]:
        return sorted({n.partition("::")[0] for n in _ops})


ops = _Ops()

__all__ = [
    "CustomOpDef",
    "custom_op",
    "ops",
    "register_autograd",
    "register_fake",
    "register_kernel",
]
