"""``torch.compile``: a model or function whose calls are recorded and replayed where that is right,
and run as they are where it may not be."""

from __future__ import annotations

import copy
import functools
import os
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor._environment import env_flag
from vibetensor.graphs.arguments import CaptureError, modes
from vibetensor.graphs.capture import (
    CapturedStep,
    itself,
    qualified_name,
    runs_later,
    write_text,
)
from vibetensor.graphs.course import Course
from vibetensor.graphs.dry import StateLost
from vibetensor.graphs.joint import Joint, Refused, Trains, hooked, probe, static_inputs
from vibetensor.graphs.methods import Method
from vibetensor.graphs.structure import called, flatten, unflatten
from vibetensor.torch.nn.modules import hooks

_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


class _OnceMore(Exception):
    """Why a call has to run as it is, where others are or may be captured."""


class _Training(CapturedStep):
    """A captured step that goes on eagerly where a capture would be an error."""

    refused = ""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._filling: set[Any] = set()  # keys of calls that changed something once
        self._failed: Counter[Any] = Counter()  # calls that could not be captured, by key

    def _record(self, key: Any, leaves: list[Any], spec: Any) -> Any:
        # Dry first: what cannot be captured is found before it has done half of its work.
        static = static_inputs(leaves)
        roots = [self._function, *leaves]
        try:
            probed = probe(lambda: _results(self._function, spec, static), leaves, static, roots)
        except (Refused, StateLost):
            raise
        except Exception as error:  # it comes again where the function runs as it is
            self._failed[key] += 1
            again = self.variants and self._failed[key] < self._max_variants
            raise (_OnceMore if again else Refused)(str(error)) from error
        if probed.changed:
            # A first call may fill caches, which the next one finds.
            if key in self._filling:
                raise Refused(f"it changes {probed.changed}, and a replay would not")
            self._filling.add(key)
            raise _OnceMore
        return super()._record(key, leaves, spec)

    def _give_up(self, message: str) -> None:
        self.refused = message


class Compiled(Method):
    """A function whose calls are captured by shape, options and modes.

    One that runs backward and an optimizer itself is a whole step (see `capture`); of others the
    forward and, where results require grad, the backward are captured. Calls that cannot be run as
    they are, after one warning; with fullgraph they raise `CaptureError`.
    """

    def __init__(
        self, function: Callable[..., Any], *, fullgraph: bool, max_variants: int, optimize: bool
    ) -> None:
        functools.update_wrapper(self, function)
        self._function = function
        self._fullgraph = fullgraph
        self._max_variants = max_variants
        self._optimize = optimize
        self._lock = threading.RLock()
        self._known: dict[Any, list[Joint]] = {}
        self._eager: dict[Any, str] = {}  # why
        self._steps: set[Any] = set()
        self._step: _Training | None = None
        self._last: Joint | _Training | None = None  # what ran last
        self._warned = False
        self._off = False  # no call can be captured

    def _method(self, function: Callable[..., Any]) -> Compiled:
        return Compiled(
            function,
            fullgraph=self._fullgraph,
            max_variants=self._max_variants,
            optimize=self._optimize,
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self._function, memo)

    def __copy__(self) -> Any:
        return self._function

    def __reduce__(self) -> Any:
        """Captures belong to this process: pickles are what the name of a decorated function leads to
        there, and the function itself where that is another one."""
        return qualified_name(self) or (itself, (self._function,))

    @property
    def captured_forward(self) -> Callable[..., Any]:
        """What it runs, for copies of a module whose forward it is."""
        return self._function

    @property
    def _name(self) -> str:
        return getattr(self._function, "__qualname__", type(self._function).__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if (
            _C.graphs.recording() is not None
            or _C.graphs.saved_hooks()
            or vt.is_inference_mode_enabled()
            or self._off
            or hooks.any_global
            or not self._lock.acquire(blocking=False)
        ):
            return self._function(*args, **kwargs)
        try:
            return self._call(args, kwargs)
        finally:
            self._lock.release()

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        inputs, spec = flatten((args, kwargs))
        try:
            key = _key(inputs, spec)
        except Refused as refused:
            return self._run_eagerly(None, str(refused), args, kwargs)
        if key in self._eager:
            return self._function(*args, **kwargs)
        if key in self._steps:
            return self._run_step(key, args, kwargs)
        known = self._known.get(key, [])
        for joint in known:
            if joint.same_course() and joint.holds():
                if joint.broken:
                    return self._run_eagerly(key, joint.broken, args, kwargs)
                if not (joint.free() and joint.apart(inputs)):
                    return self._function(*args, **kwargs)
                return self._unflattened(joint, inputs)
        # Those whose tensors have moved will not come back.
        self._known[key] = known = [j for j in known if j.holds()]
        if sum(map(len, self._known.values())) >= self._max_variants:
            message = f"it has been captured {self._max_variants} times, for as many shapes"
            return self._run_eagerly(None, message, args, kwargs)
        return self._record(key, inputs, spec, args, kwargs)

    def _unflattened(self, joint: Joint, inputs: list[Any]) -> Any:
        self._last = joint
        return unflatten(joint.spec, joint(inputs))

    def _record(self, key: Any, inputs: list[Any], spec: Any, args: Any, kwargs: Any) -> Any:
        if _hooked(self._function):
            return self._run_eagerly(None, "its modules have hooks", args, kwargs)
        structure: list[Any] = []

        def function(values: list[Any]) -> list[Any]:
            return _results(self._function, spec, values, structure)

        owner = getattr(self._function, "__self__", None)
        outer = owner if isinstance(owner, vt.nn.Module) else None
        try:
            joint = Joint(
                function,
                inputs,
                optimize=self._optimize,
                names_of=self._function,
                outer=outer,
            )
        except Trains:
            self._steps.add(key)
            return self._run_step(key, args, kwargs)
        except StateLost:
            raise
        except Exception as error:
            return self._run_eagerly(key, str(error), args, kwargs)
        joint.spec = structure[0]
        self._known.setdefault(key, []).append(joint)
        return self._unflattened(joint, inputs)

    def _run_step(self, key: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self._step is None:
            self._step = _Training(
                self._function,
                max_variants=self._max_variants,
                optimize=self._optimize,
                verify=False,
            )
        step = self._step
        try:
            result = step(*args, **kwargs)
        except _OnceMore as once:
            if str(once):
                return self._run_eagerly(None, str(once), args, kwargs)
            return self._function(*args, **kwargs)
        except (Refused, CaptureError) as error:  # before it has run
            self._steps.discard(key)
            return self._run_eagerly(key, str(error), args, kwargs)
        if step.refused:
            self._steps.discard(key)
            self._note(key, step.refused)
            step.refused = ""
        else:
            self._last = step
        return result

    def _run_eagerly(self, key: Any, reason: str, args: Any, kwargs: Any) -> Any:
        if self._fullgraph:
            raise CaptureError(f"torch.compile(fullgraph=True): {self._name}: {reason}")
        result = self._function(*args, **kwargs)
        self._note(key, reason)
        return result

    def _note(self, key: Any, reason: str) -> None:
        if self._fullgraph:
            raise CaptureError(f"torch.compile(fullgraph=True): {self._name}: {reason}")
        if key is not None:
            self._eager[key] = reason
            # Looking at each new shape once more costs, and finds the same.
            captured = any(self._known.values()) or self._steps
            self._off = len(self._eager) >= self._max_variants and not captured
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"torch.compile: {self._name} runs as it is: {reason}", UserWarning, stacklevel=5
            )

    def report(self) -> str:
        """What was captured, and which calls run as they are and why."""
        from vibetensor.graphs.report import report

        with self._lock:
            parts = [
                report(f"{self._name}, {part}", captures)
                for joints in self._known.values()
                for joint in joints
                for part, captures in joint.captures()
            ]
            if self._step is not None:
                parts.append(self._step.report())
            parts += [f"{self._name} runs as it is: {why}" for why in self._eager.values()]
        return "\n\n".join(parts) or f"{self._name}: not called yet"

    def profile(self) -> Any:
        """Times each op of what ran last, a step or a forward with its backward, in replays that run
        op by op; returns a `Profile`, which prints. It is no call: tensors and random numbers are
        afterwards as they were.

        Raises RuntimeError while the last call's backward may still come.
        """
        from vibetensor.graphs.profile import joined, profile

        with self._lock:
            last = self._last
            if isinstance(last, Joint) and not last.free():
                raise RuntimeError(
                    f"{self._name}: somebody may still go back through the last call, and a profile "
                    "runs over what it saved: profile after its backward"
                )
            parts = self._latest()
            for part in parts:
                part.profile = profile(part)
            return joined([(part.tape, part.profile) for part in parts])

    def report_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page for a browser with every capture: see `CapturedStep.report_html`."""
        from vibetensor.graphs.report_html import report_page

        with self._lock:
            latest = self._latest()[0]
            if isinstance(self._last, CapturedStep):
                captures: list[Any] = self._last.variants
            else:
                joints = (joint for known in self._known.values() for joint in known)
                captures = [one for j in joints for _, found in j.captures() for one in found]
                for number, one in enumerate(captures, 1):
                    one.course = Course(number, {})
            page = report_page(self._name, captures, latest)
        write_text(path, page)

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the profile of what ran last for Perfetto or chrome://tracing; takes one if there is
        none yet."""
        from vibetensor.graphs.trace_events import trace_text

        with self._lock:
            if any(part.profile is None for part in self._latest()):
                self.profile()
            parts = [(part.tape, part.lowered.plans, part.profile) for part in self._latest()]
            text = trace_text(self._name, parts)
        write_text(path, text)

    def _latest(self) -> list[Any]:
        """The captures that ran last, in the order they run."""
        if isinstance(self._last, Joint):
            return [found[-1] for _, found in self._last.captures()]
        variants = [] if self._last is None else self._last.variants
        if not variants:
            raise CaptureError(f"{self._name} has not been captured yet: call it first")
        return [self._last.last or variants[-1]]  # type: ignore[union-attr]

    def reset(self) -> None:
        """Forgets every capture and gives their memory back."""
        with self._lock:
            self._known.clear()
            self._eager.clear()
            self._steps.clear()
            self._step = self._last = None
            self._warned = self._off = False


class OptimizedModule(vt.nn.Module):
    """A module whose calls are captured; everything else is the original's, in ``_orig_mod``.

    Parameters are the original's own; names in ``state_dict()`` begin with ``_orig_mod.``, as
    torch's do: save ``model._orig_mod.state_dict()`` for plain names.
    """

    _orig_mod: vt.nn.Module

    def __init__(self, module: vt.nn.Module, compiled: Compiled) -> None:
        super().__init__()
        self._modules["_orig_mod"] = module
        object.__setattr__(self, "_compiled", compiled)
        self.__dict__.pop("training", None)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The original's call."""
        return self._compiled(*args, **kwargs)

    @property
    def training(self) -> bool:  # pyright: ignore
        """The original's."""
        return self._modules["_orig_mod"].training  # pyright: ignore

    @training.setter
    def training(self, mode: bool) -> None:
        if "_orig_mod" in self.__dict__.get("_modules", ()):
            self._modules["_orig_mod"].training = mode  # pyright: ignore

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules", {})
        if name in modules:
            return modules[name]
        if "_orig_mod" not in modules:
            raise AttributeError(name)
        return getattr(modules["_orig_mod"], name)

    def __setattr__(self, name: str, value: Any) -> None:
        own = name == "training" or name in self.__dict__  # the latter say which hooks it has
        if own or "_orig_mod" not in self.__dict__.get("_modules", ()):
            object.__setattr__(self, name, value)
        else:
            setattr(self._modules["_orig_mod"], name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._modules["_orig_mod"], name)

    def __bool__(self) -> bool:
        return bool(self._modules["_orig_mod"])

    def __len__(self) -> int:
        return len(self._modules["_orig_mod"])  # pyright: ignore

    def __getitem__(self, index: Any) -> Any:
        return self._modules["_orig_mod"][index]  # pyright: ignore

    def __dir__(self) -> list[str]:
        return sorted({*super().__dir__(), *dir(self._modules["_orig_mod"])})

    def __reduce__(self) -> Any:
        compiled = self._compiled
        options = {"optimize": compiled._optimize}
        again = functools.partial(
            compile,
            fullgraph=compiled._fullgraph,
            recompile_limit=compiled._max_variants,
            options=options,
        )
        return (again, (self._modules["_orig_mod"],))


def _results(
    function: Callable[..., Any], spec: Any, values: list[Any], structure: list[Any] | None = None
) -> list[Any]:
    """What the function returns for these arguments, flat; `structure` gets how it is put together.
    Raises Refused where a replay would not do what the function does with its arguments."""
    results, made, altered = called(function, spec, values)
    if altered:
        raise Refused("it changes a list or dict that it is given")
    for x in results:
        if runs_later(x):
            raise Refused(f"it returns a {type(x).__name__}, which runs later")
    if structure is not None:
        structure[:] = [made]
    return results


def _hooked(function: Any) -> bool:
    """Whether hooks would run in a recording as well."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, vt.nn.Module):  # its own hooks are around this call
        inner = [m for m in owner.modules() if m is not owner]
        return any(map(hooked, inner))
    if not isinstance(function, vt.nn.Module):
        return False
    return any(map(hooked, function.modules()))


def compile(
    model: Any = None,
    *,
    fullgraph: bool = False,
    backend: Any = None,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    disable: bool = False,
    recompile_limit: int | None = None,
) -> Any:
    """See `vibetensor.torch.compile`."""
    if mode is not None and options is not None:
        raise RuntimeError(
            "Either mode or options can be specified, but both can't be specified at the same time."
        )
    if mode is not None and mode not in _MODES:
        raise RuntimeError(f"Unrecognized mode={mode}, should be one of: {', '.join(_MODES)}")
    if model is None:
        return functools.partial(
            compile,
            fullgraph=fullgraph,
            mode=mode,
            options=options,
            backend=backend,
            disable=disable,
            recompile_limit=recompile_limit,
        )
    if not callable(model):
        raise TypeError(f"compile() takes a module or a function, got {type(model).__name__}")
    if disable or backend == "eager" or not env_flag("VT_COMPILE", True):
        return model
    limit = 16 if recompile_limit is None else recompile_limit
    optimize = bool((options or {}).get("optimize", True))
    made = Compiled(model, fullgraph=fullgraph, max_variants=limit, optimize=optimize)
    return OptimizedModule(model, made) if isinstance(model, vt.nn.Module) else made


def _key(inputs: list[Any], spec: Any) -> Any:
    parts: list[Any] = [spec, modes()]
    places: dict[int, int] = {}
    for value in inputs:
        if isinstance(value, vt.Tensor):
            first = places.setdefault(id(value), len(parts))
            parts.append(
                (
                    first,
                    tuple(value.shape),
                    value.stride(),
                    value.dtype,
                    str(value.device),
                    value.requires_grad,
                )  # fmt: skip
            )
        elif isinstance(value, float):
            parts.append((float, value.hex()))  # 0.0 and -0.0 are equal, and not the same
        elif value is None or isinstance(value, (int, str, bytes, vt.dtype, vt.device)):
            parts.append((type(value), value))
        else:
            raise Refused(f"an argument of type {type(value).__name__} may change unseen")
    key = tuple(parts)
    try:
        hash(key)
    except TypeError as error:
        raise Refused(str(error)) from None
    return key
