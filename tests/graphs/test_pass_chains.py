"""Chains of pointwise ops as one op: what is joined, what stays apart, and that no bit changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.graphs.rewritten import check_chains, op_names
from vibetensor.graphs import capture, record
from vibetensor.graphs.passes import chains
from vibetensor.graphs.plan import plan
from vibetensor.graphs.pointwise import NAME
from vibetensor.graphs.tape import Tape

SIZES = [1, 7, 64, 2047, 2048, 2049, 5000, 70_001]


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "LEAST_ELEMENTS", 0)
    monkeypatch.setattr(chains, "LEAST_16_BIT", 0)
    monkeypatch.setattr(chains, "LEAST_ON_GPU", 0)


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = vt.get_num_threads()
    vt.set_num_threads(1)
    yield
    vt.set_num_threads(threads)


def _fused(function: Callable[[], Any]) -> Tape:
    with vt.no_grad():
        return chains.run(record(function).tape)


def _values(n: int, dtype: Any, seed: int = 0) -> vt.Tensor:
    rng = np.random.default_rng(seed)
    return vt.tensor((rng.standard_normal(n) * 3).astype(np.float32)).to(dtype)


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64, vt.bfloat16, vt.float16, vt.int32])
@pytest.mark.parametrize("n", SIZES)
def test_arithmetic(n: int, dtype: Any) -> None:
    x, y = _values(n, dtype), _values(n, dtype, 1)
    check_chains(lambda x, y: [((x + y) * x - y * 2).abs().neg()], x, y)


@pytest.mark.parametrize("dtype", [vt.float32, vt.float64, vt.bfloat16, vt.float16])
@pytest.mark.parametrize("n", SIZES)
def test_functions(n: int, dtype: Any) -> None:
    F = vt.nn.functional

    def function(x: Any, y: Any) -> list[Any]:
        a = 0.5 * x * (1 + vt.tanh(0.797 * (x + 0.0447 * x * x * x)))
        b = F.silu(y) * vt.sigmoid(a) + F.gelu(x, approximate="tanh") - F.gelu(y)
        return [a, (b.exp() / (1 + b.exp())).sqrt(), vt.sin(b) + vt.where(y > 0, x, 0.25)]

    check_chains(function, _values(n, dtype), _values(n, dtype, 1), chain_ops=None)


@pytest.mark.parametrize("n", [5, 4100])
def test_casts_and_comparisons(n: int) -> None:
    def function(x: Any, k: Any) -> list[Any]:
        half = x.to(vt.bfloat16)
        again = (half * 3).to(vt.float16) + 1
        mask = (again > 0.5) & (k < 3)
        return [again.to(vt.float32) * mask, mask, (k * 2 + mask).to(vt.float64) / 3, half]

    check_chains(function, _values(n, vt.float32), _values(n, vt.int64, 1), chain_ops=None)


def test_numbers_promote_as_in_the_op() -> None:
    def function(h: Any, s: Any, x: Any) -> list[Any]:
        a = h * s * 0.1  # a float32 tensor without dimensions beside a float16 one
        return [a + 1.7, x * 0.3 / 7 + 2]

    h, s, x = _values(3000, vt.float16), vt.tensor(0.1), _values(3000, vt.float32, 2)
    check_chains(function, h, s, x, chain_ops=2)
    check_chains(lambda x: [x * 0.1 + 0.7], vt.tensor(np.float32(1.1)))


SHAPES: list[tuple[str, Callable[[Any, Any, Any], Any]]] = [
    ("row", lambda x, r, c: (x + r) * x),
    ("column", lambda x, r, c: (x * c).tanh() + x),
    ("both", lambda x, r, c: (r + c) * 2 + x),
    ("transposed", lambda x, r, c: (x.t() * 2 + x.t().contiguous()) - 1),
    ("turned result", lambda x, r, c: (x.t() * 2).exp()),
    ("slice", lambda x, r, c: (x[:, 1:] * 2 + x[:, :-1]) * 3),
    ("step", lambda x, r, c: (x[::2] * 2 + 1).abs()),
    ("same elements", lambda x, r, c: (x.view(-1) * 2 + 1).view(x.shape).abs()),
]


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (130, 37), (64, 256)])
@pytest.mark.parametrize("name", [name for name, _ in SHAPES])
def test_layouts(name: str, shape: tuple[int, int], dtype: Any) -> None:
    make = dict(SHAPES)[name]
    x = _values(shape[0] * shape[1], dtype).view(shape)
    r, c = _values(shape[1], dtype, 1), _values(shape[0], dtype, 2).view(-1, 1)
    check_chains(lambda x, r, c: [make(x, r, c)], x, r, c)


def test_in_place() -> None:
    def adam(w: Any, g: Any, m: Any, v: Any) -> list[Any]:
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.99).addcmul_(g, g, value=0.01)
        w.sub_(3e-4 * m / (v.sqrt() + 1e-8))
        return []

    check_chains(adam, *(_values(5000, vt.float32, i).abs() for i in range(4)))

    def part(x: Any) -> list[Any]:
        x[10:].mul_(2).add_(1).copy_(x[10:] * 3)
        return [x[10:] + 1]

    check_chains(part, _values(5000, vt.float32))


def test_overlapping_parts_stay_apart() -> None:
    def shifted(x: Any) -> list[Any]:
        x[1:].mul_(2)
        x[:-1].add_(1)
        return [x * 1]

    check_chains(shifted, _values(5000, vt.float32), chain_ops=0)


def test_threads_change_nothing(one_thread: None) -> None:
    x, y = _values(70_001, vt.float32), _values(70_001, vt.float32, 1)
    check_chains(lambda x, y: [((x + y) * x - y).exp().sin() / 3], x, y)


def test_what_others_read_is_written() -> None:
    x, w = vt.randn(64, 64), vt.randn(64, 64)

    def function() -> Any:
        a = x * 2
        b = a.tanh()
        return (b @ w + a).sum()

    tape = _fused(function)
    assert op_names(tape).count(NAME) == 1
    (fused,) = (op for op in tape.ops if op.name == NAME)
    assert len(fused.args[0]) == 2  # a and b; the sum's argument waits for the product
    (made,) = (d for d in tape.decisions if d.made)
    assert "mul, tanh" in made.text


def test_near_misses() -> None:
    x, y = vt.randn(64, 8), vt.randn(8)

    def sizes() -> Any:
        return (y * 2).exp() + x  # a chain over 8, and one op over 64 x 8

    tape = _fused(sizes)
    assert op_names(tape) == [NAME, "add"]
    assert any("sizes differ" in d.text for d in tape.decisions)

    # What runs between reads the first and makes what the second reads.
    def between() -> Any:
        a = x * 2
        return a + a.sum(0)

    tape = _fused(between)
    assert op_names(tape) == ["mul", "sum.dim", "add"]
    assert any("runs between" in d.text for d in tape.decisions)

    tape = _fused(lambda: vt.nn.functional.dropout(x * 2, 0.5) * 3)
    assert op_names(tape) == ["mul", "native_dropout", "mul"]
    assert any("draws random numbers" in d.text for d in tape.decisions)
    assert op_names(_fused(lambda: x * 2)) == ["mul"]


def test_small_ops_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "LEAST_ELEMENTS", 2048)
    monkeypatch.setattr(chains, "LEAST_16_BIT", 1024)
    small, large = vt.randn(2047), vt.randn(2048)
    assert op_names(_fused(lambda: (small * 2).exp())) == ["mul", "exp"]
    assert op_names(_fused(lambda: (large * 2).exp())) == [NAME]
    assert op_names(_fused(lambda: small.to(vt.bfloat16).exp())) == [NAME]
    assert op_names(_fused(lambda: small[:1000].to(vt.bfloat16).exp())) == ["_to_dtype", "exp"]


def test_a_chain_walks_few_tensors() -> None:
    tensors = [vt.randn(64, 64) for _ in range(2 * chains.MOST_TENSORS)]

    def function() -> Any:
        total = tensors[0] * 2
        for tensor in tensors[1:]:
            total = total + tensor
        return total

    tape = _fused(function)
    for op in tape.ops:
        assert len(op.args[0]) + len([v for v in op.args[1] if v.sizes]) <= chains.MOST_TENSORS
    assert 2 <= op_names(tape).count(NAME) < 5
    assert any("too many tensors" in d.text for d in tape.decisions)


def test_ops_between_move_before_or_after() -> None:
    x, w = vt.randn(64, 64), vt.randn(64, 64)

    def function() -> Any:
        a = x * 2
        b = a @ w  # reads the chain: after it
        c = w.sum(0)  # read by the chain: before it
        return (a + c).exp(), b

    tape = _fused(function)
    assert op_names(tape) == ["sum.dim", NAME, "mm"]
    check_chains(lambda x, w: [(x * 2 + w.sum(0)).exp(), (x * 2) @ w], x, w)


def test_results_take_the_place_of_inputs_that_end() -> None:
    x, w = vt.randn(64, 64), vt.randn(64, 64)
    tape = _fused(lambda: ((x @ w * 2).exp() @ w).sum())
    (fused,) = (op for op in tape.ops if op.name == NAME)
    shared = plan(tape, "cpu").shared
    assert shared == {fused.args[0][0].buffer: fused.args[1][0].buffer}

    def read_later() -> Any:
        a = x @ w
        b = a * 2
        return ((b.exp() * a) @ w + b @ w).sum()  # b is written before a is read again

    tape = _fused(read_later)
    (fused,) = (op for op in tape.ops if op.name == NAME)
    first = fused.args[0][0].buffer
    product = next(v.buffer for v in fused.args[1] if v.buffer.role == "scratch")
    assert plan(tape, "cpu").shared.get(first) is not product


def test_a_training_step_gives_the_same_bits() -> None:
    def run(captured: bool) -> list[np.ndarray]:
        vt.manual_seed(3)
        w1 = vt.randn(16, 64, requires_grad=True)
        w2 = vt.randn(64, 8, requires_grad=True)

        def step(x: Any) -> Any:
            for w in (w1, w2):
                w.grad = None
            h = x @ w1
            h = 0.5 * h * (1 + vt.tanh(0.797 * (h + 0.0447 * h * h * h)))
            loss = ((h @ w2) ** 2).mean()
            loss.backward()
            with vt.no_grad():
                for w in (w1, w2):
                    w.sub_(0.01 * w.grad)
            return loss

        function = capture(step) if captured else step
        losses = [function(vt.randn(32, 16)) for _ in range(6)]
        if captured:
            assert NAME in op_names(function.variants[0].tape)
        return [t.detach().numpy().copy() for t in (*losses, w1, w2)]

    for mine, other in zip(run(True), run(False)):
        np.testing.assert_array_equal(mine, other)


def test_a_bad_program_is_refused() -> None:
    from vibetensor import _C

    fused = getattr(_C._ops, NAME)
    out, x = vt.empty(4), vt.randn(4)
    number, compute = _C.graphs.pointwise("exp", [x])
    assert compute == vt.float32
    fused([out], [x], [4], [0, 1, number, 8, 0, 1, 1, 0], [])
    assert bool((out == x.exp()).all())
    for program in ([0, 1, number], [0, 1, number, 8, 0, 1, 7, 0], [0, 1, number, 8, 0, 2, 1, 1, 0], [0, 1, 9999, 8, 0, 1, 1, 0]):  # fmt: skip
        with pytest.raises(RuntimeError, match="_fused_pointwise|exp"):
            fused([out], [x], [4], program, [])
    with pytest.raises(RuntimeError, match="chain over"):
        fused([out], [vt.randn(5)], [4], [0, 1, number, 8, 0, 1, 1, 0], [])
