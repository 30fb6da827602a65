"""The easy door: a function that is recorded on its first calls and replayed on the later ones."""

from __future__ import annotations

import copy
import functools
import inspect
import os
import sys
import threading
import types
import warnings
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import vibetensor.torch as vt
from vibetensor import _C
from vibetensor.graphs import passes
from vibetensor.graphs import verify as checks
from vibetensor.graphs.arguments import (
    CaptureError,
    Fixed,
    attributes_of,
    copies_apart,
    geometry,
    given,
    is_tensor,
    key_of,
    stage,
)
from vibetensor.graphs.course import Course, course
from vibetensor.graphs.dry import DryCapture, SchedulesAsTheyWere
from vibetensor.graphs.lower import Lowered, lower
from vibetensor.graphs.methods import Method
from vibetensor.graphs.put_off import PutOff
from vibetensor.graphs.record import Recording, record, recording_of, shared_memory
from vibetensor.graphs.session import Effects, Session
from vibetensor.graphs.structure import called, flatten, from_array, unflatten
from vibetensor.graphs.tape import Tape

# A run that makes lasting state (an optimizer's moments) is no steady step: the next one is. This
# many in a row are a step that never becomes steady.
_MOST_UNSTEADY = 4

# A recording costs as much as this many replays save, or so. Captures that do not live as long count
# against the budget for good, or a step whose tensors move all the time would be recorded each time.
_WORTH_KEEPING = 8


_MISSED = object()


@dataclass
class Gradient:
    """A leaf's .grad: the tensor the step reads at its start (None if it reads none), and the one it
    leaves (None if it leaves none)."""

    leaf: Any
    start: Any
    end: Any
    users: Any = None  # the user's own tensor and what `start` held, while a replay works on it


@dataclass
class Variant:
    """One captured course of the function: for one set of shapes, options and branches."""

    lowered: Lowered
    tape: Tape
    recording: Recording
    session: Session
    guard: Any
    inputs: list[Any]
    outputs: list[tuple[Any, Any]]  # (loan, how to make the tensor)
    result: Any
    gradients: list[Gradient]
    found: list[tuple[Any, bool]]  # leaves that it uses, and whether each had a .grad at its start
    arguments: list[Any]  # used as they are: the key holds them by identity, so they must live on
    apart: list[list[Any]]  # for each input the tensors in whose memory an argument may not lie
    verified: bool = False
    slow_replays: int = 0  # by the code below
    course: Course | None = None  # what the report tells of the call
    profile: Any = None  # the latest one

    def __post_init__(self) -> None:
        self.native = _C.graphs.Replay(
            program=self.lowered.program,
            guard=self.guard,
            course=self.session.course,
            tensors=self.session.tensors,
            inputs=self.inputs,
            transfers=self.lowered.fetched,
            acts=self.session.acts(),
            outputs=self.outputs,
            structure=self.result,
            build=functools.partial(unflatten, self.result),
            gradients=[(g.leaf, g.start, g.end) for g in self.gradients],
            found=self.found,
            apart=self.apart,
        )

    @property
    def replays(self) -> int:
        """How often it has been replayed."""
        return self.slow_replays + self.native.count

    def holds(self) -> bool:
        """Whether the tensors it is bound to are where they were."""
        return self.guard.holds() and self.session.same_tensors()

    def fits(self) -> bool:
        """Whether a call that its key belongs to would take its course."""
        return self.session.same_course() and self.holds() and self.native.gradients_as_found()


class CapturedStep(Method, Fixed):
    """A captured function; call it like the function. Made by `capture`.

    The first calls run the function and record it; once a call leaves no new state behind, later
    calls with the same shapes replay the record. Outputs keep their values however often the step
    is replayed afterwards; they carry no history for autograd.
    """

    def __init__(
        self,
        function: Callable[..., Any],
        *,
        max_variants: int,
        optimize: bool,
        verify: bool,
        pool: Any = None,
    ) -> None:
        functools.update_wrapper(self, function)
        self._lock = threading.RLock()  # replays work on one set of memory
        self._bound: weakref.WeakSet[CapturedStep] = weakref.WeakSet()
        self._verify = verify
        self._function = function
        self._max_variants = max_variants
        self._optimize = optimize
        self._pool = (0, 0) if pool is None else tuple(getattr(pool, "id", pool))
        self._pools: dict[str, Any] = {}  # by device
        self._variants: dict[Any, list[Variant]] = {}
        # The same by calls, for replays without Python code.
        self._replays = _C.graphs.Replays()
        self._replayed_keys: set[Any] = set()
        # Whose gradients a run changed, or looked at: those they had before it are known from the
        # next run on. What has a capture is held by that; the others are the program's own to drop.
        self._leaves: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
        self._optimizers: weakref.WeakSet[Any] = weakref.WeakSet()  # that stepped in a run
        self._effects = Effects()
        self._unsteady_runs = 0
        self._short_lived = 0  # captures that were dropped before they had paid
        self._warned: set[str] = set()
        self._captures = 0
        self._last: Variant | None = None
        self._once: Tape | None = None  # of the last run by a program that was not kept

    def _method(self, function: Callable[..., Any]) -> CapturedStep:
        bound = self._again(function)
        self._bound.add(bound)
        return bound

    def _again(self, function: Callable[..., Any]) -> CapturedStep:
        return CapturedStep(
            function,
            max_variants=self._max_variants,
            optimize=self._optimize,
            verify=self._verify,
            pool=self._pool,
        )

    def __copy__(self) -> CapturedStep:
        return self._again(self._function)

    def __deepcopy__(self, memo: dict[int, Any]) -> CapturedStep:
        """Of the same function, or the same method of the copied object; without captures."""
        copied = memo[id(self)] = self._again(copy.deepcopy(self._function, memo))
        return copied

    def __reduce__(self) -> Any:
        if (named := qualified_name(self)) is not None:
            return named
        options = (self._max_variants, self._optimize, self._verify, self._pool)
        return _restored, (self._function, *options)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with self._lock:
            result = self._replays.run(args, kwargs, _MISSED)
            return self._call(args, kwargs) if result is _MISSED else result

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if _C.graphs.recording() is not None:  # of another function, as a part of which it runs
            return self._function(*args, **kwargs)
        leaves, spec = flatten((args, kwargs))
        # Anomaly mode, saved_tensors_hooks and library.Mode look at the ops as they run.
        if _C.graphs.saved_hooks():
            return self._eager(leaves, spec)
        key = key_of(self._name, leaves, spec)
        variant = self._find(key)
        if variant is not None and not variant.native.stand_apart(leaves):
            variant = None  # recording it says why it is refused
        if variant is not None:
            if self._verify and not variant.verified:
                return self._verified(variant, leaves, spec)
            if key not in self._replayed_keys:
                self._add_replays(key, leaves, spec)
            return self._replay(variant, leaves)
        if self._short_lived < self._max_variants:
            return self._record(key, leaves, spec)
        self._warn_once("further ones run eagerly", stacklevel=4)
        return self._eager(leaves, spec)

    def _warn_once(self, what: str, stacklevel: int) -> None:
        if what not in self._warned:
            self._warned.add(what)
            warnings.warn(
                f"{self._name} has been captured {self._captures} times, for as many different "
                f"shapes, options, names outside of it or places of its tensors; {what} "
                f"(max_variants={self._max_variants})",
                stacklevel=stacklevel,
            )

    def _make_room(self) -> None:
        """Before one more capture: where there are as many as may be, the one that was replayed
        longest ago goes."""
        if len(self.variants) < self._max_variants:
            return
        oldest = min(self.variants, key=lambda variant: variant.native.last_used)
        for key, known in self._variants.items():
            if any(variant is oldest for variant in known):
                self._drop(key, [oldest])
                break
        self._warn_once("for each more the one used longest ago is dropped", stacklevel=7)

    def _drop(self, key: Any, variants: list[Variant]) -> None:
        kept = [v for v in self._variants[key] if not any(v is other for other in variants)]
        if kept:
            self._variants[key] = kept
        else:
            del self._variants[key]
        self._short_lived += sum(v.replays < _WORTH_KEEPING for v in variants)
        if key in self._replayed_keys:
            self._forget_replays()
        if any(self._last is v for v in variants):
            self._last = None

    def _eager(self, leaves: list[Any], spec: Any) -> Any:
        """A call that is neither recorded nor replayed; on copies of its arguments too."""
        staged = stage(leaves)
        shared = copies_apart(leaves, staged)
        versions = _C.graphs.Versions([copy for _, copy in shared])
        result = self._plain_call(leaves, staged, spec)
        if not versions.same():
            self._refuse_shared(shared[0][0])
        return result

    def _refuse_shared(self, argument: Any) -> None:
        raise CaptureError(
            f"{self._name} changes an argument of {tuple(argument.shape)} that shares memory with "
            "another argument and is not the same tensor, or changes that one: a captured function "
            "works on copies, and the change would not show in the other. Pass a clone of one"
        )

    def _find(self, key: Any) -> Variant | None:
        """The capture for this call. Those whose tensors have moved are dropped."""
        known = self._variants.get(key)
        if known is None:
            return None
        for variant in known:
            if variant.fits():
                return variant
        # Those whose tensors have moved will not come back.
        if moved := [variant for variant in known if not variant.holds()]:
            self._drop(key, moved)
        return None

    def _add_replays(self, key: Any, leaves: list[Any], spec: Any) -> None:
        """Calls with this key need not come here again while one of its variants fits."""
        known = self._variants[key]
        if self._verify and not all(variant.verified for variant in known):
            return
        self._replayed_keys.add(key)
        if any(attributes_of(x) is not None for x in leaves):
            return  # these may change between calls, and only the key looks
        natives = [variant.native for variant in known]
        self._replays.add(spec, leaves, natives)

    def _forget_replays(self) -> None:
        self._last = self.last
        self._replays.clear()
        self._replayed_keys.clear()

    @property
    def _name(self) -> str:
        return getattr(self._function, "__qualname__", repr(self._function))

    # --- recording

    def _record(self, key: Any, leaves: list[Any], spec: Any) -> Any:
        staged = stage(leaves)
        session = Session(self._effects)
        known = dict(self._leaves.items())  # strong references from here on
        before = {number: leaf.grad for number, leaf in known.items()}
        put_off = PutOff(session)
        with put_off.watching():
            # What is to be verified is compared with what the function itself does.
            later = None if self._verify else put_off
            recording = self._run(session, leaves, staged, spec, later)
        try:
            return self._keep(key, recording, session, put_off, leaves, staged, spec, before)
        except BaseException:
            put_off.catch_up(recording.native)  # the function has run
            raise

    def _keep(
        self,
        key: Any,
        recording: Recording,
        session: Session,
        put_off: PutOff,
        leaves: list[Any],
        staged: list[Any],
        spec: Any,
        before: dict[int, Any],
    ) -> Any:
        """What comes of a run that was recorded: a capture, if the next one will be like it. Returns
        what the call returns."""
        self._check_arguments(recording, leaves, staged)
        # A copy of an argument is a new leaf in each run, and nobody sees its .grad.
        copies = {id(place) for place in staged if place is not None}
        touched = (*recording.leaves, *session.parameters())
        used = {id(leaf): leaf for leaf in touched if id(leaf) not in copies}
        new_leaves = [leaf for number, leaf in used.items() if number not in before]
        self._leaves.update(used)
        self._optimizers.update(session.optimizers)
        result = recording.result
        copied = [(x, y) for x, y in zip(leaves, staged) if y is not None and is_tensor(x)]
        if why_not := shared_memory(recording, copied):
            put_off.catch_up(recording.native)
            self._give_up(f"{self._name} cannot be captured: {why_not}")
            return result
        outputs, out_spec = flatten(result)
        own = [*outputs, *(place.grad for place in staged if place is not None)]
        if new_leaves or session.notes.unsteady or self._lasting_state(recording, own):
            # The next run knows of these leaves before it starts; lasting state exists from then on.
            before.clear()  # gradients that the run dropped need no memory beside a program's
            # A first step that a GradScaler skips made state that is gone again.
            self._unsteady_runs += not session.notes.taken_back
            if self._unsteady_runs >= _MOST_UNSTEADY:
                self._unsteady_runs = 0
                put_off.catch_up(recording.native)
                self._give_up(self._unsteady(recording, own, new_leaves))
            elif recording.native.puts_off:
                self._run_once(recording, put_off)
            return result
        self._unsteady_runs = 0
        if why_not := session.lost():
            put_off.catch_up(recording.native)
            self._give_up(f"{self._name} cannot be captured: {why_not}")
            return result
        recording.result = None
        found = (_gradient(leaf, before[number], recording) for number, leaf in used.items())
        gradients = [gradient for gradient in found if gradient is not None]
        there = [(leaf, before[number] is not None) for number, leaf in used.items()]
        before.clear()
        arguments = [x for x, place in zip(leaves, staged) if place is None]
        variant = self._compile(
            recording, session, staged, outputs, out_spec, gradients, there, arguments
        )
        self._make_room()
        self._captures += 1
        variant.course = course(self._captures, unflatten(spec, leaves), session, there)
        if recording.native.puts_off:
            put_off.run(recording.native, variant.lowered.program)
            result = self._results(variant)
        self._variants.setdefault(key, []).append(variant)
        if key in self._replayed_keys:
            self._forget_replays()
        return result

    def _run_once(self, recording: Recording, put_off: PutOff) -> None:
        """Runs what a recording has put off, by a program that is not kept."""
        tape = passes.run(recording.tape) if self._optimize else recording.tape
        outputs = {buffer for buffer in tape.buffers if buffer.role == "output"}
        lowered = lower(tape, recording, {}, recorded=outputs, pool_of=self._pool_of)
        put_off.run(recording.native, lowered.program)
        self._once = tape

    def _run(
        self,
        session: Session,
        leaves: list[Any],
        staged: list[Any],
        spec: Any,
        put_off: PutOff | None = None,
    ) -> Recording:
        """Runs the function once, on what stands for its inputs, and records it."""
        arguments = (x for x in leaves if not is_tensor(x))
        session.about_to_run(self._function, arguments, [*self._optimizers])
        with session.watching():
            return record(
                lambda: self._plain_call(leaves, staged, spec),
                catch_up=None if put_off is None else put_off.catch_up,
                # A first run makes state, most often, and is not kept.
                thorough=self._unsteady_runs > 0,
            )

    def _plain_call(self, leaves: list[Any], staged: list[Any], spec: Any) -> Any:
        """Calls the function. Results come without history (a graph that lives on would hold all
        that was saved for backward), those that are inputs or gradients in memory of their own, and
        those made of the host's data, which are constants of a program."""
        inputs = [x if place is None else given(x, place) for x, place in zip(leaves, staged)]
        results, structure, altered = called(self._function, spec, inputs)
        if altered == "more":
            raise CaptureError(
                f"{self._name} puts something into a list or dict that it is given, and a replay would "
                "not: return it instead"
            )
        for x in results:
            if runs_later(x):
                raise CaptureError(
                    f"{self._name} returns a {type(x).__name__}, which runs later and once only, and "
                    "a replay would have nothing to give: return tensors, in a list say"
                )
        places = (*staged, *map(_C.graphs.gradient, self._leaves.values()))
        taken = {place._storage_key() for place in places if place is not None}
        return unflatten(structure, [_plain(x, taken) for x in results])

    def _check_arguments(self, recording: Recording, leaves: list[Any], staged: list[Any]) -> None:
        written = recording.written
        for leaf, place in zip(leaves, staged):
            if place is None or not is_tensor(leaf) or recording.native.find(leaf) < 0:
                continue
            if written & {recording.buffer_of(leaf), recording.buffer_of(place)}:
                raise CaptureError(
                    f"{self._name} changes an argument of {tuple(leaf.shape)} that it also uses by "
                    "another way (a closure, a global): the argument is a copy, and that use is "
                    "not. Use the argument, or leave it out"
                )
        for leaf, place in copies_apart(leaves, staged):
            if recording.buffer_of(place) in written:
                self._refuse_shared(leaf)

    def _lasting_state(self, recording: Recording, outputs: list[Any]) -> list[Any]:
        """Buffers that the run made and that live on, besides results and gradients."""
        holders: dict[Any, set[int]] = {}
        for x in (*outputs, *(leaf.grad for leaf in self._leaves.values())):
            if is_tensor(x) and (buffer := recording.buffer_of(x)) is not None:
                holders.setdefault(buffer, set()).add(id(x))
        results = {recording.buffer_of(x): x for x in outputs if is_tensor(x)}
        made = [b for b in recording.tape.buffers if b.role == "output"]
        return [
            buffer
            for buffer in made
            if buffer not in holders
            # Held by the tape and by those tensors, and by somebody else.
            or (
                buffer in results
                and _C.graphs.storage_uses(results[buffer]) > 1 + len(holders[buffer])
            )
        ]

    def _pool_of(self, device: str) -> Any:
        """The memory that all captures of the step share on a device."""
        if device not in self._pools:
            self._pools[device] = _C.graphs.Pool(device, self._pool)
        return self._pools[device]

    def _give_up(self, message: str) -> None:
        """The function has run, and a capture of it will never be right."""
        raise CaptureError(message)

    def _unsteady(self, recording: Recording, outputs: list[Any], new_leaves: list[Any]) -> str:
        places = [f"  the .grad of a tensor of {tuple(leaf.shape)}" for leaf in new_leaves[:5]]
        for buffer in self._lasting_state(recording, outputs)[:5]:
            for op in recording.tape.ops:
                if any(view.buffer is buffer for view in op.writes()):
                    places.append(f"  {op}")
                    break
        return (
            f"{self._name} leaves new tensors behind each time it runs, so that no two runs are "
            "the same; return them, or keep them in one tensor that is changed in place:\n"
            + "\n".join(places)
        )

    def _compile(
        self,
        recording: Recording,
        session: Session,
        staged: list[Any],
        outputs: list[Any],
        spec: Any,
        gradients: list[Gradient],
        found: list[tuple[Any, bool]],
        arguments: list[Any],
    ) -> Variant:
        stay = set()
        for gradient in gradients:
            buffer = None if gradient.end is None else recording.buffer_of(gradient.end)
            if buffer is not None and buffer.role == "output":
                stay.add(buffer)
        tape = passes.run(recording.tape) if self._optimize else recording.tape
        made_by = [recording.buffer_of(x) if is_tensor(x) else None for x in outputs]
        lent = dict.fromkeys(b for b in made_by if b is not None and b.role != "state")
        lowered = lower(
            tape,
            recording,
            {},
            recorded=stay,
            pool_of=self._pool_of,
            inputs=staged,
            results=lent,
        )
        loans: dict[Any, Any] = {}
        made = []
        for value, buffer in zip(outputs, made_by):
            if buffer is None or buffer.role == "state":
                made.append((None, value.detach() if isinstance(value, vt.Tensor) else value))
                continue
            if buffer not in loans:
                sent = lowered.sent.get(buffer, -1)
                loans[buffer] = _C.graphs.Loan(lowered.memory[buffer], sent)
            made.append((loans[buffer], geometry(value)))
        guard = _C.graphs.Guard()
        session.freeze()
        for tensor in (*recording.native.firsts(), *recording.leaves, *session.parameters()):
            guard.add(tensor)
        for gradient in gradients:
            for tensor in (gradient.start, gradient.end):
                if tensor is not None:
                    guard.add(tensor)
        return Variant(
            lowered,
            tape,
            recording,
            session,
            guard,
            staged,
            made,
            spec,
            gradients,
            found,
            arguments,
            _apart(recording, staged),
        )

    # --- replaying

    def _replay(self, variant: Variant, leaves: list[Any]) -> Any:
        if variant.lowered.device is not None:
            variant.lowered.program.join()
        try:
            self._enter(variant, leaves)
            for act in variant.session.host:
                act()
            variant.lowered.program.run()
        except BaseException:
            self._put_back(variant)
            raise
        return self._leave(variant)

    def _enter(self, variant: Variant, leaves: list[Any]) -> None:
        """Puts what a call brings where the program reads it."""
        with vt.no_grad():
            for target, value in zip(variant.inputs, leaves):
                if target is not None:
                    target.copy_(value if is_tensor(value) else from_array(value))
            for gradient in variant.gradients:
                gradient.users = None
                current = gradient.leaf.grad
                if gradient.start is not None and current is not gradient.start:
                    # The bound tensor may still be somebody's: its values come back afterwards.
                    gradient.users = (current, gradient.start.clone())
                    gradient.start.copy_(current)
        for loan, _ in variant.outputs:
            if loan is not None:
                loan.settle()

    def _leave(self, variant: Variant) -> Any:
        """What the call returns, and gradients where eager code looks for them."""
        variant.slow_replays += 1
        variant.native.touch()
        self._last = variant
        self._replays.forget_last()
        users_own = self._put_back(variant)
        for gradient in variant.gradients:
            if id(gradient) not in users_own and gradient.leaf.grad is not gradient.end:
                gradient.leaf.grad = gradient.end
        return self._results(variant)

    def _put_back(self, variant: Variant, ran: bool = True) -> set[int]:
        """Ends the work on bound tensors in place of the user's own gradients, also after an error:
        the user's have what the program did to them, as in eager code, if it `ran`, and the bound
        ones what they held. Returns which gradients (by id) are the user's own tensors still."""
        own: set[int] = set()
        with vt.no_grad():
            for gradient in variant.gradients:
                users, gradient.users = gradient.users, None
                if users is None:
                    continue
                current, kept = users
                if ran and gradient.end is gradient.start:
                    current.copy_(gradient.start)
                    own.add(id(gradient))
                gradient.start.copy_(kept)
        return own

    def _results(self, variant: Variant) -> Any:
        """What the program's latest run made, as the call returns it."""
        values = [
            loan.tensor(*how) if loan is not None else how.detach() if is_tensor(how) else how
            for loan, how in variant.outputs
        ]
        variant.lowered.program.extend()
        return unflatten(variant.result, values)

    def _verified(self, variant: Variant, leaves: list[Any], spec: Any) -> Any:
        """Runs the function and the program from one state; both must leave the same."""
        runs: list[Variant] = []
        try:
            return self._compared(variant, leaves, spec, runs)
        except BaseException:
            self._put_back(variant, ran=bool(runs))
            raise

    def _compared(self, variant: Variant, leaves: list[Any], spec: Any, runs: list[Variant]) -> Any:
        self._enter(variant, leaves)
        grads_before = [(leaf, leaf.grad) for leaf in self._leaves.values()]
        state = checks.state_tensors(variant.recording)
        snapshot = checks.Snapshot(list(state.values()), variant.tape)
        modes = checks.Modes(variant.session.modules)
        session, stepped = Session(), SchedulesAsTheyWere()
        with stepped.watching():
            again = self._run(session, leaves, variant.inputs, spec)
        rates = (variant.session.live_buffers(variant.recording), session.live_buffers(again))
        frozen = checks.frozen_numbers(variant.recording, again, *rates)
        if frozen:
            raise checks.CaptureMismatch(
                f"{self._name} does not do the same each time, and a replay would:\n  "
                + "\n  ".join(frozen[:10])
                + "\nPass what changes as a tensor argument, or a learning rate by param_groups"
            )
        with stepped.as_before(), modes.as_before():
            self._check_scalars(variant, leaves, spec, grads_before)
        expected = [x.detach().clone() for x in flatten(again.result)[0] if is_tensor(x)]
        grads = [g.leaf for g in variant.gradients if g.end is not None]
        expected += [leaf.grad.clone() for leaf in grads]
        # Gradients and constants that a run makes anew are no state of the other run.
        shared = [b for b in state if b not in rates[0] and again.buffer_of(state[b]) is not None]
        expected += [state[buffer].clone() for buffer in shared]
        names = checks.names_of_state(variant.recording, session.optimizers)
        kinds = [
            *["result"] * (len(expected) - len(grads) - len(shared)),
            *["gradient"] * len(grads),
        ]
        kinds += [names.get(buffer, "weight") for buffer in shared]
        random = checks.RandomNumbers(variant.tape)
        snapshot.restore()
        variant.session.read_like(session)
        runs.append(variant)
        variant.lowered.program.run()
        result = self._leave(variant)
        found = [x for x in flatten(result)[0] if is_tensor(x)]
        found += [leaf.grad for leaf in grads]
        found += [state[buffer] for buffer in shared]
        bound = checks.OF_A_STEP * variant.tape.bound
        same = checks.all_agree([x.detach() for x in found], expected, kinds, bound)
        if not same or not random.here():
            where = checks.first_difference(variant.recording, variant.tape, snapshot)
            raise checks.CaptureMismatch(f"a replay of {self._name} is not the function: {where}")
        variant.verified = True
        return result

    def _check_scalars(
        self, variant: Variant, leaves: list[Any], spec: Any, grads_before: list[tuple[Any, Any]]
    ) -> None:
        """Raises where numbers of the capture follow what a replay may find changed: the learning
        rate, step counts, the seed. Records the function once more with others, without running."""
        grads = [(leaf, leaf.grad) for leaf, _ in grads_before]
        for leaf, grad in grads_before:
            leaf.grad = grad
        dry = DryCapture([self._function, *leaves])
        try:
            with variant.session.otherwise():
                dry.begin()
                try:
                    self._plain_call(leaves, variant.inputs, spec)
                except Exception:
                    return  # a schedule past its end, say: it does not take other numbers
                finally:
                    dry.abandon()
        finally:
            for leaf, grad in grads:
                leaf.grad = grad
        other = recording_of(dry.native, None)
        rates = (variant.session.live_buffers(variant.recording), dry.session.live_buffers(other))
        frozen = checks.frozen_numbers(variant.recording, other, *rates)
        if frozen:
            raise checks.CaptureMismatch(
                f"{self._name} computes numbers from the learning rate, a step count or the seed, "
                "and a replay would go on with those of the recording. With other ones:\n  "
                + "\n  ".join(frozen[:10])
                + "\nCompute them from tensors, or pass what changes as an argument"
            )

    # --- looking at it

    @property
    def variants(self) -> list[Variant]:
        """What has been captured so far."""
        return [variant for known in self._variants.values() for variant in known]

    @property
    def last(self) -> Variant | None:
        """The one that was replayed last."""
        native = self._replays.last
        return next((v for v in self.variants if v.native is native), self._last)

    def tape(self) -> Tape:
        """The tape of the latest capture, after the passes."""
        return self._latest().tape

    def report(self) -> str:
        """What was captured, and why again: ops, passes, memory, time if it was profiled."""
        from vibetensor.graphs.report import report

        return report(self._name, self.variants)

    def profile(self, *args: Any, **kwargs: Any) -> Any:
        """Times each op in replays that run op by op; returns a `Profile`, which prints.

        Given the arguments of a call, it takes the capture for them; without any, the one that ran
        last, with the inputs of that call. It is no step: weights, optimizer state, gradients,
        random numbers and schedules are afterwards as they were.
        """
        from vibetensor.graphs.profile import profile

        with self._lock:
            variant, leaves = self._latest(), None
            if args or kwargs:
                leaves, spec = flatten((args, kwargs))
                found = self._find(key_of(self._name, leaves, spec))
                if found is None:
                    raise CaptureError(
                        f"{self._name} has no capture for these arguments: call it with them first"
                    )
                variant = found
            variant.profile = profile(variant, leaves)
            return variant.profile

    def report_html(self, path: str | os.PathLike[str]) -> None:
        """Writes a page for a browser, one file that needs no network: ops with their lines, what
        the passes did, the memory plan over time, and time by op of what was profiled."""
        from vibetensor.graphs.report_html import report_page

        page = report_page(self._name, self._captured(), self.last)
        write_text(path, page)

    def to_dot(self) -> str:
        """The latest capture as a graph in DOT: ops by phase, and what each reads."""
        from vibetensor.graphs.dot import to_dot

        return to_dot(self.tape(), self._name)

    def debug_dump(self, path: str | os.PathLike[str]) -> None:
        """Writes `to_dot` to a file."""
        write_text(path, self.to_dot())

    def chrome_trace(self, path: str | os.PathLike[str]) -> None:
        """Writes the latest capture's profile for Perfetto or chrome://tracing; takes one if there
        is none yet."""
        from vibetensor.graphs.trace_events import trace_text

        with self._lock:
            variant = self._latest()
            timed = variant.profile or self.profile()
            part = (variant.tape, variant.lowered.plans, timed)
            write_text(path, trace_text(self._name, [part]))

    def reset(self) -> None:
        """Forgets every capture and gives their memory back."""
        with self._lock:
            self._forget_replays()
            self._variants.clear()
            self._pools.clear()
            self._leaves.clear()
            for bound in tuple(self._bound):
                bound.reset()
            self._last = self._once = None
            self._unsteady_runs = self._short_lived = 0

    def _captured(self) -> list[Variant]:
        variants = self.variants
        if not variants:
            raise CaptureError(f"{self._name} has not been captured yet: call it first")
        return variants

    def _latest(self) -> Variant:
        return self.last or self._captured()[-1]


def capture(
    function: Callable[..., Any] | None = None,
    *,
    max_variants: int = 16,
    optimize: bool = True,
    verify: bool = False,
    pool: Any = None,
) -> Any:
    """Captures a whole training step (or any function of tensors) and replays it.

    ``step = capture(train_step)`` or ``@capture``. The first call runs the function and records
    its ops; later calls copy their tensors into the places of the recorded inputs and run the
    record: the same numbers as eager, without Python, shape inference, autograd or allocation. They
    are the same bit for bit but where a pass adds in another order on a GPU.

    function: takes and returns tensors, arrays, constants and containers of them. Parameters,
    optimizer state, buffers, random numbers, learning rates and schedules it uses are found by
    themselves. What Python does besides (printing, counting) happens in recording calls only.

    max_variants: how many courses (shapes, options, branches) are kept. For one more the one that
    was replayed longest ago is dropped; once as many have been dropped before they paid, calls that
    have none run eagerly. Both are told by a warning.

    optimize: False replays the recorded ops as they are.

    verify: True checks each capture once, at the first call that could replay it: the function runs
    as well, from the same state, and a difference raises CaptureMismatch, with the first op that
    differs or the number that Python changes from step to step.

    pool: a handle of a memory pool on the device (``cuda.graph_pool_handle()``, ``CUDAGraph.pool()``,
    a ``MemPool``): steps of one pool share memory for their intermediates. Not used on the CPU.

    Raises RuntimeError at an op that reads a tensor on the host (``item()``, ``numpy()``, printing,
    data-dependent shapes), with its line. What the function did before is done, as after any error
    in eager code; of the capture nothing is left.
    """
    if function is None:
        return functools.partial(
            capture, max_variants=max_variants, optimize=optimize, verify=verify, pool=pool
        )
    if isinstance(function, vt.nn.Module):
        _check_runs_at_once(function.forward)
        function = _ModuleCall(function)
    _check_runs_at_once(function)
    return CapturedStep(
        function, max_variants=max_variants, optimize=optimize, verify=verify, pool=pool
    )


class _ModuleCall:
    """A module's call as a function, which copies and pickles with it."""

    def __init__(self, module: Any) -> None:
        functools.update_wrapper(self, module.forward)
        self._module = module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._module(*args, **kwargs)

    def __reduce__(self) -> Any:
        return _ModuleCall, (self._module,)


def _check_runs_at_once(function: Any) -> None:
    """Raises TypeError for what is no function, or one that runs after its call has returned."""
    if not callable(function):
        raise TypeError(f"capture takes a function or a module, got {type(function).__name__}")
    while isinstance(function, functools.partial):
        function = function.func
    for code in (function, vars(type(function)).get("__call__")):
        if inspect.isgeneratorfunction(code):
            kind = "a generator"
        elif inspect.iscoroutinefunction(code) or inspect.isasyncgenfunction(code):
            kind = "an async"
        else:
            continue
        name = getattr(function, "__qualname__", type(function).__name__)
        raise TypeError(
            f"{name} is {kind} function, whose ops run after the call has returned: a capture "
            "would have none. Capture the function that it calls for each step"
        )


def qualified_name(wrapper: Any) -> Any:
    """How a pickle finds what wraps a function: by its name where that leads to it, as after a
    decorator, or as a method of its object; None elsewhere."""
    function = wrapper._function
    if isinstance(function, types.MethodType):
        name = function.__func__.__name__
        found = getattr(function.__self__, name, None)
        return (getattr, (function.__self__, name)) if found is wrapper else None
    found = sys.modules.get(getattr(function, "__module__", None) or "")
    name = getattr(function, "__qualname__", "")
    for part in name.split("."):
        found = getattr(found, part, None)
    return name if found is wrapper else None


def runs_later(value: Any) -> bool:
    """Whether what the function does is done as its result is asked for, a generator say."""
    return isinstance(value, Iterator | Awaitable | AsyncIterator)


def itself(value: Any) -> Any:
    """What a pickle makes of a wrapper that stays behind."""
    return value


def _restored(
    function: Any, max_variants: int, optimize: bool, verify: bool, pool: Any
) -> CapturedStep:
    return CapturedStep(
        function, max_variants=max_variants, optimize=optimize, verify=verify, pool=pool
    )


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file for people."""
    # A file name of the program that is not UTF-8 has lone surrogates; they are shown as "?".
    with open(path, "w", encoding="utf-8", errors="replace") as file:
        file.write(text)


def _apart(recording: Recording, staged: list[Any]) -> list[list[Any]]:
    """For each input the tensors of the step in whose memory an argument may not lie: those that the
    step changes or, where it changes the input, uses. What it does there a copy would not show."""
    written = recording.written
    copies = {place._storage_key() for place in staged if place is not None}
    used = [t for t in recording.native.firsts() if t._storage_key() not in copies]
    changed = [t for t in used if recording.buffer_of(t) in written]
    return [
        [] if place is None else used if recording.buffer_of(place) in written else changed
        for place in staged
    ]


def _plain(value: Any, taken: set[int]) -> Any:
    if not is_tensor(value):
        return value
    value = value.detach()
    if value._storage_key() in taken or _C.graphs.host_made(value):
        return value.clone()
    return value


def _gradient(leaf: Any, before: Any, recording: Recording) -> Gradient | None:
    """None where the step only looks whether there is one, and leaves it."""
    reads = before is not None and recording.native.find(before) >= 0
    if not reads and leaf.grad is before:
        return None
    return Gradient(leaf, before if reads else None, leaf.grad)
