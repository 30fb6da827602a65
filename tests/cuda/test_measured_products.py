"""Measured algorithms of cuBLASLt: every answer that a row may name gives right numbers, ops take the
answer that a row names, eagerly, captured and in the backward's thread alike, and tuning writes such rows.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import vibetensor.torch as torch
from vibetensor.cute_kernels.product_table import Configuration, Product, ProductRow, update
from vibetensor.torch.cuda import _backend, tunable
from vibetensor.torch.cuda.tunable import Seen

F = torch.nn.functional
DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32, "tf32": torch.float32,
          "f64": torch.float64}  # fmt: skip
# Half an ulp of a number over it, and what a sum of products of normal numbers is off by, a root of a
# term.
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-23, "tf32": 2.0**-23, "f64": 2.0**-52}
SUMS = {"bf16": 8e-6, "f16": 8e-6, "f32": 4e-6, "tf32": 1e-3, "f64": 1e-14}


@pytest.fixture(autouse=True)
def native() -> Iterator[Any]:
    """The extension, without CuTe kernels in the place of products; what a test adds goes with it."""
    cuda = _backend.required()
    mode, enabled = cuda.cute_mode(), cuda.measured_products_enabled()
    cuda.set_cute_mode("off")
    cuda.enable_measured_products(True)
    yield cuda
    cuda.remove_added_products()
    cuda.enable_measured_products(enabled)
    cuda.set_cute_mode(mode)


def dense(p: Product) -> Seen:
    """The product over dense, aligned operands."""
    lda = p.m if p.layout[1] == "t" else p.k
    ldb = p.k if p.layout[0] == "t" else p.n
    strides = (lda, ldb, p.n, p.m * p.k, p.k * p.n, p.m * p.n)
    return Seen(p, strides, 256, torch.cuda.current_device())


def matrices(t: Any, rows: int, columns: int, ld: int, step: int, p: Product, turned: bool) -> Any:
    """rows x columns of a flat tensor, whose memory is their transpose where `turned`, in float64."""
    shape = (p.batch, columns, rows) if turned else (p.batch, rows, columns)
    view = t.as_strided(shape, (step, ld, 1), t.storage_offset())
    out = view.double().cpu().numpy()
    return out.swapaxes(1, 2) if turned else out


def gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu_tanh_slope(x: np.ndarray) -> np.ndarray:
    inner = np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)
    t = np.tanh(inner)
    slope = np.sqrt(2 / np.pi) * (1 + 3 * 0.044715 * x**2)
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope


PRODUCTS = [
    # The layouts of linear layers: forward, input's gradient, weight's gradient with its long sum.
    Product("bf16", "tn", 1, 4096, 1152, 384),
    Product("bf16", "nn", 1, 4096, 384, 1152),
    Product("bf16", "nt", 1, 384, 1152, 16384),
    Product("bf16", "nt", 1, 384, 384, 16384),
    Product("bf16", "nt", 1, 1536, 384, 16384, accumulate=True),
    Product("bf16", "tt", 1, 264, 520, 136),
    Product("bf16", "tn", 1, 4096, 1536, 384, bias=True),
    Product("bf16", "tn", 1, 2048, 1536, 384, epilogue="relu", bias=True),
    Product("bf16", "tn", 1, 2048, 1536, 384, epilogue="gelu_tanh", bias=True),
    Product("bf16", "nn", 1, 2048, 1536, 384, epilogue="gelu_tanh_backward"),
    Product("bf16", "tn", 48, 256, 256, 64),
    Product("bf16", "nn", 48, 256, 64, 256, accumulate=True),
    Product("f16", "nt", 1, 384, 1152, 8192),
    Product("f16", "tn", 1, 1000, 520, 264, bias=True),
    Product("f32", "nt", 1, 384, 384, 4096),
    Product("tf32", "nt", 1, 384, 384, 4096),
    Product("f64", "nn", 3, 96, 80, 200),
]


@pytest.mark.parametrize("p", PRODUCTS, ids=str)
def test_every_answer_is_right(p: Product) -> None:
    torch.manual_seed(0)
    seen = dense(p)
    tensors, trial = tunable._trial(seen)
    lda, ldb, ldc, step_a, step_b, step_c = seen.strides
    a = matrices(tensors["a"], p.m, p.k, lda, step_a, p, p.layout[1] == "t")
    b = matrices(tensors["b"], p.k, p.n, ldb, step_b, p, p.layout[0] == "t")
    product = want = a @ b
    start = tensors["c"].clone()
    if p.accumulate:
        want = want + matrices(start, p.m, p.n, ldc, step_c, p, False)
    if p.bias:
        want = want + tensors["bias"].double().cpu().numpy()
    kept = want
    if p.epilogue == "relu":
        want = np.maximum(want, 0)
    if p.epilogue == "gelu_tanh":
        want = gelu_tanh(want)
    # What the rounding of the product itself, by its half ulp, adds to the error. An epilogue that reads
    # another 16-bit matrix may take the product as rounded to 16 bits: fl(fl(ab) + c) is off by half an
    # ulp of ab beside that of the result (and by that alone where c = -fl(ab)), fl(fl(ab) slope) by half
    # an ulp of ab times the slope.
    first = np.abs(product) if p.accumulate and p.dtype in ("bf16", "f16") else 0.0
    if p.epilogue == "gelu_tanh_backward":
        want = want * gelu_tanh_slope(matrices(tensors["aux"], p.m, p.n, ldc, step_c, p, False))
        first = np.abs(want)
    slack = SUMS[p.dtype] * p.k**0.5 + 1e-12
    configurations = [Configuration(*c) for c in trial.configurations]
    assert len(set(configurations)) == len(configurations) >= 1
    for i, configuration in enumerate(configurations):
        assert configuration.reduction in (0, 2) or p.dtype in ("f32", "tf32", "f64") or i == 0
        tensors["c"].copy_(start if p.accumulate else torch.full_like(start, float("nan")))
        trial.run(i)
        got = matrices(tensors["c"], p.m, p.n, ldc, step_c, p, False)
        # An activation's tanh is the library's own, in float.
        own = 2e-3 * (np.abs(kept) + 1) if p.epilogue.startswith("gelu") else 0.0
        # The first answer may round the parts of a sum.
        roundings = 4 if i == 0 else 1
        rounded = 1.05 * roundings * ROUNDING[p.dtype] * (np.abs(want) + first)
        bound = rounded + slack * 4 + own
        assert not np.isnan(got).any(), configuration
        worst = (np.abs(got - want) - bound).max()
        assert worst <= 0, f"answer {i}, {configuration}: off by {worst} more than it may be"
        if p.epilogue == "gelu_tanh":
            z = matrices(tensors["aux"], p.m, p.n, ldc, step_c, p, False)
            assert (np.abs(z - kept) <= 4.2 * ROUNDING[p.dtype] * np.abs(kept) + slack * 4).all()
        again = tensors["c"].clone()
        tensors["c"].copy_(start if p.accumulate else torch.zeros_like(start))
        trial.run(i)
        assert torch.equal(again, tensors["c"]), configuration  # the same bits each time


def same_bits(a: Any, b: Any) -> bool:
    return bool((a.view(torch.int16) == b.view(torch.int16)).all())


def write_table(path: Path, rows: list[tuple[Product, Configuration]]) -> str:
    gpu = torch.cuda.get_device_name()
    update(path, gpu, [ProductRow(p, c) for p, c in rows], [p for p, _ in rows])
    return str(path)


def test_ops_take_the_answer_that_a_row_names(tmp_path: Path) -> None:
    torch.manual_seed(0)
    p = Product("bf16", "nt", 1, 384, 1152, 16384)
    tensors, trial = tunable._trial(dense(p))
    a, b = tensors["a"].view(p.k, p.m).t(), tensors["b"].view(p.k, p.n)
    configurations = [Configuration(*c) for c in trial.configurations]
    results = []
    for i, configuration in enumerate(configurations):
        tunable.read_file(write_table(tmp_path / "rows.json", [(p, configuration)]))
        got = torch.mm(a, b)
        trial.run(i)
        want = tensors["c"].view(p.m, p.n)
        # The first answer may be none that a row can name; then it is what the op gets anyway.
        assert same_bits(got, want), configuration
        assert same_bits(got, torch.mm(a, b))
        results.append(got)
    assert any(not same_bits(results[0], r) for r in results[1:]), "all answers sum alike"
    tunable.enable(False)
    assert not tunable.is_enabled()
    assert same_bits(torch.mm(a, b), results[0])
    tunable.enable(True)
    assert same_bits(torch.mm(a, b), results[-1])
    # What the library does not offer is no error.
    absent = Configuration(66, tile=65535, stages=65535)
    tunable.read_file(write_table(tmp_path / "rows.json", [(p, absent)]))
    assert same_bits(torch.mm(a, b), results[0])


def training(optimize: bool | None) -> list[Any]:
    """Weights and losses of a few steps from one state; captured unless `optimize` is None."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(384, 1152), torch.nn.GELU(approximate="tanh"),
                                torch.nn.Linear(1152, 384)).cuda()  # fmt: skip
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    x = torch.randn(8192, 384, device="cuda")

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        with torch.autocast(device_type="cuda", dtype=torch.bfloat16):
            loss = (model(x).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = step if optimize is None else torch.cuda.capture(step, optimize=optimize)
    losses = [run(x).item() for _ in range(5)]
    if optimize is not None:
        assert any(v.replays for v in run.variants)
    return [losses, *(w.detach().cpu().numpy() for w in model.parameters())]


def test_captured_steps_and_eager_ones_choose_alike(tmp_path: Path) -> None:
    first = training(None)
    rows = []
    for s in tunable.seen():
        # The weights' gradients: sums of 8192 rows.
        if s.product.layout == "nt" and s.product.k == 8192 and s.product.dtype == "bf16":
            _, trial = tunable._trial(s)
            split = [Configuration(*c) for c in trial.configurations[1:]]
            rows += [(s.product, c) for c in sorted(split, key=lambda c: -c.split_k)[:1]]
    rows = list(dict(rows).items())
    assert rows
    tunable.read_file(write_table(tmp_path / "rows.json", rows))
    eager = training(None)
    captured = training(False)
    assert eager[0] == captured[0]
    for a, b in zip(eager[1:], captured[1:]):
        np.testing.assert_array_equal(a, b)
    # Another order of sums is other bits, and no other training.
    np.testing.assert_allclose(eager[0], first[0], rtol=1e-3)


def test_tuning_measures_what_was_seen_and_writes_it(tmp_path: Path) -> None:
    a = torch.randn(16384, 384, device="cuda").to(torch.bfloat16)
    b = torch.randn(16384, 1152, device="cuda").to(torch.bfloat16)
    torch.mm(a.t(), b)
    wanted = Product("bf16", "nt", 1, 384, 1152, 16384)
    found = [s for s in tunable.seen() if s.product == wanted]
    assert found and found[0].strides[:3] == (384, 1152, 1152) and found[0].alignment == 256
    lines: list[str] = []
    other = {"empty": lambda: None}
    results = tunable.tune(found, report=lines.append, others=lambda seen, tensors: other)
    assert [r.product for r in results] == [wanted] and len(lines) == 1
    (result,) = results
    assert result in tunable.get_results() and not result.problem
    assert 5 < result.us <= result.first_us < 500 and result.answers > 1
    assert 0 <= result.others["empty"] < result.us  # two events and nothing between them
    path = tmp_path / "rows.json"
    assert tunable.write_file(str(path))
    rows = json.loads(path.read_text())["cublaslt"]
    assert (result.configuration is not None) == any(r["at"] == [1, 384, 1152, 16384] for r in rows)
    assert tunable.read_file(str(path))
    expected = a.double().cpu().numpy().T @ b.double().cpu().numpy()
    got = torch.mm(a.t(), b).double().cpu().numpy()
    assert (np.abs(got - expected) <= 2.0**-7 * np.abs(expected) + 4e-3).all()


def test_tuning_says_what_it_cannot_measure(tmp_path: Path) -> None:
    huge = Product("bf16", "nn", 1, 1 << 22, 1 << 18, 64)  # 2 TiB
    (result,) = tunable.tune([dense(huge)])
    assert "memory" in result.problem and result.configuration is None
    other = Seen(huge, (64, 1 << 18, 1 << 18, 0, 0, 0), 256, 63)
    with pytest.raises(ValueError, match="is of device 63"):
        tunable.tune([other])
    gpu = torch.cuda.get_device_name()
    (tmp_path / "rows.json").write_text(json.dumps({"gpus": [gpu], "cublaslt": [{}]}))
    with pytest.raises(ValueError, match="cublaslt row 0: lacks"):
        tunable.read_file(str(tmp_path / "rows.json"))


def test_the_log_says_what_was_chosen(tmp_path: Path, run_python: Any) -> None:
    p = Product("bf16", "nt", 1, 384, 1152, 16384)
    _, trial = tunable._trial(dense(p))
    configuration = Configuration(*trial.configurations[1])
    path = write_table(tmp_path / "rows.json", [(p, configuration)])
    made = run_python(
        "import sys, vibetensor.torch as torch\n"
        "torch.cuda.tunable.read_file(sys.argv[1])\n"
        "a, b = (torch.randn(16384, n, device='cuda').to(torch.bfloat16) for n in (384, 1152))\n"
        "for _ in range(3): torch.mm(a.t(), b)\n"
        "torch.mm(b.t(), a)\n",
        path,
        env={"VT_KERNEL_LOG": "1", "VT_CUTE_KERNELS": "off"},
    )
    lines = [line for line in made.stderr.splitlines() if "cuBLASLt" in line]
    assert made.returncode == 0, made.stderr
    measured = [line for line in lines if "m=384 n=1152 k=16384: measured: algorithm" in line]
    assert len(measured) == 1 and f"tile {configuration.tile}" in measured[0]
    assert sum("m=1152 n=384 k=16384: " in line for line in lines) == 1
