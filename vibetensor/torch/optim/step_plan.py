"""What one step of one parameter group touches, kept between steps.

Sorting the parameters of a group costs more Python than the update itself on small models, and
the answer is almost always the same as a step ago. A plan keeps it, and is checked (never just
trusted) with a few C-level passes: the same parameters, gradients on the same ones, the same state
dictionaries. The tensors inside the state dictionaries are read afresh by each step, since scripts
move them between devices in place.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import is_
from typing import Any


class Bucket:
    """Parameters of one device and dtype that have gradients.

    ``uniform`` says that parameters are floating point, distinct, and have gradients of their own
    dtype and device: what the fused updates need.
    """

    __slots__ = ("indices", "params", "states", "uniform")

    def __init__(self) -> None:
        self.indices: list[int] = []
        self.params: list[Any] = []
        self.states: list[Any] = []
        self.uniform = True

    def column(self, key: str) -> list[Any]:
        """The state entry ``key`` of every parameter; KeyError where one has none."""
        try:
            return [state[key] for state in self.states]
        except KeyError:
            raise KeyError(
                f"the optimizer's state of a parameter has no {key!r}, which its first step makes "
                "where it is needed: set options such as amsgrad before that"
            ) from None


class StepPlan:
    """The buckets of a group, and what must still be true for them to be right."""

    __slots__ = ("buckets", "params", "present", "stateless", "states", "with_grad")

    def __init__(self, params: list[Any], grads: list[Any], state: Mapping) -> None:
        self.params = list(params)
        self.present = [grad is not None for grad in grads]
        self.with_grad = [p for p, grad in zip(params, grads, strict=True) if grad is not None]
        self.states = [state.get(p) for p in self.with_grad]
        self.stateless = None in self.states
        by_kind: dict[Any, Bucket] = {}
        seen: set[int] = set()
        for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
            if grad is None:
                continue
            bucket = by_kind.setdefault((str(p.device), p.dtype), Bucket())
            bucket.indices.append(i)
            bucket.params.append(p)
            bucket.states.append(state.get(p))
            if not p.is_floating_point() or grad.dtype != p.dtype or id(p) in seen:
                bucket.uniform = False
            seen.add(id(p))
        self.buckets = list(by_kind.values())

    def still_holds(self, params: list[Any], grads: list[Any], state: Mapping) -> bool:
        return (
            len(params) == len(self.params)
            and all(map(is_, params, self.params))
            and [grad is not None for grad in grads] == self.present
            and all(map(is_, map(state.get, self.with_grad), self.states))
        )

    def with_grads(self, grads: list[Any]) -> list[tuple[Bucket, list[Any]]]:
        """Each bucket with its gradients. The plan itself keeps no gradient alive."""
        if len(self.buckets) == 1 and len(self.with_grad) == len(grads):
            return [(self.buckets[0], grads)]
        return [(bucket, [grads[i] for i in bucket.indices]) for bucket in self.buckets]
