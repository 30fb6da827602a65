"""How tensors on a device print: as those of the CPU do, which are compared with torch's, with the
device named before the other attributes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

import vibetensor.torch as torch

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
DTYPES = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *FLOATS]
SHAPES = [(), (0,), (0, 3), (1,), (3, 4), (2, 3, 4), (1001,), (40, 40)]
OPTIONS: list[dict[str, Any]] = [
    {}, {"precision": 2}, {"threshold": 5}, {"linewidth": 40}, {"profile": "full"}, {"sci_mode": True},
]  # fmt: skip
DEVICE = "device='cuda:0'"


@pytest.fixture(params=OPTIONS, ids=str)
def options(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    torch.set_printoptions(**request.param)
    yield request.param
    torch.set_printoptions(profile="default")


def without_the_device(text: str) -> str:
    """Lines are joined: where they break depends on the attributes."""
    kept, count = re.subn(rf",\s+{DEVICE}", "", text)
    assert count == 1, text
    return " ".join(kept.split())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_and_shape(options: dict[str, Any], dtype: Any) -> None:
    for shape in SHAPES:
        numel = torch.Size(shape).numel()
        x = (torch.arange(numel) % 113).reshape(shape).to(dtype)
        if dtype in FLOATS and shape:
            x = x / 7
            x[:1] = float("nan")
        for of in (x, x.transpose(0, 1)) if len(shape) > 1 else (x,):
            assert without_the_device(repr(of.cuda())) == " ".join(repr(of).split())
            assert str(of.cuda()) == repr(of.cuda())


def test_forms() -> None:
    one = torch.ones(1, device="cuda")
    assert repr(one) == f"tensor([1.], {DEVICE})"
    assert repr(one.half()) == f"tensor([1.], {DEVICE}, dtype=torch.float16)"
    assert repr(one.requires_grad_()) == f"tensor([1.], {DEVICE}, requires_grad=True)"
    assert repr(one * 2) == f"tensor([2.], {DEVICE}, grad_fn=<MulBackward0>)"
    assert repr(one.detach()[:0]) == f"tensor([], {DEVICE})"
    assert repr(torch.zeros(0, 2, device="cuda")) == f"tensor([], {DEVICE}, size=(0, 2))"
    assert repr(torch.nn.Parameter(one.detach())) == (
        f"Parameter containing:\ntensor([1.], {DEVICE}, requires_grad=True)"
    )
    assert repr(torch.ones(2, device="cuda").max(0)) == (
        f"torch.return_types.max(\nvalues=tensor(1., {DEVICE}),\nindices=tensor(0, {DEVICE}))"
    )
    wide = repr(torch.arange(100, 126, device="cuda"))
    assert wide.endswith(f"125],\n       {DEVICE})")  # no room in the line
