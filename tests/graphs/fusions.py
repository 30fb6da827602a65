"""What the tests of fusing passes share: a step run as it is and captured, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import vibetensor.torch as vt
from vibetensor.graphs import capture


def tensors(result: Any) -> list[Any]:
    """All tensors of a result."""
    if isinstance(result, vt.Tensor):
        return [result]
    if isinstance(result, dict):
        return [t for item in result.values() for t in tensors(item)]
    if isinstance(result, list | tuple):
        return [t for item in result for t in tensors(item)]
    return []


def captured_names(
    make: Callable[[], Callable[..., Any]], inputs: list[tuple], bound: float = 0.0
) -> list[str]:
    """Runs the step that `make` gives on every input, eagerly and captured, from equal states;
    results and the step's `state` (an attribute, may be absent) must agree. Returns the names of
    the ops that a replay runs."""
    vt.manual_seed(0)
    eager = make()
    expected = [_values(eager(*args)) for args in inputs]
    vt.manual_seed(0)
    plain = make()
    step = capture(plain)
    for args, other in zip(inputs, expected):
        _agree(_values(step(*args)), other, bound)
    _agree(_values(getattr(plain, "state", [])), _values(getattr(eager, "state", [])), bound)
    assert step.variants[0].replays > 0
    assert bound > 0 or step.tape().bound == 0
    step.tape().to_json()
    captured_names.decisions = [str(d) for d in step.tape().decisions]  # type: ignore[attr-defined]
    return [op.name for op in step.tape().ops if not op.is_view]


def decisions() -> list[str]:
    """What the passes of the last capture decided."""
    return captured_names.decisions  # type: ignore[attr-defined]


def _values(result: Any) -> list[np.ndarray]:
    return [t.detach().double().numpy().copy() for t in tensors(result)]


def _agree(mine: list[np.ndarray], other: list[np.ndarray], bound: float) -> None:
    assert len(mine) == len(other)
    for a, b in zip(mine, other):
        if bound == 0:
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=0, atol=bound * np.abs(b).max(initial=1e-30))
