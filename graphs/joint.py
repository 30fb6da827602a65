"""A differentiable function as two programs: its forward, and its backward.

The forward is recorded dry with autograd on; what autograd saves lies in memory that the programs
share. The backward is recorded from there when it is first asked for. A replay of the forward
overwrites what is saved: while somebody may still go back through the last one, `free` says no.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import verify as checks
from vibetensor.graphs.dry import Captured, DryCapture, PoolOf
from vibetensor.graphs.record import recording_of, shared_memory
from vibetensor.torch.autograd.function import Function
from vibetensor.torch.random import _set_states as set_random_states
from vibetensor.torch.random import _states as random_states

_MOST_BACKWARDS = 8  # of one forward: other results used, other layouts of gradients
_MODIFIED = (
    "one of the variables needed for gradient computation has been modified by an inplace operation "
    "since the compiled function ran"
)
_SIMPLE = (int, float, bool, str, bytes, type(None), tuple)


class Refused(Exception):
    """Why a function cannot be replayed."""


class Trains(Exception):
    """The function runs backward or an optimizer itself."""


@dataclass
class Pools:
    """The memory for intermediates that forwards and backwards share on accelerators: they run one
    after another, on whatever streams.

    handle: the name of a pool; (0, 0) makes a new one.
    """

    handle: tuple[int, int] = (0, 0)
    by_device: dict[str, Any] = field(default_factory=dict)

    def of(self, device: str) -> Any:
        """The pool there."""
        if device not in self.by_device:
            self.by_device[device] = _C.graphs.Pool(device, self.handle)
        return self.by_device[device]


class Joint:
    """One captured course of ``function(inputs) -> results``, a flat list of each.

    inputs: as a call brings them. Tensors are copied into static ones. names_of: the callable whose
    globals and closure are watched. outer: a module whose forward the function is; its own hooks are
    the caller's. pools: where intermediates lie; None for memory that no other shares. Raises Refused
    with the reason, Trains, or what the function raises; nothing has happened then.
    """

    def __init__(
        self,
        function: Callable[[list[Any]], list[Any]],
        inputs: list[Any],
        *,
        optimize: bool,
        names_of: Any = None,
        outer: Any = None,
        pools: Pools | None = None,
    ) -> None:
        self._outer = outer
        self._function = function
        self.spec: Any = None  # the caller's note of how results are put together
        self._optimize = optimize
        self._static = static_inputs(inputs)
        self._pools = Pools() if pools is None else pools
        roots = [function, names_of, outer, *inputs]
        probed = probe(lambda: function(self._static), inputs, self._static, roots, outer)
        # After the first run, which fills caches: what the second one binds anew it always will.
        self._names = _C.graphs.Watch()
        probed.dry.session.surroundings_of(names_of).watch(self._names)
        if probed.trains:
            raise Trains
        dry = DryCapture(roots)
        try:
            self._record(dry)
            self._check_steady(probed, dry)
        except BaseException:
            dry.take_back()
            probed.dry.take_back()
            raise
        dry.forget()
        probed.dry.forget()

    def _check_steady(self, probed: Probed, dry: DryCapture) -> None:
        first, facts = probed.recording, probed.facts
        if probed.dry.session.sets_modes or self._forward.session.sets_modes:
            raise Refused("it leaves modules in another mode (train, eval) than it found them in")
        frozen = checks.frozen_numbers(first, self._forward.recording, [], [])
        if frozen:
            raise Refused("it does not do the same each time: " + frozen[0])
        if changed := dry.changed():
            raise Refused(f"it changes {changed}")
        if _facts(self._forward.session.modules) != facts:
            raise Refused("it changes attributes of its modules")
        if not self._names.holds():
            raise Refused("it binds names outside of itself (global, nonlocal)")

    # --- recording

    def _record(self, dry: DryCapture) -> None:
        dry.begin()
        try:
            if self._outer is not None:
                dry.session._on_module(self._outer)
            results = self._function(self._static)
        finally:
            dry.stop()
        self._forward = dry.compile(self._optimize, collect=False, pool_of=self._pools.of)
        recording = self._forward.recording
        self._results = results
        _check_results(recording, results)
        self._leaves = _leaves_of(results)
        self._wanted = [t for t in _distinct(self._static) if t.requires_grad]
        static = {id(t) for t in self._wanted}
        self._leaves = [leaf for leaf in self._leaves if id(leaf) not in static]
        for tensor in recording.native.firsts():
            if tensor.requires_grad and not tensor.is_leaf:
                raise Refused("it uses a tensor with history that is no argument")
        for module in self._forward.session.modules:
            if module is not self._outer and hooked(module):
                raise Refused(f"{type(module).__name__} has hooks")
        self._differentiable = [
            i for i, r in enumerate(results) if isinstance(r, vt.Tensor) and r.requires_grad
        ]
        for leaf in self._leaves:
            self._forward.guard.add(leaf)
        self._values = [r.detach() if isinstance(r, vt.Tensor) else r for r in results]
        self._tensors = [v for v in self._values if isinstance(v, vt.Tensor)]
        self._plain = [
            at
            for at, r in enumerate(r for r in results if isinstance(r, vt.Tensor))
            if not r.requires_grad
        ]
        # Where a call finds what is copied, and what wants a gradient: each tensor once.
        places = {id(t): at for at, t in reversed([*enumerate(self._static)])}
        self._copied = sorted(places[id(t)] for t in _distinct(self._static))
        self._places = [self._static[at].detach() for at in self._copied]
        self._sources = [at for at in self._copied if self._static[at].requires_grad]
        # What autograd may have saved, as it was then: replays and optimizers change it, and it is
        # what a backward is to read.
        memory = [recording.memory(b) for b in recording.tape.buffers if b.role == "output"]
        self._state = [*recording.native.firsts(), *self._leaves]
        written = recording.written
        self._changed_memory = {
            t._storage_key() for t in self._state if recording.buffer_of(t) in written
        }
        self._at_forward: list[int] = []
        self._saved = [*memory, *_distinct(self._static), *self._state]
        self._saved_versions = _C.graphs.versions(self._saved)
        self._backwards: dict[Any, _Backward] = {}
        self._mark = vt.zeros(())  # what a call saves, to see whether its history was freed
        self._generation = 0
        self.broken = ""  # why its backward cannot be recorded
        self._context: Any = None

    # --- which calls it serves

    def holds(self) -> bool:
        """Whether what it is bound to is where it was."""
        return self._forward.guard.holds() and self._forward.session.same_tensors()

    def same_course(self) -> bool:
        """Whether Python would decide again as it did."""
        return self._forward.session.same_course() and self._names.holds()

    def apart(self, inputs: list[Any]) -> bool:
        """Whether no argument lies in memory that the function changes by another way."""
        return not self._changed_memory or not any(
            isinstance(x, vt.Tensor) and x._storage_key() in self._changed_memory for x in inputs
        )

    def free(self) -> bool:
        """Whether nobody can go back through the last call any more."""
        context = self._context and self._context()
        if context is None:
            return True
        try:
            return not context.saved_tensors
        except RuntimeError:
            return True

    @property
    def differentiable(self) -> bool:
        """Whether any result requires grad."""
        return bool(self._differentiable)

    def used(self, inputs: list[Any]) -> set[int]:
        """The ids of the inputs and leaves that the results depend on by their history."""
        reached = {id(leaf) for leaf in _leaves_of(self._results)}
        pairs = zip(inputs, self._static, strict=True)
        return reached | {id(value) for value, static in pairs if id(static) in reached}

    def captures(self) -> list[tuple[str, list[Captured]]]:
        """What a report tells of: the forward, and the backward if there was one."""
        backwards = [program.captured for program in self._backwards.values()]
        named = [("forward", [self._forward]), ("backward", backwards)]
        return [(name, found) for name, found in named if found]

    # --- calls

    def __call__(self, inputs: list[Any]) -> list[Any]:
        """The results for these inputs, in memory of their own and with history."""
        if not self._differentiable:
            self._replay(inputs)
            made = self._copies()
        elif vt.is_grad_enabled():
            made = _Replay.apply(self, inputs, *self._sources_of(inputs))
        else:
            with vt.enable_grad():  # as the function itself did
                made = _Replay.apply(self, inputs, *self._sources_of(inputs))
        if len(made) == len(self._values):
            return list(made)
        tensors = iter(made)
        return [next(tensors) if isinstance(v, vt.Tensor) else v for v in self._values]

    def _sources_of(self, inputs: list[Any]) -> list[Any]:
        """What a gradient is passed on to."""
        return [*(inputs[at] for at in self._sources), *self._leaves]

    def _replay(self, inputs: list[Any]) -> None:
        program = self._forward.lowered.program
        program.join()  # earlier runs read their inputs before others are written
        _C.graphs.copy_into(self._places, [inputs[at] for at in self._copied])
        program.run()
        self._forward.slow_replays += 1
        self._generation += 1
        self._at_forward = _C.graphs.versions(self._state)
        for program in self._backwards.values():
            program.state.note()

    def _copies(self) -> list[Any]:
        """The results of the last replay."""
        made = _C.graphs.copies(self._tensors)
        self._forward.lowered.program.extend()
        return made

    def _versions(self, inputs: list[Any]) -> list[int]:
        return _C.graphs.versions([*(inputs[at] for at in self._copied), *self._leaves])

    def forward(self, ctx: Any, inputs: list[Any]) -> tuple[Any, ...]:
        """What autograd calls."""
        ctx.joint, ctx.inputs = self, inputs
        ctx.random = random_states() if self._forward.tape.draws else None
        self._replay(inputs)
        ctx.generation = self._generation
        ctx.versions = self._versions(inputs)
        ctx.save_for_backward(self._mark)
        ctx.set_materialize_grads(False)
        self._context = weakref.ref(ctx)
        results = self._copies()
        if self._plain:
            ctx.mark_non_differentiable(*(results[at] for at in self._plain))
        return tuple(results)

    def backward(self, ctx: Any, grads: tuple[Any, ...]) -> list[Any]:
        """Gradients of the sources and leaves that want one."""
        _ = ctx.saved_tensors  # raises where the history was freed
        given = [g for at, g in enumerate(grads) if at not in self._plain]
        if vt.is_grad_enabled() or ctx.generation != self._generation or _C.graphs.recording():
            return self._recompute(ctx, given)
        wanted = ctx.needs_input_grad[2:]
        key = (
            tuple(None if g is None else (tuple(g.shape), g.stride(), g.dtype) for g in given),
            wanted,
            _C._get_autocast("cpu"),
            _C._get_autocast("cuda"),
            _C._kernel_switches(),
        )
        program = self._backwards.get(key)
        if program is None:
            program = self._record_backward(given, wanted)
            if program is None:
                return self._recompute(ctx, given)
            before = dict(zip((t._storage_key() for t in self._state), self._at_forward))
            if any(before.get(t._storage_key(), t._version) != t._version for t in program.read):
                raise RuntimeError(_MODIFIED)
            program.state.note()
            self._backwards[key] = program
        elif not program.state.same():
            raise RuntimeError(_MODIFIED)
        elif not program.captured.guard.holds():
            return self._recompute(ctx, given)
        return program(given)

    def _record_backward(self, given: list[Any], wanted: tuple[bool, ...]) -> _Backward | None:
        if len(self._backwards) >= _MOST_BACKWARDS or self.broken:
            return None
        sources = [*self._wanted, *self._leaves]
        outputs = [
            (self._results[i], g) for i, g in zip(self._differentiable, given) if g is not None
        ]
        now = _C.graphs.versions(self._saved)
        try:
            _set_versions(self._saved, self._saved_versions)
            with _C.graphs.HooksOff(self._leaves):
                return _Backward(
                    outputs,
                    [t for t, wants in zip(sources, wanted) if wants],
                    wanted,
                    self._forward,
                    self._optimize,
                    self._pools.of,
                )
        except RuntimeError as error:
            self.broken = str(error)
            return None
        finally:
            _set_versions(self._saved, now)

    def _recompute(self, ctx: Any, given: list[Any]) -> list[Any]:
        """Gradients from the function itself, run once more on what the call was given."""
        inputs = ctx.inputs
        session = self._forward.session
        state = checks.state_tensors(self._forward.recording)
        written = self._changed_state()
        if self._versions(inputs) != ctx.versions:
            raise RuntimeError(_MODIFIED)
        if not (session.same_course() and session.same_tensors()):
            raise RuntimeError(
                "the modules of a compiled function have changed since it ran (train(), eval(), a "
                "parameter that was replaced), and this backward needs to run it once more"
            )
        kept = checks.Snapshot(
            [state[b] for b in written if b in state], self._forward.recording.tape
        )
        tensors = self._sources_of(inputs)
        wanted = ctx.needs_input_grad[2:]
        create = vt.is_grad_enabled()
        if create:
            # Two nodes stand for the function now, and add what eager adds in another order.
            self.broken = "its backward is differentiated again"
        random = random_states()
        try:
            if ctx.random is not None:
                set_random_states(ctx.random)
            with vt.enable_grad():
                results = self._function(inputs)
        finally:
            set_random_states(random)
            kept.restore()
        pairs = [(results[i], g) for i, g in zip(self._differentiable, given) if g is not None]
        found: Any = iter([None] * sum(wanted))
        if pairs:
            with _C.graphs.HooksOff(tensors):  # they run where these gradients arrive
                made = vt.autograd.grad(
                    [y for y, _ in pairs],
                    [t for t, wants in zip(tensors, wanted) if wants],
                    [g for _, g in pairs],
                    create_graph=create,
                    allow_unused=True,
                )
            found = iter(made)
        return [next(found) if wants else None for wants in wanted]

    def _changed_state(self) -> set[Any]:
        """State that the forward updates. Raises if the results depend on what it was before."""
        ops = [op for op in self._forward.tape.ops if not op.is_view]
        written = {v.buffer for op in ops for v in op.writes() if v.buffer.role == "state"}
        depends = set(written)
        for op in ops:
            if any(v.buffer in depends for v in op.reads()):
                depends.update(v.buffer for v in op.writes())
        buffers = map(self._forward.recording.buffer_of, _distinct(self._values))
        if any(buffer in depends for buffer in buffers):
            raise RuntimeError(
                "this backward needs to run a compiled function once more, and its results depend "
                "on state that it changes: compile with disable=True for that"
            )
        return written


@dataclass
class Probed:
    """A first look at what a run does: its recording, the attributes of its modules afterwards, whether
    it trains, and what it changes in Python. One that trains has been taken back, others `dry` can take
    back."""

    recording: Any
    facts: list[Any]
    trains: bool
    changed: str
    dry: DryCapture


def probe(
    run: Callable[[], list[Any]],
    inputs: list[Any],
    static: list[Any],
    roots: list[Any],
    outer: Any = None,
) -> Probed:
    """Runs it dry. Raises Refused if a replay would not do what a run does, and what the run raises;
    everything is as before then, or StateLost is raised.

    static: what stands for the inputs in it. roots: what it is and what it was given.
    """
    dry = DryCapture(roots)
    dry.begin()
    try:
        if outer is not None:
            dry.session._on_module(outer)
        results = run()
        native, session = dry.native, dry.session
        trains = bool(native.leaves() or session.optimizers or session.host)
        if trains and any(map(_has_history, results)):
            raise Refused("it trains, and its results have history for more: return x.detach()")
    except BaseException:
        dry.abandon()
        raise
    try:
        dry.stop()
        del results
        if native.gradients_before() and not trains:
            raise Refused("it sets gradients, and leaves backward to others")
        native.find_escapes()
        recording = recording_of(native, None, collect=not trains)
        if why_not := shared_memory(recording):
            raise Refused(why_not)
        _check_inputs(recording, inputs, static)
        lasting = {b for b in recording.tape.buffers if b.role == "output"}
        for op in recording.tape.ops if lasting and not trains else ():
            if any(view.buffer in lasting for view in op.writes()):
                raise Refused(f"it keeps tensors that it makes, besides its results: {op}")
    except BaseException:
        dry.take_back()
        dry.check_taken_back()
        raise
    probed = Probed(recording, _facts(session.modules), trains, dry.changed(), dry)
    native.put_back_tensors()
    if trains:
        dry.take_back()
        dry.check_taken_back()
        dry.forget()
    return probed


def _check_inputs(recording: Any, inputs: list[Any], static: list[Any]) -> None:
    for value, copy in zip(inputs, static, strict=True):
        if not isinstance(value, vt.Tensor):
            continue
        if recording.native.find(value) >= 0:
            raise Refused("an argument is also used by another way (a closure, a global)")
        if recording.native.find(copy) >= 0 and recording.buffer_of(copy) in recording.written:
            raise Refused(f"it changes an argument of {tuple(copy.shape)} in place")
        if copy.requires_grad != value.requires_grad:
            raise Refused("it changes whether an argument requires grad")


class _Backward:
    """The backward of a Joint for one choice of gradients that come and are wanted."""

    def __init__(
        self,
        outputs: list[tuple[Any, Any]],
        sources: list[Any],
        wanted: tuple[bool, ...],
        forward: Captured,
        optimize: bool,
        pool_of: PoolOf,
    ) -> None:
        self._wanted = wanted
        self._static = [_static_like(g) for _, g in outputs]
        dry = DryCapture()
        dry.begin()
        try:
            found = vt.autograd.grad(
                [y for y, _ in outputs],
                sources,
                self._static,
                retain_graph=True,
                allow_unused=True,
            )
            dry.stop()
            self.captured = dry.compile(optimize, collect=False, pool_of=pool_of)
        except BaseException:
            if _C.graphs.recording() is not None:
                dry.stop()
            dry.take_back()
            raise
        self._found = [None if g is None else g.detach() for g in found]
        made = forward.recording.native
        fresh = {b.index for b in forward.recording.tape.buffers if b.role != "state"}
        own = {g._storage_key() for g in self._static}
        # What is read as it was before the forward: it must not have changed in between.
        self.read = [
            t
            for t in self.captured.recording.native.firsts()
            if made.find(t) not in fresh and t._storage_key() not in own
        ]
        self.state = _C.graphs.Versions(self.read)

    def __call__(self, given: list[Any]) -> list[Any]:
        program = self.captured.lowered.program
        program.join()
        _C.graphs.copy_into(self._static, [g for g in given if g is not None])
        program.run()
        self.captured.slow_replays += 1
        found = _C.graphs.copies(self._found)
        program.extend()
        if len(found) == len(self._wanted):
            return found
        wanted = iter(found)
        return [next(wanted) if wants else None for wants in self._wanted]


class _Replay(Function):
    """The call of a Joint that autograd sees."""

    @staticmethod
    def forward(ctx: Any, joint: Joint, inputs: list[Any], *tensors: Any) -> Any:
        return joint.forward(ctx, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return (None, None, *ctx.joint.backward(ctx, grads))


def _set_versions(tensors: list[Any], versions: list[int]) -> None:
    for tensor, version in zip(tensors, versions, strict=True):
        _C.graphs.set_version(tensor, version)


def _distinct(values: list[Any]) -> list[Any]:
    """The tensors among them, each once."""
    return list({id(v): v for v in values if isinstance(v, vt.Tensor)}.values())


def _core(tensor: Any) -> Any:
    """Without the repetitions of an expanded tensor."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _static_like(tensor: Any) -> Any:
    """A copy in memory of its own, with the same strides where that can be."""
    return _core(tensor.detach()).clone().expand(tensor.shape)


def static_inputs(inputs: list[Any]) -> list[Any]:
    """Copies that stand for what a call brings. Arguments that share memory have copies of their own: one
    that is changed is refused."""
    made: dict[int, Any] = {}
    static = []
    for value in inputs:
        if not isinstance(value, vt.Tensor):
            static.append(value)
            continue
        if id(value) not in made:
            made[id(value)] = _static_like(value).requires_grad_(value.requires_grad)
        static.append(made[id(value)])
    return static


def _check_results(recording: Any, results: list[Any]) -> None:
    seen = set()
    for value in results:
        if not isinstance(value, vt.Tensor):
            if not isinstance(value, _SIMPLE):
                raise Refused(f"it returns a {type(value).__name__}")
            continue
        buffer = recording.buffer_of(value)
        if buffer is None or buffer.role != "output":
            raise Refused("it returns a tensor that it did not make (an argument, a parameter)")
        if buffer in seen:
            raise Refused("two of its results share memory")
        seen.add(buffer)


def _has_history(value: Any) -> bool:
    """Whether a backward from here is still possible."""
    if not isinstance(value, vt.Tensor) or value.grad_fn is None:
        return False
    try:
        vt.autograd.grad(
            value, _leaves_of([value]), vt.empty_like(value), retain_graph=True, allow_unused=True
        )
    except RuntimeError:
        return False
    return True


def _leaves_of(results: list[Any]) -> list[Any]:
    """Tensors whose gradient a backward from here accumulates."""
    found: dict[int, Any] = {}
    open_ = [r.grad_fn for r in results if isinstance(r, vt.Tensor) and r.grad_fn is not None]
    seen = set(open_)
    while open_:
        node = open_.pop()
        variable = getattr(node, "variable", None)
        if isinstance(variable, vt.Tensor):
            found[id(variable)] = variable
        for after, _ in node.next_functions:
            if after is not None and after not in seen:
                seen.add(after)
                open_.append(after)
    return list(found.values())


def hooked(module: Any) -> bool:
    """Whether a call of the module runs hooks."""
    return module._hooked and bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def _facts(modules: list[Any]) -> list[Any]:
    """Attributes of modules that a forward may have read: plain values, and which tensors."""
    return [
        [
            (key, id(value) if isinstance(value, vt.Tensor) else value)
            for key, value in module.__dict__.items()
            if key not in ("training", "_hooked") and _is_plain(value)
        ]
        for module in modules
    ]


def _is_plain(value: Any) -> bool:
    if type(value) is tuple:
        return all(map(_is_plain, value))
    return type(value) in _SIMPLE or isinstance(value, vt.Tensor)
