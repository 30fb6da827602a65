"""Generated steps give the same bits eagerly and captured: as test_random_programs.py, with tensors of several
shapes and dtypes, changes through views that are not contiguous, several backwards, gradients that add up
and are read, an optimizer, and functions from outside.

`VT_TEST_PROGRAMS=50` runs 50 times as many, here and there."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture, foreign
from vibetensor.graphs.passes import chains

from .default_device import kind
from .test_random_programs import (
    TIMES,
    Program,
    leave_any_sum_in_parts,
    recompute_anything,
)

PROGRAMS = 36 * TIMES
BLOCKS = 6
STEPS = 6  # the first ones record, the later ones replay
SHAPES = [(4, 4), (3, 7), (1, 5), (33, 16), (130, 40), (2, 3, 4), (8,), (64, 65)]
FLOATS = [vt.float32, vt.float32, vt.float64, vt.bfloat16, vt.float16]
INTEGERS = [vt.int64, vt.int32, vt.int8, vt.uint8, vt.bool]

VIEWED = ["mul_columns", "add_steps", "fill_diagonal_band", "swap_halves", "add_through_two_views"]
MIXED = [
    "compare", "count", "pick", "gather", "cumsum", "sort", "amax", "add_dtype", "to_int", "var",
    "logsumexp", "index_add", "stack", "flip", "prod_row", "squeeze", "baddbmm", "foreign",
    "foreign_part", "foreign_unread",
]  # fmt: skip
CALLS = ["backward", "grad", "accumulate"]


class Step:
    """A step drawn once, with a state of its own kind."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed + 10_000)
        self.shape = SHAPES[int(rng.integers(len(SHAPES)))]
        self.dtypes = [FLOATS[int(rng.integers(len(FLOATS)))] for _ in range(2)]
        self.integer = INTEGERS[int(rng.integers(len(INTEGERS)))]
        inner = Program(seed)
        self.instructions: list[tuple[str, float, float]] = []
        for instruction in inner.instructions:
            self.instructions.append(instruction)
            draw = rng.random()
            names = VIEWED if draw < 0.2 else MIXED if draw < 0.6 else CALLS if draw < 0.75 else []
            if names:
                self.instructions.append((str(rng.choice(names)), rng.random(), rng.random()))
        self.optimizer = [None, "SGD", "AdamW", "by hand"][int(rng.integers(4))]
        self.zero = [None, True, False][int(rng.integers(3))]  # set_to_none, or no zero_grad
        self.autocast = bool(rng.random() < 0.2)

    def made(self) -> dict[str, Any]:
        """Weights and state."""
        rng = np.random.default_rng(7)
        weights = [
            vt.tensor(rng.standard_normal(self.shape).astype(np.float32)).to(dtype).requires_grad_()
            for dtype in self.dtypes
        ]
        state = vt.tensor(rng.standard_normal(self.shape).astype(np.float32))
        counts = vt.zeros(self.shape, dtype=vt.int64)
        kinds = {"SGD": vt.optim.SGD, "AdamW": vt.optim.AdamW}
        optimizer = None
        if self.optimizer in kinds:
            options = {"momentum": 0.9} if self.optimizer == "SGD" else {}
            optimizer = kinds[self.optimizer](weights, lr=1e-2, **options)
        return {"weights": weights, "state": state, "counts": counts, "optimizer": optimizer}

    def __call__(self, own: dict[str, Any], x: Any, n: Any) -> Any:
        weights, state = own["weights"], own["state"]
        if self.zero is not None:
            for weight in weights:
                if self.zero:
                    weight.grad = None
                elif weight.grad is not None:
                    weight.grad.zero_()
        with vt.autocast(kind(), vt.bfloat16, enabled=self.autocast):
            values = [x * weights[0], weights[1].float() + x, state * 0.5, n.to(self.integer)]
            for name, a, b in self.instructions:
                made = self._apply(
                    name, values[int(a * len(values))], values[int(b * len(values))], b, weights
                )
                if made is not None and made.numel() <= 40_000:
                    values.append(made)
            total = sum((_summed(v) for v in values[2:]), _summed(values[0]) + _summed(values[1]))
        total.backward()
        if own["optimizer"] is not None:
            own["optimizer"].step()
        elif self.optimizer == "by hand":
            with vt.no_grad():
                for weight in weights:
                    weight.sub_(weight.grad.clamp(-1, 1) * 0.01)
        with vt.no_grad():
            state.mul_(0.9).add_(values[-1].detach().float().mean().nan_to_num().clamp(-10, 10))
            own["counts"].add_(n)
        return total, [values[-1], values[len(values) // 2]]

    def _apply(self, name: str, a: Any, b: Any, r: float, weights: list[Any]) -> Any:
        if name in VIEWED:
            return _changed_through_views(name, a, r)
        if name in MIXED:
            return _mixed(name, a, b, r)
        if name in CALLS:
            return self._differentiated(name, a, weights)
        try:
            return Program._apply(name, a, b, r)
        except (RuntimeError, ValueError, TypeError) as error:
            # Not for integers, or for these shapes: the same eagerly and captured, but no replay
            # would know of an error that a captured function catches.
            raise _NoProgram(f"{name}: {error}") from None

    @staticmethod
    def _differentiated(name: str, a: Any, weights: list[Any]) -> Any:
        """A backward in the middle, of a part that is computed again for it."""
        if not a.requires_grad or a.numel() == 0:
            return None
        loss = a.float().square().mean()
        if name == "backward":
            loss.backward(retain_graph=True)
            return None
        if name == "grad":
            found = vt.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
            grads = [g for g in found if g is not None]
            return grads[0].float() * 0.5 if grads else None
        for part in range(2):  # two micro-batches
            (weights[part].float().square().mean() * 0.1).backward()
        return weights[0].grad.detach().float() * 0.25


class _NoProgram(Exception):
    """The instructions do not fit the tensors."""


def _summed(value: Any) -> Any:
    return value.float().nan_to_num(0.0, 1.0, -1.0).clamp(-1e4, 1e4).sum()


def _changed_through_views(name: str, a: Any, r: float) -> Any:
    target = a * 1 if a.requires_grad or a.numel() == 0 or 0 in a.stride() else a
    if target.dtype == vt.bool or target.dim() < 2 or min(target.shape) < 2:
        return None
    if name == "mul_columns":
        target[:, 1:].mul_(2)
    elif name == "add_steps":
        target[::2].add_(target[1:2].clone())
    elif name == "fill_diagonal_band":
        target.transpose(0, 1)[1:, :1].fill_(int(r * 5))
    elif name == "swap_halves":
        half = target.shape[0] // 2
        first = target[:half].clone()
        target[:half].copy_(target[half : 2 * half])
        target[half : 2 * half].copy_(first)
    else:
        flat = target.transpose(0, 1)
        flat[1:].add_(1)
        target[1:].sub_(2)
        return flat * 1
    return target


def _mixed(name: str, a: Any, b: Any, r: float) -> Any:
    number = a.dtype != vt.bool
    if a.dim() == 0 or a.numel() == 0:
        return None
    if name == "compare":
        return (a > a.flip(0)) if r < 0.5 else (a == a)
    if name == "count":
        return (a > 0).sum(-1)
    if name == "pick":
        return a.index_select(0, vt.arange(a.shape[0]) % max(1, a.shape[0] // 2))
    if name == "gather":
        index = vt.zeros(a.shape, dtype=vt.int64) + (a.shape[-1] - 1)
        return a.gather(-1, index)
    if name == "cumsum":
        return a.cumsum(0) if number else None
    if name == "sort":
        return a.sort(dim=-1)[0] if number else None
    if name == "amax":
        return a.amax(-1) if number else None
    if name == "add_dtype":
        other = b if b.shape == a.shape else b.float().mean()
        return a + other
    if name == "to_int":
        clean = a.float().nan_to_num(0.0, 3.0, -3.0).clamp(-50, 50)
        return clean.to([vt.int64, vt.int32, vt.int16][int(r * 3)])
    if name.startswith("foreign"):
        return _by_others(name, a, r)
    if not number:
        return None
    if name == "var":
        return a.float().var(0, unbiased=False)
    if name == "logsumexp":
        return a.float().logsumexp(-1)
    if name == "index_add":
        rows = vt.arange(a.shape[0]) % max(1, a.shape[0] - 1)
        return vt.zeros(a.shape, dtype=a.dtype).index_add(0, rows, a)
    if name == "stack":
        return vt.stack([a, a * 2], int(r * (a.dim() + 1))) if a.dim() < 3 else None
    if name == "flip":
        return a.flip(-1) - a
    if name == "prod_row":
        return a.float().clamp(-1.1, 1.1).prod(-1)
    if name == "squeeze":
        return a[:1].squeeze(0)
    if a.dim() != 2 or not a.is_floating_point():
        return None
    batch = a.unsqueeze(0)
    return vt.baddbmm(batch @ batch.transpose(1, 2), batch, batch.transpose(1, 2)) * 0.01


def _by_others(name: str, a: Any, r: float) -> Any:
    """Ops that a recording does not see, in a declared call."""
    source = a.detach()
    if name == "foreign_part":  # in place, in a part of what is there
        made = (source * 1 if a.requires_grad or 0 in a.stride() else source)[: a.shape[0] // 2 + 1]
        foreign(lambda t, x: t.copy_(x), made, made.flip(0), writes=[made])
        return made
    made = vt.empty_like(source)
    foreign(lambda x, out: out.copy_(x.flip(0)), source, made, writes=[made])
    if name == "foreign_unread":
        return source + source if r < 0.5 else None
    return made


def _run(step: Step, captured: bool, optimize: bool) -> tuple[list[np.ndarray], float]:
    """What each step leaves, and how far it may be from the ops as they were recorded."""
    vt.manual_seed(11)
    rng = np.random.default_rng(5)
    own = step.made()
    inputs = [
        (
            vt.tensor(rng.standard_normal(step.shape).astype(np.float32)),
            vt.tensor(rng.integers(0, 5, step.shape)),
        )
        for _ in range(STEPS)
    ]

    def run(x: Any, n: Any) -> Any:
        return step(own, x, n)

    function = capture(run, optimize=optimize) if captured else run
    seen, kept = [], []
    for x, n in inputs:
        total, others = function(x, n)
        kept.append([total, *others])
        seen += [_values(w.grad) for w in own["weights"] if w.grad is not None]
    for results in kept:
        seen += [_values(t) for t in results]
    seen += [_values(t) for t in (*own["weights"], own["state"], own["counts"])]
    if captured:
        assert sum(v.replays for v in function.variants) >= STEPS - 4
    bounds = [v.tape.bound for v in function.variants] if captured else [0.0]
    return seen, max(bounds)


def _values(tensor: Any) -> np.ndarray:
    return tensor.detach().double().numpy().copy()


@pytest.mark.parametrize("block", range(BLOCKS))
def test_steps(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(chains, "LEAST_16_BIT", 0)
    monkeypatch.setattr(chains, "MOST_TENSORS", 16)
    recompute_anything(monkeypatch)
    leave_any_sum_in_parts(monkeypatch)
    ran = 0
    for seed in range(block, PROGRAMS, BLOCKS):
        step = Step(seed)
        try:
            eager, _ = _run(step, False, True)
        except _NoProgram:
            continue
        except RuntimeError as error:  # a saved value changed in place: no program for autograd
            assert "inplace" in str(error) or "in-place" in str(error), (seed, step.instructions)
            continue
        ran += 1
        captured, bound = _run(step, True, seed % 4 != 0)
        message = f"step {seed}: {step.shape} {step.dtypes} {step.optimizer} {step.instructions}"
        assert bound == 0 or vt.get_default_device().type != "cpu", message
        assert len(eager) == len(captured), message
        for mine, other in zip(captured, eager):
            if bound == 0:
                np.testing.assert_array_equal(mine, other, err_msg=message)
            else:
                largest = np.abs(other[np.isfinite(other)]).max(initial=0)
                # A later step goes on from the earlier one's weights.
                allowed = 8 * STEPS * bound * largest
                np.testing.assert_allclose(mine, other, 0, allowed, err_msg=message)
    assert ran > PROGRAMS / BLOCKS / 3
