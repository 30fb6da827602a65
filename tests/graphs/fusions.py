"""What the tests of fusing passes share: a step run as it is and captured, and what became of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

import vibetensor.torch as vt
from tests.graphs.default_device import kind
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
    results and the step's `state` (an attribute, may be absent) must agree within `bound`, relative
    to the largest element; elsewhere than on the CPU within that of the passes, if it is more.
    Returns the names of the ops that a replay runs."""
    vt.manual_seed(0)
    eager = make()
    expected = [_values(eager(*args)) for args in inputs]
    vt.manual_seed(0)
    plain = make()
    step = capture(plain)
    seen = [_values(step(*args)) for args in inputs]
    if kind() == "cpu":
        assert bound > 0 or step.tape().bound == 0
    else:  # passes of the device's own, whose bound is of one result that others are made of
        bound = max(bound, 8 * step.tape().bound)
    for mine, other in zip(seen, expected):
        _agree(mine, other, bound)
    _agree(_values(getattr(plain, "state", [])), _values(getattr(eager, "state", [])), bound)
    assert step.variants[0].replays > 0
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
