"""Users' own CuTe kernels as ops: `vibetensor.cute_kernels.register`.

An op has a reference, which runs on the CPU and wherever no kernel applies, and variants of a kernel
with their contracts. On a GPU the first variant that applies is launched. In a captured step the
launch is one op on the tape, which reads and writes what the schema says; where the reference runs,
its own ops are what is recorded.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import re
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import kernel_source, objects
from .build import BuildError, dsl_version
from .contract import Contract
from .kernel_source import KernelSource
from .shapes import Unfit, check_limits, dtype_name, match

CAPTURES = ("pointwise", "reduction", "norm", "gemm", "opaque")
_SCALAR_TYPES = {
    "float32": ("float", "int"),
    "int32": ("int", "bool"),
    "int64": ("int", "bool"),
    "uint64": ("int", "bool"),
}


@dataclass(frozen=True)
class Variant:
    """One compiled form of a kernel: what it is made from, and what it may be given."""

    name: str
    value: Any
    contract: Contract


@dataclass(frozen=True)
class Fit:
    """How tensors of one geometry are passed: extents, and of each tensor dtype and strides."""

    extents: list[int]
    passed: list[tuple[str, list[int]] | None]
    device: int


#: What kernels are compiled for.
CAPABILITY = (9, 0)
#: Geometries that an op remembers.
MOST_FITS = 1024


class CuteOp:
    """What `register` keeps of an op beside its CustomOpDef."""

    def __init__(
        self,
        name: str,
        schema: Any,
        variants: tuple[Variant, ...],
        make: Callable[[Any], Any],
        reference: Callable[..., Any],
        fake: Callable[..., Any] | None,
        capture: str,
        folder: Path | None,
        source: KernelSource,
        just_in_time: bool,
    ) -> None:
        self.name, self.schema, self.variants, self.make = name, schema, variants, make
        self.reference, self.capture = reference, capture
        self.fake = fake or functools.partial(_like_first, self)
        self.folder, self.source, self.just_in_time = folder, source, just_in_time
        #: Of what its objects are made from; empty where that is not known: none are kept then.
        self.key = ""
        if source.digest:
            described = [(v.name, repr(v.contract)) for v in variants]
            self.key = objects.key_of([name, described, source.digest])
        self.op: Any = None
        self._native: Any = None  # the compiled variants
        self._problem = ""  # why there are none
        self._lock = threading.Lock()
        self._positional = [a.name for a in schema.arguments if not a.keyword_only]
        self._tensors = [t.name for t in variants[0].contract.tensors]
        self._numbers = [s.name for s in variants[0].contract.scalars]
        self._results = [self._tensors.index(r) for r in schema.results]
        self._fits: dict[Any, str | Fit] = {}

    # --- compiling

    @property
    def stem(self) -> str:
        """What the names of its files begin with."""
        return self.name.replace("::", ".")

    def jobs(self) -> list[objects.Job]:
        """What there is to compile."""
        base = re.sub(r"\W", "_", self.name)
        return [
            objects.Job(
                v.name, f"{base}_{v.name}", v.contract, functools.partial(self.make, v.value)
            )
            for v in self.variants
        ]

    def folders(self) -> list[Path]:
        """Where its objects are looked for."""
        return [f for f in (self.folder, objects.cache_folder()) if f is not None]

    def find(self) -> objects.Objects | None:
        """Its objects on disk."""
        for folder in self.folders() if self.key else ():
            if found := objects.find(self.stem, self.key, folder):
                return found
        return None

    def build(self, folder: Path) -> tuple[objects.Objects, bool]:
        """Its objects in `folder`, and whether they had to be compiled. Raises BuildError."""
        if not self.key:
            raise BuildError(f"{self.name}: its objects cannot be kept: {self.source.problem}")
        return objects.find_or_compile(self.stem, self.key, self.jobs(), folder, self._check_source)

    def _check_source(self) -> None:
        if changed := self.source.changed():
            raise BuildError(
                f"{self.name}: {changed} has changed since the op was registered: load it again"
            )

    # --- calling

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The op on a GPU: a launch of the first variant that applies, or else the reference."""
        values = dict(zip(self._positional, args))
        values |= kwargs
        native = self._native or self.native()
        if native is None:
            why = self._problem or "it is not compiled while recording"
            return self._by_reference(values, why)
        recording = _recording()
        results = _tuple(self.fake(*args, **kwargs))
        named = [values.get(n) for n in self._tensors]
        for at, result in zip(self._results, results):
            named[at] = result
        fit = self.fit(named)
        if isinstance(fit, str):
            return self._by_reference(values, fit)
        numbers = [values[n] for n in self._numbers]
        if recording or self.schema.mutates:
            self._on_tape(native, named, numbers)
        else:
            self._launch(native, named, numbers)
        if not results:
            return None
        return results[0] if self.schema.single else results

    def fit(self, named: Sequence[Any]) -> str | Fit:
        """How these tensors are passed, or why no variant's contract holds, addresses aside. Known by
        their geometry: a training step has the same ones again and again."""
        key = tuple(
            [None if t is None else (t.shape, t.stride(), t.dtype, t.device) for t in named]
        )
        known = self._fits.get(key)
        if known is None:
            known = self._fit(dict(zip(self._tensors, named)))
            if len(self._fits) >= MOST_FITS:
                self._fits.clear()
            self._fits[key] = known
        return known

    def _fit(self, named: Mapping[str, Any]) -> str | Fit:
        devices = {n: t.device for n, t in named.items() if t is not None}
        if len(set(devices.values())) > 1:
            raise RuntimeError(
                f"{self.name}: expected all tensors on one device, got "
                + ", ".join(f"{name} on {device}" for name, device in devices.items())
            )
        device = next(iter(devices.values()))
        if device.type == "cuda" and (why := _unfit_device(device.index or 0)):
            return why
        if self.capture == "pointwise":
            shapes = {n: tuple(t.shape) for n, t in named.items() if t is not None}
            if len(set(shapes.values())) > 1:
                return f"its tensors have the shapes {shapes}, and it takes one"
        refused = []
        for v in self.variants:
            try:
                extents, strides = match(v.contract, named)
                check_limits(v.contract, named, extents, strides)
            except Unfit as why:
                refused.append(f"{v.name}: {why}")
                continue
            passed = [
                None if (t := named[n]) is None else (dtype_name(t), strides[n])
                for n in self._tensors
            ]
            return Fit(extents, passed, device.index or 0)
        return "; ".join(refused)

    def _on_tape(self, native: Any, named: list[Any], numbers: list[Any]) -> None:
        """The launch, as one op that reads and writes tensors: now, and in a captured step on the memory
        that they have there."""
        from vibetensor.graphs import foreign

        given = [(t, x) for t, x in zip(self.variants[0].contract.tensors, named) if x is not None]
        writes = [x for t, x in given if t.access != "read"]
        reads = [x for t, x in given if t.access == "read"]
        foreign(self._launch, native, named, numbers, writes=writes, reads=reads)

    def _launch(self, native: Any, named: Sequence[Any], numbers: Sequence[Any]) -> None:
        fit = self.fit(named)
        if not isinstance(fit, str):
            places = [
                None if x is None else (x.data_ptr(), *passed)
                for x, passed in zip(named, fit.passed)
            ]
            variant, fit = native.launch(fit.extents, places, numbers, fit.device)
            if variant:
                if kernel_log():
                    self._tell(dict(zip(self._tensors, named)), f"CuTe {variant}")
                return
        # What only the addresses showed: the results are there already.
        values = {**dict(zip(self._tensors, named)), **dict(zip(self._numbers, numbers))}
        self._tell(values, f"the reference, {fit}")
        for at, made in zip(self._results, _tuple(self._refer(values))):
            named[at].copy_(made)

    def _refer(self, values: Mapping[str, Any]) -> Any:
        positional = [values[a.name] for a in self.schema.arguments if not a.keyword_only]
        keywords = {a.name: values[a.name] for a in self.schema.arguments if a.keyword_only}
        return self.reference(*positional, **keywords)

    def _by_reference(self, values: Mapping[str, Any], why: str) -> Any:
        self._tell(values, f"the reference, {why}")
        return self._refer(values)

    def _tell(self, tensors: Mapping[str, Any], what: str) -> None:
        """Each decision is told once."""
        if not kernel_log():
            return
        shapes = ", ".join(
            f"{n}={dtype_name(t)}{list(t.shape)}" for n, t in tensors.items() if hasattr(t, "shape")
        )
        line = f"vibetensor: {self.name} {shapes}: {what}"
        if line not in _told:
            _told.add(line)
            print(line, file=sys.stderr)

    def native(self) -> Any:
        """The compiled variants as the CUDA library has them; None where there are none."""
        if self._native is not None or self._problem:
            return self._native
        with self._lock:
            if self._native is None and not self._problem:
                recording = _recording()
                try:
                    self._native = self._load(compile_now=self.just_in_time and not recording)
                except (BuildError, OSError, RuntimeError, ValueError) as error:
                    self._problem = str(error)
                    if not recording:
                        print(f"vibetensor: {self.name}: {error}", file=sys.stderr)
                if self._native is None and not self._problem:
                    if recording:  # asked again outside
                        return None
                    self._problem = self.source.problem or "nothing was compiled"
                    if self.folder is not None and not self.key:
                        print(
                            f"vibetensor: {self.name}: no objects fit: {self._problem}",
                            file=sys.stderr,
                        )
        return self._native

    def _load(self, compile_now: bool) -> Any:
        try:
            from vibetensor import _cuda
        except ImportError:
            self._problem = "this build has no CUDA"
            return None
        if all(_unfit_device(i) for i in range(_cuda.device_count())):
            self._problem = "it is compiled for compute capability 9.0 only"
            return None
        found = self.find()
        with contextlib.ExitStack() as kept:
            if found is None and compile_now and dsl_version():
                found = self._compile_now(kept)
            return None if found is None else self._opened(_cuda, found)

    def _compile_now(self, kept: contextlib.ExitStack) -> objects.Objects:
        """Compiled into the cache folder, or one that lasts as long as `kept`."""
        if self.key:
            folder = objects.cache_folder(create=True)
            if folder is None:
                raise BuildError("the cache folder is not this user's alone: nothing is compiled")
            return self.build(folder)[0]
        if kernel_log():
            print(
                f"vibetensor: {self.name}: compiled for this process: {self.source.problem}",
                file=sys.stderr,
            )
        folder = Path(kept.enter_context(tempfile.TemporaryDirectory(prefix="vibetensor-")))
        return objects.compile_objects(self.stem, "unkept", self.jobs(), folder, self._check_source)

    def _opened(self, library: Any, found: objects.Objects) -> Any:
        codes = {code.variant: code for code in found.codes}
        if lacking := [v.name for v in self.variants if v.name not in codes]:
            raise BuildError(
                f"{found.library} has no code for {', '.join(lacking)}: remove it, and build it again"
            )
        contract = self.variants[0].contract
        native = library.CuteKernel(
            self.name,
            [e.name for e in contract.extents],
            [t.name for t in contract.tensors],
            [s.type for s in contract.scalars],
        )
        for v in self.variants:
            code = codes[v.name]
            symbols = (str(found.library), code.entry, code.init, code.load)
            native.add(v.name, *limits(v.contract), symbols)
        return native


def limits(contract: Contract) -> tuple[list[Any], list[Any]]:
    """A contract's rules as the CUDA library takes them: of extents, and of tensors."""
    extents = {e.name: i for i, e in enumerate(contract.extents)}
    order = {t.name: i for i, t in enumerate(contract.tensors)}
    return (
        [(e.divisible_by, e.minimum, e.maximum) for e in contract.extents],
        [
            (
                t.dtype, [extents[s] for s in t.shape], t.access, t.align, t.stride_divisible_by,
                t.optional, sum(1 << order[a] for a in t.may_alias if a in order),
            )
            for t in contract.tensors
        ],
    )  # fmt: skip


def kernel_log() -> bool:
    """Whether the kernel of each call is told: VT_KERNEL_LOG."""
    from vibetensor._environment import env_flag  # objects are built before the library is there

    return env_flag("VT_KERNEL_LOG", False)


def _recording() -> bool:
    from vibetensor import _C

    return _C.graphs.recording() is not None


def _unfit_device(index: int) -> str:
    """Why compiled kernels do not run on a GPU; empty where they do."""
    from vibetensor import _cuda

    gpu = _cuda.properties(index)
    if (gpu.major, gpu.minor) == CAPABILITY:
        return ""
    return (
        f"it is compiled for compute capability 9.0 only, and device {index} has "
        f"{gpu.major}.{gpu.minor}"
    )


def _tuple(results: Any) -> tuple[Any, ...]:
    if results is None:
        return ()
    return tuple(results) if isinstance(results, tuple | list) else (results,)


def _like_first(op: CuteOp, *args: Any, **kwargs: Any) -> Any:
    """The shape rule of pointwise ops and norms: results are like the first tensor, with the dtype
    that the contract of a variant for that tensor's says."""
    import vibetensor.torch as torch

    values = {**dict(zip(op._positional, args)), **kwargs}
    given = [a.name for a in op.schema.arguments if isinstance(values.get(a.name), torch.Tensor)]
    if not given:
        raise RuntimeError(f"{op.name}: its results are like its first tensor, and none was given")
    name, first = given[0], values[given[0]]
    dtypes: dict[str, str] = {}
    for v in op.variants:
        found = {t.name: t.dtype for t in v.contract.tensors}
        if found[name] == dtype_name(first):
            dtypes = found
            break
    made = [
        torch.empty_like(first)
        if dtypes.get(r, dtypes.get(name)) == dtypes.get(name)
        else torch.empty_like(first, dtype=getattr(torch, dtypes[r]))
        for r in op.schema.results
    ]
    return made[0] if op.schema.single else tuple(made)


_told: set[str] = set()
_registered: dict[str, CuteOp] = {}


def registered() -> dict[str, CuteOp]:
    """The ops that `register` made, by name."""
    return dict(_registered)


def register(
    name: str,
    schema: str,
    *,
    kernel: Callable[..., Any],
    contract: Contract | Callable[[Any], Contract],
    reference: Callable[..., Any],
    variants: Sequence[Any] | None = None,
    fake: Callable[..., Any] | None = None,
    backward: Any = None,
    setup_context: Callable[..., Any] | None = None,
    capture: str = "opaque",
    objects_in: str | os.PathLike[str] | None = None,
    sources: Sequence[str | os.PathLike[str]] = (),
    just_in_time: bool = True,
    doc: str = "",
) -> Any:
    """Makes a CuTe kernel an op: `vibetensor.ops.NAMESPACE.NAME`, which is also returned.

    name: "namespace::name". schema: "(Tensor x, Tensor? w, float eps) -> Tensor y"; results have
    names, and a tensor that the kernel changes is "Tensor! x".

    kernel: a function with `@cute.jit`, or an object with one as `__call__`; with `variants`, what
    makes one from a variant. It takes the contract's tensors, its numbers and a stream, by those
    names. contract: what it may be given, or a function of the variant. Its tensors are the schema's
    tensors (read, or update where the schema says "!") and results (write), its numbers the schema's.
    variants: strings, numbers or frozen dataclasses with a `name`; the first that applies is launched.

    reference: the op in terms of others, on any device. fake: results of the right shape and dtype
    without values, as `torch.library.register_fake` takes it; by default those of pointwise ops and
    norms are like the first tensor, all others need one.

    backward: without `setup_context` a function (or the name of a custom op) whose parameters name
    what it needs: "grad" (of several results "grad_RESULT"), arguments and results. It returns the
    gradients of the tensor arguments in their order, None where there is none. With `setup_context`
    both are torch.library.register_autograd's.

    capture: pointwise, reduction, norm, gemm or opaque. Pointwise kernels get tensors of one shape.

    objects_in: a folder with objects that `python -m vibetensor.cute_kernels build --module ... --out`
    made, whose code is loaded into the process: a folder that is trusted like a module's. The user's
    cache folder is looked at in any case. sources: files that the kernel's code also depends on.
    just_in_time: compile at the first call on a GPU where nothing was compiled.

    Kept objects are found by what the kernel is made from as this is called: the files of its functions
    or, in a notebook, their text and what it names; the attributes of an object, the arguments of a
    partial; the variants and contracts. Where that cannot be told they are compiled for this process.

    Raises ValueError or TypeError for what does not fit together.
    """
    from vibetensor.torch import _custom_op, _custom_op_schema

    where = f"cute_kernels.register('{name}')"
    if capture not in CAPTURES:
        raise ValueError(f"{where}: capture is one of {', '.join(CAPTURES)}, not '{capture}'")
    for what, function in (("kernel", kernel), ("reference", reference)):
        if not callable(function):
            raise TypeError(f"{where}: the {what} must be a function, not {function!r}")
    parsed = _custom_op_schema.parse(schema)
    made = _variants(where, variants, contract)
    _check_contract(where, parsed, made, capture, fake)
    if variants is None:
        _check_signature(where, kernel, made[0].contract)
        kernel_of = functools.partial(_only, kernel)
    else:
        kernel_of = kernel
    files = [Path(s) for s in sources]
    if missing := [str(f) for f in files if not f.is_file()]:
        raise ValueError(f"{where}: sources: no such file: {', '.join(missing)}")
    source = kernel_source.read(kernel, [v.value for v in made], files)
    op = CuteOp(
        name, parsed, made, kernel_of, reference, fake, capture,
        None if objects_in is None else Path(objects_in), source, just_in_time,
    )  # fmt: skip
    formula = _formula(where, parsed, backward, setup_context)
    op.op = _custom_op.define(name, parsed, reference, ("cpu",))
    op.op.register_kernel("cuda", op.run)
    op.op.register_fake(op.fake)
    op.op.__doc__ = doc or reference.__doc__
    if formula is not None:
        op.op.register_autograd(formula[0], setup_context=formula[1])
    _registered[name] = op
    return op.op


def _only(kernel: Any, _: Any) -> Any:
    return kernel


def _variants(where: str, variants: Sequence[Any] | None, contract: Any) -> tuple[Variant, ...]:
    values = [None] if variants is None else list(variants)
    if not values:
        raise ValueError(f"{where}: no variants")
    made = []
    for value in values:
        of = contract if isinstance(contract, Contract) else contract(value)
        if not isinstance(of, Contract):
            raise TypeError(f"{where}: contract must be or return a Contract, not {of!r}")
        name = "only" if value is None else str(getattr(value, "name", value))
        if not re.fullmatch(r"\w+", name):
            raise ValueError(f"{where}: '{name}' cannot be a variant's name: letters, digits and _")
        made.append(Variant(name, value, of))
    names = [v.name for v in made]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"{where}: variants named alike: {', '.join(twice)}")
    if len({v.contract.signature() for v in made}) != 1:
        raise ValueError(f"{where}: its variants differ in their arguments")
    return tuple(made)


def _check_contract(
    where: str, schema: Any, variants: tuple[Variant, ...], capture: str, fake: Any
) -> None:
    contract = variants[0].contract
    wanted = {a.name: "update" if a.mutated else "read" for a in schema.arguments if a.is_tensor}
    if "" in schema.results:
        raise ValueError(f"{where}: the results of {schema} need names: 'Tensor y'")
    wanted |= dict.fromkeys(schema.results, "write")
    got = {t.name: t.access for t in contract.tensors}
    if got != wanted:
        raise ValueError(
            f"{where}: by the schema {schema} its tensors are {wanted}, by the contract {got}"
        )
    for t in contract.tensors:
        optional = any(a.name == t.name and a.optional for a in schema.arguments)
        if t.optional != optional:
            raise ValueError(
                f"{where}: {t.name} may be None by the {'schema' if optional else 'contract'} only"
            )
    numbers = {a.name: a.type for a in schema.arguments if not a.is_tensor}
    if set(numbers) != {s.name for s in contract.scalars}:
        raise ValueError(
            f"{where}: by the schema {schema} its numbers are {sorted(numbers)}, by the contract "
            f"{sorted(s.name for s in contract.scalars)}"
        )
    for s in contract.scalars:
        if numbers[s.name] not in _SCALAR_TYPES[s.type]:
            raise ValueError(f"{where}: {s.name} is {numbers[s.name]} and {s.type}: these differ")
    used = {name for t in contract.tensors for name in t.shape}
    if unknown := sorted({e.name for e in contract.extents} - used):
        raise ValueError(f"{where}: no tensor has the extent {', '.join(unknown)}")
    if len(contract.tensors) > 16 or len(contract.extents) > 8 or len(contract.scalars) > 16:
        raise ValueError(f"{where}: at most 16 tensors, 8 extents and 16 numbers")
    if capture == "pointwise" and len({t.shape for t in contract.tensors}) != 1:
        raise ValueError(f"{where}: the tensors of a pointwise kernel have one shape")
    if fake is None and (capture not in ("pointwise", "norm") or not schema.results):
        if schema.results:
            raise ValueError(f"{where}: capture='{capture}' needs a shape rule: fake=")


def _check_signature(where: str, kernel: Any, contract: Contract) -> None:
    """The kernel takes what the contract says; not asked where the DSL hides its parameters."""
    try:
        parameters = list(inspect.signature(kernel).parameters)
    except (TypeError, ValueError):
        return
    names = [t.name for t in contract.tensors] + [s.name for s in contract.scalars]
    if parameters[:-1] != names:
        raise ValueError(
            f"{where}: the kernel takes ({', '.join(parameters)}), and by its contract it takes "
            f"({', '.join([*names, 'stream'])})"
        )


def _formula(where: str, schema: Any, backward: Any, setup_context: Any) -> Any:
    """(backward, setup_context) in torch's form; None without a gradient."""
    if backward is None:
        if setup_context is not None:
            raise ValueError(f"{where}: setup_context without a backward")
        return None
    if schema.mutates:
        raise ValueError(f"{where}: an op that changes its arguments has no backward")
    if setup_context is not None:
        return backward, setup_context
    from vibetensor.torch import _custom_op

    if isinstance(backward, str | _custom_op.CustomOpDef):
        function = _custom_op.found(backward)
        wanted = [a.name for a in function._schema.arguments]
    elif callable(backward):
        function = backward
        wanted = list(inspect.signature(backward).parameters)
    else:
        raise TypeError(f"{where}: backward is a function or a custom op, not {backward!r}")
    grads = ["grad"] if schema.single else [f"grad_{r}" for r in schema.results]
    arguments = [a.name for a in schema.arguments]
    known = {*grads, *arguments, *schema.results}
    if unknown := [w for w in wanted if w not in known]:
        raise ValueError(
            f"{where}: its backward asks for '{unknown[0]}'; there are {', '.join(sorted(known))}"
        )
    tensors = {a.name for a in schema.arguments if a.is_tensor} | set(schema.results)
    saved = [w for w in wanted if w in tensors]
    count = sum(a.is_tensor for a in schema.arguments)

    def keep(
        ctx: Any, inputs: Any, output: Any, keyword_only_inputs: Mapping[str, Any] | None = None
    ) -> None:
        values = dict(zip((a.name for a in schema.arguments if not a.keyword_only), inputs))
        values |= keyword_only_inputs or {}
        ctx.numbers = values_of(values, [w for w in wanted if w in values and w not in tensors])
        values |= dict(zip(schema.results, _tuple(output)))
        ctx.save_for_backward(*(values[s] for s in saved))

    def apply(ctx: Any, *given: Any) -> Any:
        values = {**ctx.numbers, **dict(zip(saved, ctx.saved_tensors)), **dict(zip(grads, given))}
        returned = _tuple(function(*(values[w] for w in wanted)))
        if len(returned) != count:
            raise RuntimeError(
                f"{schema}: its backward returned {len(returned)} gradients for {count} tensors"
            )
        by_tensor = iter(returned)
        positional = [a for a in schema.arguments if not a.keyword_only]
        return tuple(next(by_tensor) if a.is_tensor else None for a in positional)

    return apply, keep


def values_of(values: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: values[name] for name in names}
