"""Generated programs give the same bits eagerly and captured: views, in-place changes, broadcasting,
several dtypes, random numbers, backward, state that lives between steps."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from vibetensor.graphs import capture
from vibetensor.graphs.passes import chains, late_sums, recompute

TIMES = int(os.environ.get("VT_TEST_PROGRAMS", "1"))  # as many programs
PROGRAMS = 600 * TIMES
STEPS = 5  # the first ones record, the later ones replay

UNARY = ["tanh", "sigmoid", "exp", "neg", "abs", "relu", "square", "sin"]
BINARY = ["add", "sub", "mul", "maximum", "minimum"]
IN_PLACE = ["tanh_", "neg_", "mul_two", "add_other", "fill_part", "copy_part", "clamp_"]
VIEWS = ["t", "row", "rows", "flat", "unsqueeze", "expand", "step"]
OTHER = [
    "sum", "mean0", "matmul", "cat", "where", "to", "softmax", "dropout", "clone", "again",
    "chain", "row_chain", "mask", "masked", "zeros", "to_and_back",
]  # fmt: skip


class Program:
    """A list of instructions drawn once and run on any tensors of the same shapes."""

    # What fusing passes look for.
    FUSED = ["add_norm", "add_rms", "norm_half", "mlp", "loss", "half_loss"]

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.instructions = []
        for _ in range(int(rng.integers(4, 18))):
            kind = rng.choice(
                ["unary", "binary", "in_place", "view", "other", "fused"],
                p=[0.2, 0.2, 0.15, 0.15, 0.15, 0.15],
            )
            names = {
                "unary": UNARY, "binary": BINARY, "in_place": IN_PLACE, "view": VIEWS, "other": OTHER,
                "fused": self.FUSED,
            }[kind]  # fmt: skip
            self.instructions.append((str(rng.choice(names)), rng.random(), rng.random()))
        self.backward = bool(rng.random() < 0.6)
        self.updates_state = bool(rng.random() < 0.6)

    def __call__(self, x: Any, y: Any, weight: Any, state: Any) -> Any:
        if self.backward:
            weight.grad = None
        values = [x * weight if self.backward else x * 1.0, y + 1, state * 0.5]
        for name, a, b in self.instructions:
            first = values[int(a * len(values))]
            second = values[int(b * len(values))]
            made = self._apply(name, first, second, b)
            if made is not None:
                values.append(made)
        total = sum((v.float().sum() for v in values[3:]), values[0].float().sum())
        if self.backward:
            (total + (weight * 0.1).sum()).backward()
        if self.updates_state:
            with vt.no_grad():
                state.mul_(0.9).add_(values[-1].detach().float().mean().clamp(-10, 10))
        return total, [values[-1], values[len(values) // 2]]

    @staticmethod
    def _fused(name: str, a: Any, b: Any, r: float) -> Any:
        """Ops that follow each other as in models: norms of sums, linears with an activation,
        losses of logits."""
        functional = vt.nn.functional
        if not a.is_floating_point() or a.dim() == 0 or a.numel() == 0:
            return None
        if name in ("add_norm", "add_rms"):
            total = a + (b if b.shape == a.shape and b.is_floating_point() else a * r)
            norm = functional.layer_norm if name == "add_norm" else functional.rms_norm
            return norm(total, total.shape[-1:]) + (total if r < 0.5 else 0.0)
        if name == "norm_half":
            normed = functional.layer_norm(a.float(), a.shape[-1:])
            return normed.to(vt.bfloat16) * (1.0 if r < 0.5 else normed.to(vt.float16))
        if a.dim() != 2:
            return None
        if name == "mlp":
            activation = [functional.relu, functional.gelu, functional.silu][int(r * 3)]
            fits = b.shape == a.shape and b.dtype == a.dtype
            return activation(functional.linear(a, b if fits else a))
        logits = a * 1.5 if name == "loss" else (a * 1.5).to(vt.bfloat16).float()
        return functional.cross_entropy(logits, vt.arange(a.shape[0]) % a.shape[1])

    @staticmethod
    def _apply(name: str, a: Any, b: Any, r: float) -> Any:
        if name in Program.FUSED:
            return Program._fused(name, a, b, r)
        if name in UNARY:
            return getattr(a, name)() if name != "exp" else a.clamp(max=4).exp()
        if name == "sub":  # masks have no differences
            a, b = (x.to(vt.uint8) if x.dtype == vt.bool else x for x in (a, b))
        if name in BINARY:
            try:
                return getattr(vt, name)(a, b)
            except RuntimeError:  # shapes that do not broadcast
                return getattr(vt, name)(a, b.float().mean())
        if name in IN_PLACE:
            fresh = a.clone() if a.requires_grad or not a.is_contiguous() else a
            with_grad = a * 1.0 if a.requires_grad else fresh
            if name == "tanh_":
                return with_grad.tanh_() if with_grad.is_floating_point() else None
            if name == "neg_":
                return with_grad.neg_()
            if name == "mul_two":
                return with_grad.mul_(2)
            if name == "clamp_":
                return with_grad.clamp_(-3, 3)
            if name == "add_other":
                return with_grad.add_(b.float().mean().to(with_grad.dtype).detach())
            if with_grad.dim() == 0 or with_grad.shape[0] < 2:
                return None
            part = with_grad[1:]
            if name == "fill_part":
                part.fill_(r)
            else:
                part.copy_(with_grad[:-1].clone())
            return with_grad
        if name == "t":
            return a.transpose(0, 1) if a.dim() == 2 else None
        if name == "row":
            return a[0] if a.dim() > 0 and a.shape[0] > 0 else None
        if name == "rows":
            return a[1:] if a.dim() > 0 and a.shape[0] > 1 else None
        if name == "step":
            return a[::2] if a.dim() > 0 else None
        if name == "flat":
            return a.reshape(-1)
        if name == "unsqueeze":
            return a.unsqueeze(0) if a.dim() < 3 else None
        if name == "expand":
            return a.unsqueeze(0).expand(2, *a.shape) if a.dim() < 2 else None
        if name == "sum":
            return a.sum()
        if name == "mean0":
            return a.float().mean(0) if a.dim() > 0 else None
        if name == "matmul":
            return a @ a.transpose(0, 1) * 0.1 if a.dim() == 2 and a.dtype == vt.float32 else None
        if name == "cat":
            return vt.cat([a, a]) if a.dim() > 0 else None
        if name == "where":
            return vt.where(a > 0, a, a * 0.5)
        if name == "to":
            return a.to([vt.float64, vt.bfloat16, vt.float16][int(r * 3)])
        if name == "softmax":
            return a.softmax(-1) if a.dim() > 0 and a.is_floating_point() else None
        if name == "dropout":
            return vt.nn.functional.dropout(a, 0.3)
        if name == "again":  # computed twice, for the pass that finds that
            return (a * 3 + 1) + (a * 3 + 1)
        if name == "chain":
            return (a * 0.5 - 1.25) * a.tanh() + b.float().mean()
        if name == "row_chain":  # a row, a column and a number broadcast
            return (a * a[:1] + a[..., :1] / 3).abs() * 0.75 if a.dim() == 2 else None
        if name == "mask":  # the same in every replay
            rows = vt.arange(a.shape[0]) if a.dim() > 0 else None
            return None if rows is None else (rows.unsqueeze(1) >= rows).float() * 0.5
        if name == "masked":
            keep = vt.arange(a.shape[-1]) % 2 == 0 if a.dim() > 0 else None
            return None if keep is None else vt.where(keep, a, -1.5)
        if name == "zeros":  # a constant that is changed in part
            made = vt.zeros(4, 4)
            made[1:] = a.detach().float().mean()
            return made + vt.ones(4, 4)
        if name == "to_and_back":
            return a.to(vt.bfloat16).to(vt.float32).to(vt.bfloat16) * 2
        return a.clone()


def _run(program: Program, captured: bool, optimize: bool) -> tuple[list[np.ndarray], float]:
    """What each step leaves, and how far it may be from the ops as they were recorded."""
    vt.manual_seed(11)
    rng = np.random.default_rng(5)
    weight = vt.tensor(rng.standard_normal((4, 4)).astype(np.float32), requires_grad=True)
    state = vt.tensor(rng.standard_normal((4, 4)).astype(np.float32))
    inputs = [
        [vt.tensor(rng.standard_normal((4, 4)).astype(np.float32)) for _ in range(2)]
        for _ in range(STEPS)
    ]

    def step(x: Any, y: Any) -> Any:
        return program(x, y, weight, state)

    function = capture(step, optimize=optimize) if captured else step
    seen, kept = [], []
    for x, y in inputs:
        total, others = function(x, y)
        kept.append([total, *others])
        if weight.grad is not None:
            seen.append(weight.grad.detach().float().numpy().copy())
    # Read at the end: results keep their values however often the step is replayed.
    for results in kept:
        seen.extend(t.detach().float().numpy().copy() for t in results)
    seen.append(state.numpy().copy())
    if captured:
        assert len(function.variants) == 1
        assert function.variants[0].replays >= STEPS - 3
    return seen, function.variants[0].tape.bound if captured else 0.0


def recompute_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be computed again is, however small and costly."""
    monkeypatch.setattr(recompute, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(recompute, "LEAST_PEAK", 0)
    monkeypatch.setattr(recompute, "LEAST_SHARE", 0)
    monkeypatch.setattr(recompute, "MOST_MOVED", 100)


def leave_any_sum_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums over rows are left in parts, however few these are."""
    monkeypatch.setattr(late_sums, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(late_sums, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(late_sums, "LEAST_ROWS", 1)
    monkeypatch.setattr(late_sums, "_ROWS_OF_A_PART", 1)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("block", range(10))
def test_programs(block: int, optimize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(chains, "LEAST_16_BIT", 0)
    monkeypatch.setattr(chains, "MOST_TENSORS", 16)
    recompute_anything(monkeypatch)
    leave_any_sum_in_parts(monkeypatch)
    size, refused = PROGRAMS // 10, 0
    for seed in range(block * size, (block + 1) * size):
        program = Program(seed)
        try:
            eager, _ = _run(program, False, optimize)
        except RuntimeError as error:  # a saved value changed in place: no program for autograd
            assert "inplace" in str(error), seed
            refused += 1
            continue
        captured, bound = _run(program, True, optimize)
        assert bound == 0 or (optimize and vt.get_default_device().type != "cpu"), seed
        assert len(eager) == len(captured), seed
        for mine, other in zip(captured, eager):
            message = f"program {seed}: {program.instructions}"
            if bound == 0:
                np.testing.assert_array_equal(mine, other, err_msg=message)
            else:  # of one result of a pass, which others are made of
                largest = np.abs(other[np.isfinite(other)]).max(initial=0)
                np.testing.assert_allclose(mine, other, 0, 8 * bound * largest, err_msg=message)
    assert refused < size / 4
