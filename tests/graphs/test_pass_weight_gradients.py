"""Weights' gradients of several layers as one batched product: which, and how near the results are."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from tests.graphs.rewritten import check_bits
from vibetensor.graphs import capture
from vibetensor.graphs.passes import epilogues, joined_casts, weight_gradients

ROWS, WIDTH = 96, 16
MADE = "products of 16 x 96 x 16 as one"


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "DEVICES", ("cpu", "cuda"))


def model(layers: int = 4, width: int = WIDTH, bias: bool = False) -> Any:
    class Block(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = vt.nn.LayerNorm(width)
            self.up = vt.nn.Linear(width, 2 * width, bias=bias)
            self.down = vt.nn.Linear(2 * width, width, bias=bias)
            self.side = vt.nn.Linear(width, width, bias=bias)

        def forward(self, x: Any) -> Any:
            y = self.norm(x)
            return x + self.down(F.gelu(self.up(y))) + self.side(y)

    return vt.nn.Sequential(*(Block() for _ in range(layers)))


def trained(net: Any, *, half: bool = True, use: Any = None, times: int = 1) -> Any:
    optimizer = vt.optim.AdamW(net.parameters(), lr=1e-3)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        for _ in range(times):
            with vt.autocast(kind(), dtype=vt.bfloat16, enabled=half):
                loss = F.mse_loss(net(x).float(), y)
            loss.backward()
        if use is not None:
            use(net)
        norm = vt.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss, norm

    step.state = [*net.parameters()]  # type: ignore[attr-defined]
    return step


def batches(rows: int = ROWS, width: int = WIDTH) -> list[tuple]:
    vt.manual_seed(1)
    return [(vt.randn(rows, width), vt.randn(rows, width)) for _ in range(5)]


def test_one_product_for_all_layers() -> None:
    names = captured_names(lambda: trained(model()), batches(), bound=5e-2)
    assert names.count("bmm") == 3  # of three shapes
    assert sum(MADE in d for d in decisions()) == 1, decisions()
    assert all("4 products" in d for d in decisions() if "products of" in d)


def _scale_gradients(net: Any) -> None:
    for parameter in net.parameters():
        parameter.grad.mul_(2)


def _sgd(net: Any, clip: bool) -> Any:
    optimizer = vt.optim.SGD(net.parameters(), lr=1e-2, momentum=0.9)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        loss = F.mse_loss(net(x), y)
        loss.backward()
        if clip:
            vt.nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        return loss, *(p.grad * 1 for p in net.parameters())

    step.state = [*net.parameters()]  # type: ignore[attr-defined]
    return step


@pytest.mark.parametrize("make", [
    lambda net: trained(net, half=False), lambda net: _sgd(net, True), lambda net: _sgd(net, False),
], ids=["AdamW, clipped", "SGD, clipped", "SGD"])  # fmt: skip
@pytest.mark.parametrize("bias", [False, True], ids=["", "biases"])
def test_float32_gradients_are_written_by_the_update(make: Any, bias: bool) -> None:
    """They outlive the step, as parts of a stack cannot."""
    names = captured_names(lambda: make(model(bias=bias)), batches(), bound=1e-5)
    assert names.count("bmm") == 3, decisions()
    made = [d for d in decisions() if "products of" in d and "as one" in d]
    assert len(made) == 3 and all("4 products" in d for d in made)


@pytest.mark.parametrize("half", [True, False], ids=["autocast", "float32"])
def test_bits_of_a_product_are_those_of_the_parts(
    half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The CPU sums a batched product as it does a plain one."""
    if kind() != "cpu":
        pytest.skip("of the CPU")
    made = []
    for devices in ((), ("cpu",)):
        monkeypatch.setattr(weight_gradients, "DEVICES", devices)
        vt.manual_seed(0)
        step = capture(trained(model(), half=half))
        made.append([[r.item() for r in step(*args)] for args in batches()])
        assert any(op.name == "bmm" for op in step.tape().ops) == bool(devices)
    assert made[0] == made[1]


@pytest.mark.parametrize("wide", [128, 80], ids=["256 bytes a sum", "160 bytes"])
def test_sums_for_biases_come_along(wide: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(joined_casts, "DEVICES", ("cpu", "cuda"))
    names = captured_names(
        lambda: trained(model(width=wide, bias=True)), batches(512, wide), bound=5e-2
    )
    assert names.count("bmm") == 3
    made = [d for d in decisions() if "products of" in d and "as one" in d]
    assert len(made) == 3
    assert "_mm_row_sums" not in names


def test_keys_and_values_of_one_input_are_products_apart() -> None:
    class Pair(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = vt.nn.LayerNorm(WIDTH)
            self.k, self.v = (vt.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(2))

        def forward(self, x: Any) -> Any:
            y = self.norm(x)
            return x + self.k(y).tanh() * self.v(y)

    names = captured_names(
        lambda: trained(vt.nn.Sequential(*(Pair() for _ in range(3)))), batches(), bound=5e-2
    )
    assert names.count("bmm") == 2
    assert sum("3 products" in d for d in decisions()) == 2


def test_a_gradient_that_is_used_earlier_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """What reads a gradient in the middle of the backward ends a batch."""
    monkeypatch.setattr(joined_casts, "DEVICES", ("cpu", "cuda"))

    def early() -> Any:
        net = model(4)
        net[2].side.weight.register_hook(lambda grad: grad * 2)
        return trained(net)

    names = captured_names(early, batches(), bound=5e-2)
    sides = [d for d in decisions() if "of 16 x 96 x 16 as one" in d]
    assert len(sides) == 2 and all("2 products" in d for d in sides), decisions()
    assert names.count("bmm") == 6  # those of the other shapes have operands of the same stacks


@pytest.mark.parametrize(
    ("make", "rows", "why"),
    [
        (lambda: trained(model(), half=False, use=_scale_gradients), ROWS, "it is a result of"),
        (lambda: trained(model(), half=False, times=2), ROWS, "it is a result of the step"),
        (lambda: trained(model()), 24, None),
        (lambda: trained(model(1)), ROWS, None),
        (lambda: trained(model(width=12)), ROWS, "no multiple of 256 bytes"),
    ],
    ids=["used before the clip", "accumulated", "short sums", "one layer", "widths"],
)
def test_what_stays(make: Any, rows: int, why: str | None) -> None:
    width = 12 if why and "256" in why else WIDTH
    names = captured_names(make, batches(rows, width), bound=5e-2)
    # Of "short sums" those of two equal widths are still longer than a side.
    assert names.count("bmm") == (rows != ROWS)
    if why is not None:
        assert any(why in d for d in decisions()), decisions()


def test_large_results_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_gradients, "MOST_RESULT", 2 * WIDTH * WIDTH)
    names = captured_names(lambda: trained(model()), batches(), bound=5e-2)
    assert names.count("bmm") == 2  # of those of one square, by twos
    assert any("its tiles are enough for a device" in d for d in decisions())


@pytest.mark.parametrize(("squares", "products"), [(4, 5), (3, 6)])
def test_products_have_about_one_size(
    squares: int, products: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of four layers' three: results of two squares by twos, those of one by fours, or by twos again."""
    monkeypatch.setattr(weight_gradients, "MOST_RESULT", squares * WIDTH * WIDTH)
    names = captured_names(lambda: trained(model()), batches(), bound=5e-2)
    assert names.count("bmm") == products, decisions()


def test_memory_decides_how_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for most in (1 << 30, 20_000, -(1 << 30)):
        monkeypatch.setattr(weight_gradients, "MOST_GROWTH", 0)
        monkeypatch.setattr(weight_gradients, "MOST_BYTES", most)
        names = captured_names(lambda: trained(model()), batches(), bound=5e-2)
        made.append(names.count("bmm"))
    assert made[0] == 3 and made[2] == 0 and made[1] > 3, made
    assert any("products stay apart" in d for d in decisions())


def test_the_arena_of_stacks_holds_their_parts() -> None:
    """No part of a stack is somebody else's while it is live: gradients over several steps agree."""
    vt.manual_seed(0)
    plain = trained(model(6))
    expected = [plain(*args)[1].item() for args in batches() * 3]
    vt.manual_seed(0)
    step = capture(trained(model(6)))
    seen = [step(*args)[1].item() for args in batches() * 3]
    assert seen == pytest.approx(expected, rel=2e-2)


def _plain(lefts: list[Any], rights: list[Any]) -> list[Any]:
    return [a.t() @ b for a, b in zip(lefts, rights)]


def _operand_changes(lefts: list[Any], rights: list[Any]) -> list[Any]:
    made = []
    for i, (a, b) in enumerate(zip(lefts, rights)):
        made.append(a.t() @ b)
        if i != 2:
            (rights if i else lefts)[i].mul_(-3)
    return [*made, *_plain(lefts, rights)]


def _operand_is_shared(lefts: list[Any], rights: list[Any]) -> list[Any]:
    return [a.t() @ b for a in lefts for b in rights]


def _result_is_changed(lefts: list[Any], rights: list[Any]) -> list[Any]:
    made = _plain(lefts, rights)
    made[1].mul_(-4)
    return [*made, rights[0], lefts[-1]]


def _result_is_read(lefts: list[Any], rights: list[Any]) -> list[Any]:
    made = _plain(lefts[:2], rights[:2])
    return [*made, made[0] * 4, *_plain(lefts[2:], rights[2:])]


def _sums_beside(lefts: list[Any], rights: list[Any]) -> list[Any]:
    return [x for a, b in zip(lefts, rights) for x in (a.t() @ b, a.sum(0))]


@pytest.mark.parametrize("wide", [128, 80], ids=["256 bytes a sum", "160 bytes"])
@pytest.mark.parametrize("dtype", [vt.bfloat16, vt.float32], ids=str)
@pytest.mark.parametrize(
    ("function", "products"),
    [(_plain, [4]), (_operand_changes, [2, 2, 2]), (_operand_is_shared, [2, 2, 4]),
     (_result_is_changed, [3]), (_result_is_read, [2, 2]), (_sums_beside, [4])],
)  # fmt: skip
def test_each_product_is_of_its_own_operands(
    function: Any,
    products: list[int],
    dtype: Any,
    wide: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What an optimizer makes of gradients hides which was whose; here they are compared one by one."""
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda"))
    vt.manual_seed(2)
    x, y = vt.randn(4, 200, wide).to(dtype), vt.randn(4, 200, 48).to(dtype)

    def step(x: Any, y: Any) -> list[Any]:
        results = function([x[i] + i for i in range(4)], [y[i] - i for i in range(4)])
        return [r * 2 for r in results]  # so that they are no results of the step themselves

    tape = check_bits(lambda t: weight_gradients.run(epilogues.run(t)), step, x, y)
    made = [op.outputs[0].sizes[0] for op in tape.ops if op.name == "bmm"]  # type: ignore[union-attr]
    assert sorted(made) == products, tape
