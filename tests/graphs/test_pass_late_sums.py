"""The second stages of sums in one op: which, where, and that bits stay."""

from __future__ import annotations

from typing import Any

import pytest

import vibetensor.torch as vt
import vibetensor.torch.nn.functional as F
from tests.graphs.default_device import kind
from tests.graphs.fusions import captured_names, decisions
from tests.graphs.rewritten import check_bits, op_names
from vibetensor import _C
from vibetensor.graphs.passes import epilogues, late_sums

ROWS, WIDTH = 256, 32
NORMS = ("_residual_layer_norm_backward", "_residual_rms_norm_backward")


@pytest.fixture(autouse=True)
def everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_sums, "DEVICES", ("cpu", "cuda"))
    monkeypatch.setattr(late_sums, "LEAST_ELEMENTS", 256)


def model(norm: Any, layers: int = 3) -> Any:
    class Block(vt.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = norm(WIDTH)
            self.up, self.down = vt.nn.Linear(WIDTH, 48), vt.nn.Linear(48, WIDTH)

        def forward(self, x: Any) -> Any:
            return x + self.down(F.relu(self.up(self.norm(x))))

    return vt.nn.Sequential(*(Block() for _ in range(layers)))


def trained(net: Any, *, half: bool = False, clip: bool = True) -> Any:
    optimizer = vt.optim.SGD(net.parameters(), lr=0.1)

    def step(x: Any, y: Any) -> Any:
        optimizer.zero_grad()
        with vt.autocast(kind(), dtype=vt.bfloat16, enabled=half):
            loss = F.mse_loss(net(x).float(), y)
        loss.backward()
        if clip:
            vt.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        return loss

    step.state = [*net.parameters()]  # type: ignore[attr-defined]
    return step


def batches(rows: int = ROWS) -> list[tuple]:
    vt.manual_seed(1)
    return [(vt.randn(rows, WIDTH), vt.randn(rows, WIDTH)) for _ in range(4)]


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("norm", [vt.nn.LayerNorm, vt.nn.RMSNorm], ids=["layer", "rms"])
@pytest.mark.parametrize("clip", [False, True])
def test_all_sums_of_a_step_end_in_one_op(norm: Any, half: bool, clip: bool) -> None:
    names = captured_names(lambda: trained(model(norm), half=half, clip=clip), batches())
    assert names.count("_add_parts_") == 1
    assert any("sums added up by one op" in d for d in decisions())
    assert "sum.dim" not in names


def test_sums_beside_products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(epilogues, "DEVICES", ("cpu", "cuda"))
    names = captured_names(lambda: trained(model(vt.nn.LayerNorm)), batches(), bound=1e-4)
    assert names.count("_add_parts_") == 1
    assert "_mm_row_sums" not in names and names.count("_row_parts") >= 3


def test_what_is_read_earlier_is_added_up_there() -> None:
    def make() -> Any:
        net = model(vt.nn.LayerNorm, 4)
        net[2].norm.weight.register_hook(lambda grad: grad * 2)
        return trained(net)

    names = captured_names(make, batches())
    assert names.count("_add_parts_") == 2


def test_gradients_that_accumulate() -> None:
    def make() -> Any:
        net = model(vt.nn.LayerNorm)
        optimizer = vt.optim.SGD(net.parameters(), lr=0.1)

        def step(x: Any, y: Any) -> Any:
            optimizer.zero_grad()
            for part in range(2):
                F.mse_loss(net(x[part::2]), y[part::2]).backward()
            optimizer.step()
            return [p.grad.clone() for p in net.parameters()]

        step.state = [*net.parameters()]  # type: ignore[attr-defined]
        return step

    names = captured_names(make, batches())
    assert 1 <= names.count("_add_parts_") <= 8


def test_one_sum_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Any:
        w = vt.randn(WIDTH).requires_grad_()

        def step(x: Any, y: Any) -> Any:
            return vt.autograd.grad(((x * w - y) ** 2).sum(), [w])[0]

        return step

    names = captured_names(make, batches())
    assert "_add_parts_" not in names and "_row_parts" not in names


def test_small_sums_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_sums, "LEAST_ELEMENTS", 1 << 16)
    names = captured_names(lambda: trained(model(vt.nn.LayerNorm)), batches())
    assert "_add_parts_" not in names


def test_parts_that_take_much_do_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_sums, "MOST_BYTES", 8 * 16 * WIDTH * 4)
    names = captured_names(lambda: trained(model(vt.nn.LayerNorm, 6)), batches())
    many = names.count("_add_parts_")
    assert many > 1
    monkeypatch.setattr(late_sums, "MOST_BYTES", 64)
    names = captured_names(lambda: trained(model(vt.nn.LayerNorm, 6)), batches())
    assert "_add_parts_" not in names
    assert any("their parts take more than" in d for d in decisions())


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16, vt.float16])
@pytest.mark.parametrize("batch", [1, 5])
def test_sums_over_rows(dtype: Any, batch: int) -> None:
    x, y = vt.randn(batch, 130, 24).to(dtype), vt.randn(64, 3, 40).to(dtype)

    def sums(x: Any, y: Any) -> list[Any]:
        return [x.sum(1), y.sum(0), y.sum((0, 1), keepdim=True), (x.sum(1) * 2).clone()]

    tape = check_bits(late_sums.run, sums, x, y, poison=float("nan"))
    if kind() == "cpu":
        assert "_row_parts" in op_names(tape)
    added = [op for op in tape.ops if op.name == "_add_parts_"]
    assert 1 <= len(added) <= 2


def test_a_sum_where_it_reads_stays() -> None:
    def step(x: Any) -> list[Any]:
        first = x.sum(0)
        vt.sum(x, 0, out=x[0])
        return [first, x.sum(0)]

    check_bits(late_sums.run, step, vt.randn(200, 24))


def test_sums_of_numbers_stay() -> None:
    """A tensor without dimensions has no rows; torch lets its first and last be summed."""
    names = captured_names(
        lambda: lambda x, y: (x.mean().sum(0), y.mean().sum((-1,)), x.sum(0), y.sum(0)), batches()
    )
    assert names.count("_add_parts_") == 1


@pytest.mark.parametrize(
    ("of", "to"),
    [(vt.float32, vt.float64), (vt.float32, vt.bfloat16), (vt.float16, vt.bfloat16)],
    ids=str,
)
def test_elements_are_converted_before_they_are_added_up(of: Any, to: Any) -> None:
    x = vt.randn(4096, 24).to(of)

    def sums(x: Any) -> list[Any]:
        return [x.sum(0, dtype=to), (x * 2).sum(0, dtype=to)]

    tape = check_bits(late_sums.run, sums, x)
    assert op_names(tape).count("sum.dim") == 2 and tape.bound == 0


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64], ids=str)
@pytest.mark.parametrize("width", [30, 32])
def test_norms_of_any_width_keep_the_bound(width: int, dtype: Any) -> None:
    """A device streams rows of whole pieces alone; others it sums in parts of another number."""
    ops, shape = _C._ops, [width]
    x, grad = (vt.randn(16384, width).to(dtype) for _ in range(2))
    w = vt.randn(width).to(dtype)

    def gradients(x: Any, grad: Any, w: Any) -> list[Any]:
        out = []
        for y in (x, x * 2):
            _, mean, rstd = ops.native_layer_norm(y, shape, w, w, 1e-5)
            args = (grad, y, y, shape, mean, rstd, w, w, None, [], True)
            out += ops._residual_layer_norm_backward(*args)
        return [t for t in out if t is not None]

    tape = check_bits(late_sums.run, gradients, x, grad, w)
    assert op_names(tape).count("_add_parts_") == 1


def test_many_matrices_stay() -> None:
    """They fill a device by themselves: their sums are one stage."""
    x = vt.randn(600, 64, 8)
    tape = check_bits(late_sums.run, lambda x: [x.sum(1), x.sum((1,), keepdim=True)], x)
    assert op_names(tape) == ["sum.dim", "sum.dim"]
