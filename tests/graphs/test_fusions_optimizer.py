"""Clipping and counting inside the optimizer's update."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions


def _trainer(
    make_optimizer: Any, *, clip: bool = True, read: bool = False, norm_out: bool = False
) -> Any:
    model = vt.nn.Sequential(vt.nn.Linear(7, 5), vt.nn.Tanh(), vt.nn.Linear(5, 3))
    optimizer = make_optimizer(model)

    def step(x: Any, y: Any) -> Any:
        model.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        result = [loss]
        if clip:
            norm = vt.nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            if norm_out:
                result.append(norm)
        if read:
            result.append(model[0].weight.grad.sum())
        optimizer.step()
        return [*result, *(p.grad for p in model.parameters())]

    step.state = [*model.parameters()]
    return step


def _inputs() -> list[tuple]:
    vt.manual_seed(3)
    return [(vt.randn(4, 7), vt.randn(4, 3)) for _ in range(6)]


def _groups(model: Any) -> Any:
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() == 1]
    return vt.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}], lr=1e-2
    )


@pytest.mark.parametrize("norm_out", [False, True])
@pytest.mark.parametrize(
    "make, fused, count",
    [
        (lambda m: vt.optim.AdamW(m.parameters(), lr=1e-2), "_scaled_adam_", 1),
        (lambda m: vt.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True), "_scaled_adam_", 1),
        (lambda m: vt.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9), "_scaled_sgd_", 1),
        (lambda m: vt.optim.SGD(m.parameters(), lr=1e-2), "_scaled_sgd_", 1),
        (_groups, "_scaled_adam_", 2),
    ],
    ids=["adamw", "amsgrad", "momentum", "sgd", "groups"],
)
def test_clipped_updates(make: Any, fused: str, count: int, norm_out: bool) -> None:
    names = captured_names(lambda: _trainer(make, norm_out=norm_out), _inputs())
    assert names.count(fused) == count
    assert names.count("_clip_coefficient") == 1
    for name in ("_foreach_mul_", "_foreach_add_", "_multi_tensor_norm", "_clamp_max"):
        assert name not in names


def test_without_clipping_only_the_count_is_folded() -> None:
    make = lambda m: vt.optim.AdamW(m.parameters(), lr=1e-2)  # noqa: E731
    names = captured_names(lambda: _trainer(make, clip=False), _inputs())
    assert "_scaled_adam_" in names and "_foreach_add_" not in names


def test_gradients_read_before_the_update_stay() -> None:
    make = lambda m: vt.optim.AdamW(m.parameters(), lr=1e-2)  # noqa: E731
    names = captured_names(lambda: _trainer(make, read=True), _inputs())
    assert "_foreach_mul_" in names
    assert any("used in between" in d for d in decisions())


def test_gradients_that_no_update_takes_stay() -> None:
    make = lambda m: vt.optim.SGD(m[0].parameters(), lr=1e-2)  # noqa: E731
    names = captured_names(lambda: _trainer(make), _inputs())
    assert "_foreach_mul_" in names and "_fused_sgd_" in names
    assert any("no update takes" in d for d in decisions())


def test_bfloat16_gradients_stay() -> None:
    def make() -> Any:
        weight = vt.randn(5, 7).to(vt.bfloat16).requires_grad_()
        optimizer = vt.optim.SGD([weight], lr=1e-2)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            loss = (x.to(vt.bfloat16) @ weight.t()).float().square().mean() + y.sum() * 0
            loss.backward()
            vt.nn.utils.clip_grad_norm_([weight], 0.1)
            optimizer.step()
            return loss, weight.grad

        step.state = [weight]
        return step

    names = captured_names(make, _inputs())
    assert "_foreach_mul_" in names
    assert any("16 bits" in d for d in decisions())


def _mixed(make_optimizer: Any, *, clip: bool = True, read: bool = False) -> Any:
    model = vt.nn.Sequential(vt.nn.Linear(7, 5), vt.nn.Tanh(), vt.nn.Linear(5, 3, bias=False))
    optimizer = make_optimizer(model)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        with vt.autocast(kind(), dtype=vt.bfloat16):
            loss = (model(x) - y).square().mean()
        loss.backward()
        result = [loss]
        if read:
            result.append(model[2].weight.grad.abs().sum())
        if clip:
            result.append(vt.nn.utils.clip_grad_norm_(model.parameters(), 0.01))
        optimizer.step()
        return [*result, *(p.grad for p in model.parameters())]

    step.state = [*model.parameters()]
    return step


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize(
    "make, fused",
    [
        (lambda m: vt.optim.AdamW(m.parameters(), lr=1e-2), "_scaled_adam_"),
        (lambda m: vt.optim.Adam(m.parameters(), lr=1e-2, amsgrad=True), "_scaled_adam_"),
        (lambda m: vt.optim.SGD(m.parameters(), lr=1e-2, momentum=0.9), "_scaled_sgd_"),
        (_groups, "_scaled_adam_"),
    ],
    ids=["adamw", "amsgrad", "momentum", "groups"],
)
def test_gradients_of_mixed_precision(make: Any, fused: str, clip: bool) -> None:
    names = captured_names(lambda: _mixed(make, clip=clip), _inputs())
    assert fused in names
    assert any("casts of gradients" in d for d in decisions())
    # Of x, of two weights and the bias, of the first layer's result and its gradient's way back.
    assert names.count("_to_dtype") <= 7


def test_mixed_precision_gradients_read_before_the_update_stay() -> None:
    make = lambda m: vt.optim.AdamW(m.parameters(), lr=1e-2)  # noqa: E731
    captured_names(lambda: _mixed(make, read=True), _inputs())
    assert any("2 casts of gradients" in d for d in decisions())
