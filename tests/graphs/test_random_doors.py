"""Generated programs through a graph in torch's manner and through torch.compile: eager's bits."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from graphs.test_random_programs import Program
from tests.graphs.default_device import kind, random_state
from vibetensor.graphs import Graph, graph

PROGRAMS = 240
STEPS = 4


def tensors() -> tuple[Any, Any, list[list[Any]]]:
    vt.manual_seed(11)
    rng = np.random.default_rng(5)
    made = [vt.tensor(rng.standard_normal((4, 4)).astype(np.float32)) for _ in range(2)]
    inputs = [
        [vt.tensor(rng.standard_normal((4, 4)).astype(np.float32)) for _ in range(2)]
        for _ in range(STEPS)
    ]
    return made[0].requires_grad_(), made[1], inputs


def read(*values: Any) -> list[Any]:
    return [None if v is None else v.detach().double().numpy().copy() for v in values] + [
        random_state().numpy().astype(np.float64)
    ]


def assert_same(mine: list[Any], other: list[Any], bound: float, message: str) -> None:
    """Step by step; within what the passes that fired allow of one result of theirs, which others
    are made of."""
    assert len(mine) == len(other)
    for values, expected in zip(mine, other):
        assert len(values) == len(expected)
        for a, b in zip(values, expected):
            assert (a is None) == (b is None), message
            if b is None:
                continue
            assert a.shape == b.shape, message
            if bound == 0:
                np.testing.assert_array_equal(a, b, err_msg=message)
            else:
                largest = np.abs(b[np.isfinite(b)]).max(initial=0)
                np.testing.assert_allclose(a, b, 0, 8 * bound * largest, err_msg=message)


def through_graph(program: Program, optimize: bool) -> tuple[list[Any], float]:
    weight, state, inputs = tensors()
    x, y = (t.clone() for t in inputs[0])
    g = Graph(optimize=optimize)
    with graph(g):
        total, others = program(x, y, weight, state)
    seen = []
    for values in inputs:
        x.copy_(values[0]), y.copy_(values[1])
        g.replay()
        seen.append(read(total, *others, weight.grad, state))
    assert kind() != "cpu" or g.tape().bound == 0
    return seen, g.tape().bound


def eagerly(program: Program) -> list[Any]:
    weight, state, inputs = tensors()
    seen = []
    for x, y in inputs:
        total, others = program(x, y, weight, state)
        seen.append(read(total, *others, weight.grad, state))
    return seen


def around(program: Program, compiled: bool, optimize: bool) -> tuple[list[Any], int, float]:
    """What steps leave that run compiled calls, the replays of these, and the bound of their passes."""
    weight, state, inputs = tensors()
    seen, kept = [], []

    def function(x: Any, y: Any) -> Any:
        # Two results may be one tensor, which is not captured.
        total, others = Program.__call__(program, x * weight, y, weight, state)
        return total, [other * 1 for other in others]

    call = vt.compile(function, options={"optimize": optimize}) if compiled else function
    for x, y in inputs:
        x.requires_grad_()
        total, others = call(x, y)
        (total * 2).backward()
        seen.append(read(total, *others, x.grad, weight.grad, state))
        kept.append(others)
    seen.append(read(*(t for others in kept for t in others)))
    joints = [j for known in call._known.values() for j in known] if compiled else []
    parts = [p for joint in joints for p in (joint._forward, *joint._backwards.values())]
    bounds = [getattr(part, "captured", part).tape.bound for part in parts]
    return seen, sum(joint._forward.replays for joint in joints), max(bounds, default=0.0)


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("block", range(4))
def test_graphs(block: int, optimize: bool) -> None:
    refused = 0
    for seed in range(block * PROGRAMS // 4, (block + 1) * PROGRAMS // 4):
        program = Program(seed)
        try:
            eager = eagerly(program)
        except RuntimeError as error:  # a saved value changed in place: no program for autograd
            assert "inplace" in str(error), seed
            refused += 1
            continue
        mine, bound = through_graph(program, optimize)
        assert_same(mine, eager, bound, f"{seed}: {program.instructions}")
    assert refused < PROGRAMS / 16


@pytest.mark.parametrize("optimize", [False, True])
@pytest.mark.parametrize("block", range(4))
def test_compiled(block: int, optimize: bool) -> None:
    refused, replays = 0, 0
    for seed in range(block * PROGRAMS // 4, (block + 1) * PROGRAMS // 4):
        program = Program(seed)
        program.backward = False
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                eager, _, _ = around(program, False, optimize)
            except RuntimeError as error:
                assert "inplace" in str(error), seed
                refused += 1
                continue
            compiled, count, bound = around(program, True, optimize)
        assert kind() != "cpu" or bound == 0
        assert_same(compiled, eager, bound, f"{seed}: {program.instructions}")
        replays += count
    assert refused < PROGRAMS / 16
    assert replays > 0.8 * STEPS * (PROGRAMS / 4 - refused)
