"""The cases that bench/tune.py measures fit the contracts of their kernels. Needs a CUDA device; the
simulated one will do."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from typing import Any

import pytest

import vibetensor.torch as torch
from vibetensor.cute_kernels import registry
from vibetensor.cute_kernels.shapes import Unfit, check_limits, match

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.skipif(not BENCH.exists(), reason="needs a checkout")
KERNELS = registry.load()


@pytest.fixture(scope="module")
def tune() -> Any:
    try:
        torch.empty(0, device="cuda")
    except RuntimeError:
        pytest.skip("needs a CUDA device")
    sys.path.insert(0, str(BENCH))
    try:
        import tune
    finally:
        sys.path.remove(str(BENCH))
    return tune


def test_every_kernel_that_is_called_has_cases(tune: Any) -> None:
    assert set(KERNELS) - set(tune.CASES) == {"gemm_bias_add_tn"}


@pytest.mark.parametrize("name", ["attention_short_forward", "attention_short_backward",
                                  "dropout_forward", "embedding_backward", "adamw_step",
                                  "cross_entropy_in_place"])  # fmt: skip
def test_first_case_fits(tune: Any, name: str) -> None:
    kernel = KERNELS[name]
    for code, case in itertools.islice(tune.CASES[name](), 1):
        fits = []
        for variant in kernel.variants:
            if tune.code_of(variant) != code:
                continue
            contract = kernel.contract(variant)
            arguments = case.arguments(variant)
            known = {t.name for t in contract.tensors} | {s.name for s in contract.scalars}
            assert set(arguments) <= known
            assert {s.name for s in contract.scalars} <= set(arguments)
            assert set(case.extents) <= {e.name for e in contract.extents}
            tensors = {t.name: arguments.get(t.name) for t in contract.tensors}
            try:
                extents, strides = match(contract, tensors)
                for e, value in zip(contract.extents, extents):
                    assert case.extents.get(e.name, value) == value or e.name == "causal"
                check_limits(contract, tensors, extents, strides)
                fits.append(variant.name)
            except Unfit:
                continue
        assert fits
        case.library()
