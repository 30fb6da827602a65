"""Chains of pointwise ops on a device: a kernel made for each has the bits of the ops apart. Runs with
`--device`: a GPU, or the simulated device, which has the rewrites but the CPU's kernels
(test_simulated_device.py)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as vt
from tests.device import DEVICE
from tests.graphs.rewritten import check_chains, op_names
from vibetensor import _C
from vibetensor.graphs import capture
from vibetensor.graphs.passes import chains
from vibetensor.graphs.plan import plan
from vibetensor.graphs.pointwise import _ON_GPU, NAME
from vibetensor.graphs.verify import same_bits

pytestmark = pytest.mark.skipif(DEVICE == "cpu", reason="needs --device: a GPU or simulated")
on_a_gpu = pytest.mark.skipif(DEVICE in ("cpu", "simulated"), reason="needs a GPU")

F = vt.nn.functional
FLOATS = [vt.float32, vt.float64, vt.bfloat16, vt.float16]


@pytest.fixture(autouse=True)
def any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chains, "LEAST_ON_GPU", 0)


def _values(n: int, dtype: Any, seed: int = 0) -> vt.Tensor:
    rng = np.random.default_rng(seed)
    values = rng.standard_normal(n) * np.exp2(rng.integers(-3, 4, n))
    return vt.tensor(values.astype(np.float32)).to(dtype)


def _all_bfloat16() -> vt.Tensor:
    """Every value there is: infinities, NaN and numbers below the normal ones, too."""
    bits = np.arange(1 << 16, dtype=np.uint32) << 16
    return vt.tensor(bits.view(np.float32)).to(vt.bfloat16)


UNARY: dict[str, Callable[[Any], Any]] = {
    "abs": lambda x: x.abs(),
    "neg": lambda x: -x,
    "square": lambda x: x.square(),
    "reciprocal": lambda x: x.reciprocal(),
    "sqrt": lambda x: x.sqrt(),
    "rsqrt": lambda x: x.rsqrt(),
    "exp": lambda x: x.exp(),
    "exp2": lambda x: x.exp2(),
    "log": lambda x: x.log(),
    "log2": lambda x: x.log2(),
    "tanh": lambda x: x.tanh(),
    "erf": lambda x: x.erf(),
    "sigmoid": lambda x: x.sigmoid(),
    "relu": lambda x: x.relu(),
    "silu": F.silu,
    "mish": F.mish,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "scaled": lambda x: x * 0.3,
    "number": lambda x: 1.7 - x,
    **{f"power {e}": (lambda x, e=e: x**e) for e in (1, 2, 3, 0.5, -0.5, -1, -2, 1.5)},
}


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("name", UNARY)
def test_functions(name: str, dtype: Any) -> None:
    op = UNARY[name]
    x = _all_bfloat16() if dtype == vt.bfloat16 else _values(10_007, dtype)
    check_chains(lambda x: [op(x).neg(), op(-x)], x, chain_ops=None)
    # What follows a function sees its result as it would be in memory.
    check_chains(lambda x: [op(x) + 1, op(x * 0.7) - x, op(x) * x + x], x, chain_ops=None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_arithmetic(dtype: Any) -> None:
    def function(x: Any, y: Any) -> list[Any]:
        a = x * y + x
        b = vt.add(a, y, alpha=0.3) / (y.abs() + 1)
        c = vt.sub(b, x, alpha=2) - y
        return [c, vt.maximum(a, b) * vt.minimum(b, c), vt.where(a > b, c, 0.25) + vt.where(y == y, x, y)]  # fmt: skip

    for n in (1, 7, 2048, 70_001):
        check_chains(function, _values(n, dtype), _values(n, dtype, 1), chain_ops=None)


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_of_activations(dtype: Any) -> None:
    ops = _C._ops

    def function(g: Any, x: Any) -> list[Any]:
        y = vt.tanh(x)
        return [
            ops.silu_backward(g, x) * g,
            ops.gelu_backward(g, x, approximate="none") + g,
            ops.gelu_backward(g, x, approximate="tanh") + x,
            ops.tanh_backward(g, y) + ops.sigmoid_backward(g, vt.sigmoid(x)),
            ops.threshold_backward(g, x, 0.5) - g,
            ops._dropout_backward(g, x > 0, 1.25) + g,
        ]

    check_chains(function, _values(5000, dtype), _values(5000, dtype, 1), chain_ops=None)
    if dtype == vt.bfloat16:
        check_chains(function, _values(1 << 16, dtype), _all_bfloat16(), chain_ops=None)


def test_casts_and_comparisons() -> None:
    def function(x: Any) -> list[Any]:
        half = x.to(vt.bfloat16)
        again = (half * 3).to(vt.float16) + 1
        mask = (again > 0.5) & True
        kept = vt.logical_and(mask, x < 3)
        return [again.to(vt.float32) * kept, kept, (x * 2).to(vt.float64) / 3, half, ~mask]

    check_chains(function, _values(4100, vt.float32), chain_ops=None)

    def sum_of_gradients(a: Any, b: Any, c: Any) -> list[Any]:
        return [a.to(vt.float32).add_(b).add_(c, alpha=0.5)]

    tape = check_chains(sum_of_gradients, *(_values(9000, vt.bfloat16, i) for i in range(3)))
    assert op_names(tape) == [NAME]


def test_numbers_promote_as_in_the_op() -> None:
    def function(h: Any, s: Any, x: Any) -> list[Any]:
        a = h * s * 0.1  # a float32 tensor without dimensions beside a float16 one
        return [a + 1.7, x * 0.3 / 7 + 2]

    h, s, x = _values(3000, vt.float16), vt.tensor(0.1), _values(3000, vt.float32, 2)
    check_chains(function, h, s, x, chain_ops=2)
    number = vt.tensor(0.3, device="cpu")
    check_chains(lambda x: [(x * number + number).exp()], x)


SHAPES: dict[str, Callable[[Any, Any, Any], Any]] = {
    "row": lambda x, r, c: (x + r) * x,
    "column": lambda x, r, c: (x * c).tanh() + x,
    "both": lambda x, r, c: (r + c) * 2 + x,
    "turned result": lambda x, r, c: (x.t() * 2).exp(),
    "slice": lambda x, r, c: (x[:, 1:] * 2 + x[:, :-1]) * 3,
    "half": lambda x, r, c: (
        (x[:, : x.shape[1] // 2] * 2 + x[:, x.shape[1] // 2 :][:, : x.shape[1] // 2]) * 3
    ),  # fmt: skip
    "step": lambda x, r, c: (x[::2] * 2 + 1).abs(),
    "unaligned": lambda x, r, c: (x.view(-1)[1:] * 2 + x.view(-1)[:-1]).abs(),
    "same elements": lambda x, r, c: (x.view(-1) * 2 + 1).view(x.shape).abs(),
    "heads": lambda x, r, c: (
        x.view(x.shape[0], -1, 1).expand(-1, -1, 8).transpose(0, 1) * 2
    ).exp(),  # fmt: skip
}


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
@pytest.mark.parametrize("shape", [(3, 5), (130, 37), (64, 256), (24, 1032)])
@pytest.mark.parametrize("name", SHAPES)
def test_layouts(name: str, shape: tuple[int, int], dtype: Any) -> None:
    make = SHAPES[name]
    x = _values(shape[0] * shape[1], dtype).view(shape)
    r, c = _values(shape[1], dtype, 1), _values(shape[0], dtype, 2).view(-1, 1)
    check_chains(lambda x, r, c: [make(x, r, c)], x, r, c, chain_ops=None)


def test_permuted_layouts() -> None:
    x = _values(4 * 6 * 8 * 16, vt.bfloat16).view(4, 6, 8, 16).transpose(1, 2)
    row, column = _values(16, vt.bfloat16, 1), _values(8, vt.bfloat16, 2).view(8, 1, 1)
    check_chains(lambda x: [(x * row + column) * x], x)
    check_chains(lambda x: [(x * row + column).transpose(1, 2) * 2], x)


def test_operands_across_rows_stay_apart() -> None:
    x = _values(64 * 64, vt.float32).view(64, 64)
    tape = check_chains(lambda x: [x * 2 + x.t()], x, chain_ops=0)
    assert any("across rows" in d.text for d in tape.decisions)
    k = vt.arange(5000)
    check_chains(lambda k: [k * 2 + 1], k, chain_ops=0)


def test_in_place() -> None:
    def adam(w: Any, g: Any, m: Any, v: Any) -> list[Any]:
        m.mul_(0.9).add_(g, alpha=0.1)
        v.mul_(0.99).add_(g * g, alpha=0.01)
        w.sub_(3e-4 * m / (v.sqrt() + 1e-8))
        return []

    check_chains(adam, *(_values(5000, vt.float32, i).abs() for i in range(4)), chain_ops=None)

    def part(x: Any) -> list[Any]:
        x[10:].mul_(2).add_(1).copy_(x[10:] * 3)
        return [x[10:] + 1]

    check_chains(part, _values(5000, vt.float32))

    def shifted(x: Any) -> list[Any]:
        x[1:].mul_(2)
        x[:-1].add_(1)
        return [x * 1]

    check_chains(shifted, _values(5000, vt.float32), chain_ops=0)


def _gated(n: int) -> tuple[Callable[[], Any], list[vt.Tensor]]:
    vt.manual_seed(0)
    x = vt.randn(n, 16).to(vt.bfloat16)
    weights = [(vt.randn(16, 24) * 0.3).to(vt.bfloat16) for _ in range(2)]
    weights.append((vt.randn(24, 16) * 0.3).to(vt.bfloat16))
    for w in weights:
        w.requires_grad_()

    def step() -> Any:
        for w in weights:
            w.grad = None
        gate, up, down = weights
        y = (F.silu(x @ gate) * (x @ up)) @ down
        y.backward(y.detach())
        return y

    return step, weights


def test_a_gated_layer_computes_its_activation_again() -> None:
    step, weights = _gated(300)
    captured = capture(step)
    for _ in range(4):
        y = captured()
    grads = [w.grad.clone() for w in weights]
    expected = step()
    assert same_bits(y, expected)
    for mine, w in zip(grads, weights):
        assert same_bits(mine, w.grad)
    tape = captured.variants[0].tape
    fused = [op for op in tape.ops if op.name == NAME]
    # Forward: gate and up to their product. Backward: that of the output, gate and up, to two.
    assert [(len(op.args[0]), len(op.args[1])) for op in fused] == [(1, 2), (2, 3)], tape
    assert "silu" not in op_names(tape)
    assert any("computed again" in d.text for d in tape.decisions if d.made)


def test_what_has_changed_is_not_computed_again() -> None:
    x, w = _values(64 * 64, vt.float32).view(64, 64), _values(64 * 64, vt.float32, 1).view(64, 64)

    def function(x: Any, w: Any) -> list[Any]:
        a = x.exp()
        b = a @ w
        x.mul_(2)
        c = b @ w
        return [c * a + x]

    tape = check_chains(function, x, w, chain_ops=None)
    assert not any("computed again" in d.text for d in tape.decisions)

    def kept(x: Any, w: Any) -> list[Any]:
        a = x.exp()
        b = a @ w
        c = b.sum(0) @ w
        return [(c * a + x) * 2, b]

    tape = check_chains(kept, x, w, chain_ops=None)
    assert any("computed again" in d.text for d in tape.decisions)


@pytest.mark.parametrize("parts", [1, 2, 3])
def test_what_is_computed_again_as_a_whole_is_not_computed_before(parts: int) -> None:
    x, w = _values(64 * 64, vt.float32).view(64, 64), vt.eye(64)

    def function(x: Any, w: Any) -> list[Any]:
        scale = x
        for op in (vt.exp, vt.sigmoid, vt.tanh)[:parts]:
            scale = op(scale)
        far = x
        for _ in range(30):
            far = far @ w
        return [far * scale + x]

    tape = check_chains(function, x, w)
    assert set(op_names(tape)) == {"mm", NAME}, tape


def test_elements_of_the_host_count_as_tensors() -> None:
    tensors = [_values(64, vt.float32, seed) for seed in range(6)]
    factors = [vt.tensor(0.5 + seed, device="cpu") for seed in range(6)]

    def function(*tensors: Any) -> list[Any]:
        total = tensors[0] * 2
        for tensor, factor in zip(tensors, factors):
            total = total + tensor * factor
        return [total]

    tape = check_chains(function, *tensors, chain_ops=None)
    for op in tape.ops:
        if op.name == NAME:
            assert len(op.args[0]) + sum(not view.number for view in op.args[1]) <= 12, tape


def test_what_is_read_in_two_ways_is_not_computed_again() -> None:
    x, w = _values(64 * 64, vt.float32).view(64, 64), vt.eye(64)

    def function(x: Any, w: Any) -> list[Any]:
        a = x.exp()
        far = a
        for _ in range(30):
            far = far @ w
        return [(a - (x + a[:1])) * 2 + far]

    tape = check_chains(function, x, w, chain_ops=None)
    assert not any("computed again" in d.text for d in tape.decisions)


def test_results_take_the_place_of_inputs_that_end() -> None:
    x, w = vt.randn(64, 64), vt.randn(64, 64)
    function = lambda x, w: [((x @ w * 2).exp() @ w).sum()]  # noqa: E731
    tape = check_chains(function, x, w)
    (fused,) = (op for op in tape.ops if op.name == NAME)
    device = fused.args[0][0].buffer.device
    assert plan(tape, device).shared == {fused.args[0][0].buffer: fused.args[1][0].buffer}


def test_a_chain_has_bounds() -> None:
    tensors = [_values(4096, vt.float32, i) for i in range(20)]

    def function(*tensors: Any) -> list[Any]:
        total = tensors[0] * 2
        for tensor in tensors[1:]:
            total = total + tensor
        for i in range(20):
            total = total * (0.5 + i / 7) + 0.1
        return [total]

    tape = check_chains(function, *tensors, chain_ops=None)
    for op in tape.ops:
        if op.name == NAME:
            assert len(op.args[0]) + len([v for v in op.args[1] if not v.number]) <= 12


def test_every_op_listed_is_tested() -> None:
    tested = {name.split()[0] for name in UNARY} - {"power", "scaled", "number"}
    tested |= {"pow", "mul", "add", "sub", "div", "maximum", "minimum", "eq", "ge", "gt", "le"}
    tested |= {"lt", "ne", "logical_and", "logical_not", "logical_or", "gelu_backward"}
    tested |= {"sigmoid_backward", "silu_backward", "tanh_backward", "threshold_backward"}
    assert tested == _ON_GPU


@pytest.mark.parametrize("dtype", [vt.float32, vt.bfloat16])
def test_tests(dtype: Any) -> None:
    def function(x: Any, y: Any) -> list[Any]:
        a, b = (x >= y) | (x < 0), (x <= y) & (y != 0)
        return [
            vt.where(vt.logical_or(x == y, a), x, y) * 2,
            vt.logical_not(x > y).to(dtype) + x,
            vt.logical_and(a, b).to(dtype) * y,
            vt.where(vt.logical_or(x <= y, x >= 1), x, y) * 2,
            vt.where(x != y, x, 2.0) - vt.where(vt.logical_not(x), x, y),
        ]

    x = _values(5000, dtype).round()
    y = _values(5000, dtype, 1).round()
    x[7] = y[9] = float("nan")
    check_chains(function, x, y, chain_ops=None)


@on_a_gpu
@pytest.mark.parametrize("content", ["", "cut", "other", "unwritable", "open to others"])
def test_a_bad_cache_is_no_harm(
    content: str, tmp_path: Path, run_python: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    program = (
        "import vibetensor.torch as vt\n"
        "from vibetensor.graphs import capture\n"
        "x = vt.ones(1 << 15, device='cuda')\n"
        "step = capture(lambda: (x * 2 + 1).exp())\n"
        "for _ in range(4): y = step()\n"
        "assert '_fused_pointwise' in str(step.variants[0].tape)\n"
        "print(float(y[5]))\n"
    )

    def run() -> str:
        done = run_python(program, env={"XDG_CACHE_HOME": str(tmp_path)})
        assert done.returncode == 0, done.stderr
        return done.stdout

    if content == "unwritable":
        (tmp_path / "vibetensor").write_text("a file where the folder should be")
        run()
        return
    first = run()
    (file,) = (tmp_path / "vibetensor" / "kernels").iterdir()
    whole = file.read_bytes()
    if content == "cut":
        file.write_bytes(whole[:-100])
    elif content == "other":
        file.write_bytes(whole[: len(whole) // 2] + b"?" + whole[len(whole) // 2 + 1 :])
    else:
        file.write_bytes(b"")
    if content == "open to others":
        file.parent.chmod(0o777)
        whole = b""  # is neither read nor written
    assert run() == first
    assert file.read_bytes() == whole
