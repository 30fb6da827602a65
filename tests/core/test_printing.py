"""How tensors, shapes and named tuples print: as in torch, character by character."""

from __future__ import annotations

import math
import random

import pytest

import vibetensor.torch as vt

NAN, INF = math.nan, math.inf
LISTS = [
    [NAN, 1.0, INF, -INF], [-0.0, 0.0], [INF, 1.0], [NAN], [-INF], [0.0], [-0.0], [1.0, 1000.0], [1.0, 1001.0],
    [0.5, NAN], [1e-5, 1.0], [1e9], [123456.0, 0.5], [99999.0, -1.5], [1e8, 1e7], [2e8, 2e7], [0.1, 0.2, 0.3] * 7,
]  # fmt: skip
POOL = [
    NAN,
    INF,
    -INF,
    0.0,
    -0.0,
    1.0,
    -2.0,
    3.5,
    1e-5,
    1e5,
    1e9,
    0.1234567,
    -1e-3,
    1000.0,
    1001.0,
    1e30,
]
FLOATS = ["float16", "bfloat16", "float32", "float64"]
INTEGERS = ["bool", "uint8", "int8", "int16", "int32", "int64"]
SHAPES = [
    (),
    (0,),
    (0, 3),
    (1,),
    (3, 4),
    (2, 3, 4),
    (2, 2, 2, 2),
    (1001,),
    (40, 40),
    (2, 600),
    (1000,),
]
OPTIONS = [
    {}, {"precision": 2}, {"threshold": 5}, {"threshold": 3, "edgeitems": 1}, {"linewidth": 40}, {"profile": "short"},
    {"profile": "full"}, {"sci_mode": True}, {"sci_mode": False}, {"precision": 8, "sci_mode": True, "linewidth": 120},
]  # fmt: skip


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


@pytest.fixture(params=OPTIONS, ids=str)
def options(request, torch):
    """Both libraries with the same print options; restored afterwards."""
    for library in (vt, torch):
        library.set_printoptions(**request.param)
    yield request.param
    for library in (vt, torch):
        library.set_printoptions(profile="default")


@pytest.mark.torch
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats(torch, options, dtype: str) -> None:
    draw = random.Random(1)
    lists = LISTS + [[draw.choice(POOL) for _ in range(draw.randint(1, 12))] for _ in range(30)]
    for values in lists:
        for data in (values, [values, values], values[0]):
            ours, theirs = (t.tensor(data, dtype=getattr(t, dtype)) for t in (vt, torch))
            assert repr(ours) == repr(theirs)


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [*INTEGERS, *FLOATS])
def test_shapes(torch, options, dtype: str) -> None:
    for shape in SHAPES:
        ours, theirs = (
            (t.arange(math.prod(shape)) % 113).reshape(shape).to(getattr(t, dtype))
            for t in (vt, torch)
        )
        assert repr(ours) == repr(theirs)
        assert str(ours) == str(theirs) and f"{ours}" == f"{theirs}"
        if ours.dim() > 1:
            assert repr(ours.transpose(0, 1)) == repr(theirs.transpose(0, 1))


@pytest.mark.torch
def test_history(torch, options) -> None:
    for shape in ((3,), (2, 5), (30, 40)):
        texts = []
        for t in (vt, torch):
            x = t.full(shape, 2.0, requires_grad=True)
            made = [x, x * 2, x.sum(), x.sum(0), x.mean(), x.mean(-1), x.max(0)[0], x.min(0)[0], x.prod(0),
                    t.where(x > 0, x, x), x.to(t.float64), x.square(), x.exp(), x[None].squeeze(0), x[1:], x.t()
                    if x.dim() == 2 else x, (x * 1).mul_(2)]  # fmt: skip
            written = x * 1
            written[0] = 3.0
            copied = (x * 1).copy_(x)
            texts.append([repr(y) for y in [*made, written, copied]])
        assert texts[0] == texts[1]


@pytest.mark.torch
def test_named_tuples(torch) -> None:
    texts = []
    for t in (vt, torch):
        x = t.tensor([[1.0, 3.0], [2.0, 0.0]])
        results = [
            x.max(1),
            x.min(0),
            x.sort(),
            x.topk(1),
            x.median(0),
            x.kthvalue(1),
            x.cummax(0),
            t.aminmax(x),
        ]
        texts.append([repr(r) for r in results] + [str(results[0])])
    assert texts[0] == texts[1]


@pytest.mark.torch
def test_format_strings(torch) -> None:
    for t in (vt, torch):
        assert (
            f"{t.tensor(1.23456):.2f} {t.tensor(3):d} {t.tensor(0.5, requires_grad=True)}"
            == "1.23 3 0.5"
        )
        with pytest.raises(TypeError, match="unsupported format string"):
            f"{t.ones(2):.2f}"


def test_forms() -> None:
    """Without torch: one of each form."""
    assert repr(vt.tensor([1.0, NAN, -0.0])) == "tensor([1., nan, -0.])"
    assert repr(vt.tensor([[1, 20], [300, 4]])) == "tensor([[  1,  20],\n        [300,   4]])"
    assert repr(vt.tensor([0.5, 1e-7])) == "tensor([5.0000e-01, 1.0000e-07])"
    assert repr(vt.zeros(0, 2)) == "tensor([], size=(0, 2))"
    assert repr(vt.ones(2, dtype=vt.float16)) == "tensor([1., 1.], dtype=torch.float16)"
    assert repr(vt.ones(1, requires_grad=True) * 2) == "tensor([2.], grad_fn=<MulBackward0>)"
    assert repr(vt.ones(2).max(0)) == (
        "torch.return_types.max(\nvalues=tensor(1.),\nindices=tensor(0))"
    )
    assert repr(vt.ones(2, 3).shape + (4,)) == "torch.Size([2, 3, 4])"


@pytest.mark.parametrize("name", ["precision", "threshold", "edgeitems", "linewidth"])
def test_options_are_restored_by_the_profile(name: str) -> None:
    x = vt.arange(2000.0) / 7
    before = repr(x)
    vt.set_printoptions(
        **{name: {"precision": 1, "threshold": 5000, "edgeitems": 5, "linewidth": 30}[name]}
    )
    changed = repr(x)
    vt.set_printoptions(profile="default")
    assert changed != before and repr(x) == before
    with pytest.raises(ValueError, match="unknown profile 'long'"):
        vt.set_printoptions(profile="long")
