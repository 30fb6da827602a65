"""Contracts, references, generated code and measured choices. Needs neither the DSL nor CUDA."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from vibetensor.cute_kernels import build, contract, launch_table, manifest, registry, tuning_table
from vibetensor.cute_kernels.rows import RowShape, row_shapes

KERNELS = registry.load()
RNG = np.random.default_rng(3)


def test_every_family_has_kernels() -> None:
    assert {k.family for k in KERNELS.values()} == set(registry.FAMILIES)
    for family in registry.FAMILIES:
        assert registry.load((family,)).keys() <= KERNELS.keys()
    with pytest.raises(ValueError, match="no family is called 'norm'"):
        registry.load(("norm",))


@pytest.mark.parametrize(
    ("given", "used"),
    [("/cache", "/cache"), (None, "/home/me/.cache"), ("", "/home/me/.cache"),
     ("cache", "/home/me/.cache"), ("./cache", "/home/me/.cache")],
)  # fmt: skip
def test_cache_folder(monkeypatch: pytest.MonkeyPatch, given: str | None, used: str) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if given is not None:
        monkeypatch.setenv("XDG_CACHE_HOME", given)
    assert build.default_output() == Path(used, "vibetensor", "cute_kernels")


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=lambda k: k.name)
def test_contracts_promise_what_vector_accesses_need(kernel: registry.Kernel) -> None:
    for variant in kernel.variants:
        made = kernel.contract(variant)
        for t in made.tensors:
            if t.align < 16 or len(t.shape) == 1:
                continue
            # Every row of a tensor with 16-byte accesses begins at a multiple of 16 bytes.
            assert t.stride_divisible_by * contract.ITEM_SIZE[t.dtype] % 16 == 0, t.name
        assert any(t.access != "read" for t in made.tensors) or kernel.name == "adamw_step"


def test_contract_refuses_mistakes() -> None:
    extents = (contract.Extent("n"),)
    for bad, message in (
        (contract.Tensor("x", "bf16", ("n",)), "unknown dtype 'bf16'"),
        (contract.Tensor("x", "float32", ("k",)), r"no extent is called \['k'\]"),
        (contract.Tensor("x", "float32", ("n",), "readwrite"), "unknown access"),
        (contract.Tensor("x", "float32", ("n",), align=12), "no power of two"),
        (contract.Tensor("x", "float32", ("n",), may_alias=("y",)), "may alias unknown"),
        (contract.Tensor("do", "float32", ("n",)), "cannot be an argument's name in C"),
    ):
        with pytest.raises(ValueError, match=message):
            contract.Contract(extents, (bad,))
    x = contract.Tensor("x", "float32", ("n",))
    with pytest.raises(ValueError, match="names must differ"):
        contract.Contract(extents, (x, x))


def test_register_refuses_mistakes() -> None:
    known = KERNELS["softmax_forward"]
    with pytest.raises(ValueError, match="registered already"):
        registry.register(known)
    from dataclasses import replace

    with pytest.raises(ValueError, match="variants named alike"):
        registry.register(replace(known, name="twice", variants=known.variants[:1] * 2))
    with pytest.raises(ValueError, match="no variants"):
        registry.register(replace(known, name="none", variants=()))
    with pytest.raises(ValueError, match="cannot be a kernel's name"):
        registry.register(replace(known, name="Soft"))
    assert registry.load().keys() == KERNELS.keys()


@pytest.mark.parametrize("width", [4, 8])
def test_row_shapes_cover_every_column_once(width: int) -> None:
    shapes = row_shapes(width, 256, 16384, elements=16)
    assert [s.capacity for s in shapes] == [256 << i for i in range(7)]
    for s in shapes:
        t, v, k = np.ogrid[: s.threads, : s.vectors(width), :width]
        columns = ((v * s.threads + t) * width + k).reshape(-1)
        assert np.array_equal(np.sort(columns), np.arange(s.capacity))
        assert s.threads * s.rows <= 1024
    with pytest.raises(ValueError):
        RowShape(256, 64, 4)  # rows of several warps share a block's barriers
    with pytest.raises(ValueError):
        RowShape(250, 32, 1).vectors(8)


def test_online_softmax_by_blocks() -> None:
    """The kernel's way to a log-sum-exp: a running maximum and sum a thread, then over threads."""
    x = RNG.normal(size=1000).astype(np.float32) * 8
    x[:40] = -np.inf  # all that some threads see
    threads, width = 8, 4
    tops, totals = np.full(threads, -np.inf, np.float32), np.zeros(threads, np.float32)
    for t in range(threads):
        for at in range(t * width, len(x), threads * width):
            piece = x[at : at + width]
            top = max(tops[t], piece.max())
            shift = top if np.isfinite(top) else np.float32(0)
            with np.errstate(invalid="ignore"):
                totals[t] = totals[t] * np.exp(tops[t] - shift) + np.exp(piece - shift).sum()
            tops[t] = top
    top = tops.max()
    lse = top + np.log((totals * np.exp(tops - top)).sum())
    reference = KERNELS["cross_entropy_forward"].reference(x[None], np.array([999]))
    assert np.allclose(lse, reference["lse"], rtol=1e-6)


def test_tiles_of_a_product_are_each_taken_once() -> None:
    """The numbering of gemm/dense.py: bands of rows of tiles, the last one lower."""
    from vibetensor.cute_kernels.gemm.dense import BAND

    for rows, columns in ((1, 1), (8, 3), (9, 5), (23, 2)):
        taken = set()
        for tile in range(rows * columns):
            band, at = divmod(tile, BAND * columns)
            height = min(BAND, rows - band * BAND)
            taken.add((band * BAND + at % height, at // height))
        assert taken == {(r, c) for r in range(rows) for c in range(columns)}


def test_blocks_of_attention_are_each_taken_once() -> None:
    from vibetensor.cute_kernels.attention.short import owned

    for blocks in (1, 2, 4):
        groups = min(2, blocks)
        shares = [owned(group, groups, blocks) for group in range(groups)]
        assert sorted(sum(shares, [])) == list(range(blocks))
        # A causal block of queries sees as many blocks of keys as come before it, and its own.
        work = [sum(block + 1 for block in share) for share in shares]
        assert blocks < 4 or len(set(work)) == 1


def test_gradients_of_attention_agree_with_differences() -> None:
    q, k, v, grad = RNG.normal(size=(4, 1, 1, 5, 64)) / 4
    forward = KERNELS["attention_short_forward"].reference
    for causal in (False, True):
        got = KERNELS["attention_short_backward"].reference(grad, q, k, v, 0.3, causal)
        for name, x in (("grad_q", q), ("grad_k", k), ("grad_v", v)):
            at, eps = (0, 0, 2, 7), 1e-6
            ends = []
            for sign in (1, -1):
                kept = x[at]
                x[at] = kept + sign * eps
                ends.append((forward(q, k, v, 0.3, causal)["o"] * grad).sum())
                x[at] = kept
            assert np.isclose(got[name][at], (ends[0] - ends[1]) / (2 * eps), rtol=1e-4, atol=1e-9)


def test_slopes_of_epilogues_agree_with_differences() -> None:
    from vibetensor.cute_kernels.gemm.epilogue import (
        ACTIVATIONS,
        reference_activation,
        reference_slope,
    )

    x, eps = RNG.normal(size=50) * 3, 1e-6
    for name in ACTIVATIONS:
        found = (reference_activation(x + eps, name) - reference_activation(x - eps, name)) / (
            2 * eps
        )
        assert np.allclose(reference_slope(x, name), found, atol=1e-6), name


def test_tails_of_gelu_are_as_exact_as_said() -> None:
    """The polynomials of the epilogues, in float32 as there: relative errors up to 3, and absolute ones."""
    from vibetensor.cute_kernels.gemm.epilogue import LOWER_TAIL

    a = np.linspace(0, 6, 60001, dtype=np.float32)
    tail = np.array([math.erfc(x / math.sqrt(2)) / 2 for x in a.tolist()])
    for dtype, near, of_gelu in (("bfloat16", 4.3e-4, 6e-5), ("float16", 3e-6, 4e-7)):
        power = np.zeros_like(a)
        for c in LOWER_TAIL[dtype]:
            power = (power.astype(np.float64) * a + np.float32(c)).astype(np.float32)
        wrong = np.abs(np.exp2(power.astype(np.float64)) - tail)
        assert (wrong / tail)[a < 3].max() <= near
        assert (wrong * a).max() <= of_gelu
        # Beyond, an error is one that float32 has in 1 + erf, and the tail still falls.
        assert (wrong - near * tail)[a >= 3].max() <= 6e-8
        assert (wrong / tail).max() <= 0.17 and (np.diff(power) <= 0).all()


def test_references_agree_with_derivatives() -> None:
    """Backward references against differences of the forward ones."""
    m, n, eps = 3, 16, 1e-6
    x, dy, w, b = (RNG.normal(size=s) for s in ((m, n), (m, n), n, n))
    for kind, bias in (("layer_norm", b), ("rms_norm", None)):
        forward, backward = KERNELS[f"{kind}_forward"], KERNELS[f"{kind}_backward"]

        def loss(x, w, b, forward=forward):
            return (forward.reference(x, 1e-5, weight=w, bias=b)["y"] * dy).sum()

        stats = forward.reference(x, 1e-5)
        mean = stats["mean"] if kind == "layer_norm" else None
        got = backward.reference(dy, x, stats["rstd"], mean, w)
        for name, at, value in (("dx", 0, x), ("dweight", 1, w), ("dbias", 2, bias)):
            if value is None:
                continue
            for index in np.ndindex(value.shape):
                args = [x, w, bias]
                lower, upper = value.copy(), value.copy()
                lower[index] -= eps
                upper[index] += eps
                ends = [loss(*[moved if i == at else a for i, a in enumerate(args)])
                        for moved in (lower, upper)]  # fmt: skip
                assert np.isclose(got[name][index], (ends[1] - ends[0]) / (2 * eps), atol=1e-6)
    targets = np.array([1, -100, 15])
    ce = KERNELS["cross_entropy_in_place"].reference
    got = ce(x, targets, -100, 0.1, 1.0, 2.0)["dx"]
    for index in np.ndindex(x.shape):
        lower, upper = x.copy(), x.copy()
        lower[index] -= eps
        upper[index] += eps
        slope = ce(upper, targets, -100, 0.1)["losses"].sum() / 2
        slope -= ce(lower, targets, -100, 0.1)["losses"].sum() / 2
        assert np.isclose(got[index], slope / (2 * eps), atol=1e-6)


def test_manifest_survives_a_file(tmp_path: Path) -> None:
    one = manifest.Built("k", "f", "v", "k_v", "key", {"threads": 32}, 40, 0, 1000, 0.5)
    whole = manifest.Manifest("4.8.1", "sm_90a", (one,))
    path = tmp_path / "manifest.json"
    whole.write(path)
    assert manifest.Manifest.read(path) == whole
    path.write_text(path.read_text().replace('"version": 1', '"version": 0'))
    with pytest.raises(ValueError, match="a manifest of version 0, not 1; build again"):
        manifest.Manifest.read(path)


def test_a_key_changes_with_what_an_object_is_made_from() -> None:
    kernel = KERNELS["layer_norm_forward"]
    first, second = kernel.variants[:2]
    sources = build.source_hash("norms")
    key = build.key_of(kernel, first, sources, "4.8.1")
    assert key == build.key_of(kernel, first, sources, "4.8.1")
    others = {
        build.key_of(kernel, second, sources, "4.8.1"),
        build.key_of(kernel, first, build.source_hash("softmax"), "4.8.1"),
        build.key_of(kernel, first, sources, "4.9.0"),
    }
    assert len(others) == 3 and key not in others


def test_build_without_the_dsl_says_so(tmp_path: Path) -> None:
    code = """
import importlib, sys
sys.modules["cutlass"] = None
from vibetensor.cute_kernels.__main__ import main
out = sys.argv[1]
assert main(["build", "--out", out]) == 0
assert main(["check", "--out", out]) == 1
assert main(["table", "--out", out, "--into", out]) == 0
"""
    import vibetensor

    root = Path(vibetensor.__file__).parents[1]
    made = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, cwd=root
    )
    assert made.returncode == 0, made.stderr
    assert "the CuTe DSL is not installed" in made.stdout
    assert "library kernels are used" in made.stdout
    assert "nothing was compiled" in made.stderr
    assert manifest.Manifest.read(tmp_path / "manifest.json").variants == ()


def test_generated_table(tmp_path: Path) -> None:
    launch_table.generate(None, tmp_path)
    header = (tmp_path / "cuda/cute/arguments.h").read_text()
    table = (tmp_path / "cuda/cute/table.cpp").read_text()
    for kernel in KERNELS.values():
        assert f"struct {launch_table.struct_name(kernel)} {{" in header
        for variant in kernel.variants:
            assert f'{{"{variant.name}", ' in table
    assert "enter_" not in table  # nothing was compiled
    times = [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*.*"))]
    launch_table.generate(None, tmp_path)
    assert times == [p.stat().st_mtime_ns for p in sorted(tmp_path.rglob("*.*"))]
    sources = Path(__file__).parents[2] / "csrc"
    compiler = shutil.which("c++")
    if compiler is None or not sources.exists():
        pytest.skip("needs a C++ compiler and a checkout")
    program = tmp_path / "try.cpp"
    program.write_text(
        '#include "cuda/cute/arguments.h"\n'
        "using namespace vt::cuda::cute;\n"
        "int main() { LayerNormForward a; a.n = 8; a.eps = 1;\n"
        "  const auto v = a.values();\n"
        "  return v.call().extents[1] == 8 && v.call().scalars[0].f32 == 1 ? 0 : 1; }\n"
    )
    subprocess.run(
        [compiler, "-std=c++20", "-Wall", "-Werror", f"-I{sources}", f"-I{tmp_path}",
         str(program), "-o", str(tmp_path / "try")], check=True
    )  # fmt: skip
    subprocess.run([str(tmp_path / "try")], check=True)


def test_measured_choices(tmp_path: Path) -> None:
    tables = tuning_table.read_tables(KERNELS)
    measured = {"NVIDIA H100 80GB HBM3", "NVIDIA H200"}
    assert {row.gpu for row in tuning_table.rows_of(tables)} == measured
    variant = KERNELS["softmax_forward"].variants[0].name
    row = {"kernel": "softmax_forward", "variant": variant, "extents": {"n": [64, 256]}}
    path = tmp_path / "gpu.json"

    def written(**changed: object) -> tuple[tuning_table.Row, ...]:
        rows = [{**row, **changed}]
        path.write_text(json.dumps({"gpus": ["A GPU", "Its like"], "rows": rows}))
        return tuning_table.rows_of(tuning_table.read_tables(KERNELS, tmp_path))

    assert written() == tuple(
        tuning_table.Row(gpu, "softmax_forward", variant, {"n": (64, 256)})
        for gpu in ("A GPU", "Its like")
    )
    for changed, message in (
        ({"kernel": "softmin"}, "row 0: no kernel is called 'softmin'"),
        ({"variant": "x"}, "softmax_forward has no variant 'x'"),
        ({"extents": {"k": [1, 2]}}, r"has no extent \['k'\]"),
        ({"extents": {"n": [2, 1]}}, "ends before it begins"),
        ({"at": [1, 2, 3, 4]}, "measured shapes are kept of products"),
    ):
        with pytest.raises(ValueError, match=message):
            written(**changed)
    path.write_text(json.dumps({"gpu": "A GPU", "rows": []}))
    with pytest.raises(ValueError, match="needs 'gpus', a list of names"):
        tuning_table.read_tables(KERNELS, tmp_path)
    written()
    text = launch_table._table(KERNELS, None, tuning_table.read_tables(KERNELS, tmp_path))
    assert 'const char* const kGpus[] = {"A GPU", "Its like"};' in text
    ranges = "{{{0, 4611686018427387904}, {64, 256}}}"
    assert f"softmax_forward_tuned[] = {{{{0, 0, {ranges}}}, {{1, 0, {ranges}}}}}" in text
