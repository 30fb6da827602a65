"""out=: what it writes, and what it refuses as torch does."""

from __future__ import annotations

import pytest

import vibetensor.torch as vt

CALLS = {
    "mul": lambda t, x, out: t.mul(x, x, out=out),
    "floor": lambda t, x, out: t.floor(x, out=out),
    "sum": lambda t, x, out: t.sum(x, 0, out=out),
    "cat": lambda t, x, out: t.cat([x, x], out=out),
    "matmul": lambda t, x, out: t.matmul(x, x, out=out),
    "stack": lambda t, x, out: t.stack([x, x], out=out),
    "std": lambda t, x, out: t.std(x, 0, out=out),
    "sort": lambda t, x, out: t.sort(x, out=(out, t.empty(0, dtype=t.int64))),
}


@pytest.fixture(params=["vibetensor", pytest.param("torch", marks=pytest.mark.torch)])
def api(request):
    return vt if request.param == "vibetensor" else pytest.importorskip("torch")


@pytest.mark.parametrize("name", CALLS)
def test_an_input_that_requires_grad_is_refused(api, name: str) -> None:
    x = api.tensor([1.5, 2.5, 0.5], requires_grad=True)
    out = api.empty(0)
    # std's parts have the last word here.
    with pytest.raises(RuntimeError, match=r"\(\): functions with out=... arguments don't support"):
        CALLS[name](api, x, out)
    assert out.numel() == 0 and not out.requires_grad
    with api.no_grad():
        CALLS[name](api, x, out)
    assert out.numel() > 0 and not out.requires_grad
    wanted = CALLS[name](api, x.detach(), api.empty(0))
    if name != "sort":
        assert out.tolist() == wanted.tolist()


def test_an_out_that_requires_grad_is_refused(api) -> None:
    x, out = api.ones(3), api.zeros(3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"mul\(\): functions with out=... arguments"):
        api.mul(x, x, out=out)
    with api.no_grad():
        api.mul(x, x, out=out)
    assert out.tolist() == [1.0] * 3


def test_ops_without_gradients_take_any_input(api) -> None:
    x = api.tensor([1.0, 3.0, 2.0], requires_grad=True)
    assert api.argmax(x, out=api.empty(0, dtype=api.int64)).item() == 1
    assert api.eq(x, 3.0, out=api.empty(0, dtype=api.bool)).tolist() == [False, True, False]


def test_nothing_is_written_where_one_of_several_is_refused() -> None:
    x, values = vt.tensor([2.0, 1.0]), vt.full((2,), 7.0)
    with pytest.raises(RuntimeError, match="can't be cast"):
        vt.sort(x, out=(values, vt.zeros(2, dtype=vt.bool)))
    assert values.tolist() == [7.0, 7.0]
    with pytest.raises(TypeError, match="must be a tuple of 2 Tensors"):
        vt.sort(x, out=values)
