"""What the CUDA library would launch, and why not. Needs the library, and no GPU."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

_cuda = pytest.importorskip("vibetensor._cuda", reason="this build has no CUDA")

HOPPER = ("NVIDIA H200", 9, 0)
COMPILED = bool(_cuda.cute_compiled_by())
KERNELS = {k["name"]: k for k in _cuda.cute_kernels()}


@pytest.fixture(autouse=True)
def mode() -> Iterator[None]:
    before = _cuda.cute_mode()
    yield
    _cuda.set_cute_mode(before)


def layer_norm(m: int, n: int, dtype: str = "bfloat16") -> tuple[dict, dict]:
    tensors = {
        "x": (0x100000, dtype, n),
        "y": (0x40000000, dtype, n),
        "rstd": (0x8000, "float32", 0),
    }
    return {"m": m, "n": n}, tensors


def test_the_table_is_the_registry() -> None:
    from vibetensor.cute_kernels import registry

    loaded = registry.load()
    assert list(KERNELS) == list(loaded)
    for name, kernel in loaded.items():
        contract = kernel.contract(kernel.variants[0])
        assert KERNELS[name]["extents"] == [e.name for e in contract.extents]
        assert KERNELS[name]["tensors"] == [t.name for t in contract.tensors]
        assert KERNELS[name]["scalars"] == [s.name for s in contract.scalars]
        assert KERNELS[name]["variants"] == [(v.name, COMPILED) for v in kernel.variants]


@pytest.mark.skipif("VT_CUTE_KERNELS" in os.environ, reason="VT_CUTE_KERNELS is set")
def test_nothing_is_chosen_that_was_not_measured() -> None:
    assert _cuda.cute_mode() == "table"
    for n in (64, 768, 16384):
        chosen = _cuda.cute_choice("layer_norm_forward", *layer_norm(32, n), "NVIDIA GH200", 9, 0)
        assert chosen == ""


def product(m: int, n: int, k: int) -> tuple[dict, dict]:
    shapes = {"a": k, "b": k, "d": n}
    tensors = {t: (i << 40, "bfloat16", [0, w]) for i, (t, w) in enumerate(shapes.items(), 1)}
    return {"l": 1, "m": m, "n": n, "k": k}, tensors


@pytest.mark.skipif("VT_CUTE_KERNELS" in os.environ, reason="VT_CUTE_KERNELS is set")
@pytest.mark.skipif(not COMPILED, reason="built without the CuTe DSL")
def test_measured_choices() -> None:
    assert KERNELS["gemm_tn"]["measured"] > 0
    assert "turns" in _cuda.cute_choice("gemm_tn", *product(32768, 3072, 768), *HOPPER)
    assert _cuda.cute_choice("gemm_tn", *product(128, 128, 128), *HOPPER) == ""
    assert _cuda.cute_choice("gemm_tn", *product(32768, 3072, 768), "NVIDIA GH200", 9, 0) == ""


@pytest.mark.skipif(not COMPILED, reason="built without the CuTe DSL")
def test_choices_by_the_model() -> None:
    from vibetensor.cute_kernels import registry, tuning_table

    kernels = registry.load()
    models = tuning_table.models(kernels, tuning_table.read_tables(kernels))
    _, model = models["gemm_tn"]
    _cuda.set_cute_mode("table")
    unnamed = ("NVIDIA GH200 480GB", 9, 0)
    assert _cuda.cute_choice("gemm_tn", *product(20000, 1800, 304), *unnamed) == ""
    _cuda.set_cute_mode("model")
    for shape in ((12288, 2304, 1152), (20000, 1800, 304), (9000, 1160, 400), (64, 64, 64)):
        given = product(*shape)
        # Where a row covers it, that is the choice.
        _cuda.set_cute_mode("table")
        row = _cuda.cute_choice("gemm_tn", *given, *HOPPER)
        _cuda.set_cute_mode("model")
        want = row or model.chosen((1, *shape))[0]
        assert _cuda.cute_choice("gemm_tn", *given, *HOPPER) == want
        other = ("NVIDIA H100 PCIe", 9, 0, 114)
        want = model.chosen((1, *shape), 0.2, 114)[0]
        assert _cuda.cute_choice("gemm_tn", *given, *other) == want
        assert _cuda.cute_choice("gemm_tn", *given, "NVIDIA B200", 10, 0, 148) == ""
    assert (
        _cuda.cute_choice("gemm_nt", *product(8192, 512, 512), *HOPPER) == ""
    )  # too little was won for a model


@pytest.mark.skipif(not COMPILED, reason="built without the CuTe DSL")
def test_forced_choices() -> None:
    _cuda.set_cute_mode("all")

    def chosen(m: int, n: int, dtype: str = "bfloat16", gpu: tuple = HOPPER) -> str:
        return _cuda.cute_choice("layer_norm_forward", *layer_norm(m, n, dtype), *gpu)

    assert chosen(4, 64) == "bf16_bf16_256x32"
    assert chosen(4, 256) == "bf16_bf16_256x32"
    assert chosen(4, 264) == "bf16_bf16_512x32"
    assert chosen(4, 768).startswith("bf16_bf16_1024x")
    assert chosen(4, 768, "float32").startswith("f32_f32_1024x")
    assert chosen(4, 16384).startswith("bf16_bf16_16384x")
    assert chosen(4, 16392) == ""  # longer than any
    assert chosen(4, 100) == ""  # not a multiple of 8
    assert chosen(0, 64) == ""
    assert chosen(4, 64, "float64") == ""
    assert chosen(4, 64, gpu=("NVIDIA A100", 8, 0)) == ""
    assert chosen(4, 64, gpu=("NVIDIA B200", 10, 0)) == ""
    _cuda.set_cute_mode("off")
    assert chosen(4, 64) == ""


def attention(dq: int, dk: int, dv: int, strides: list[int], t: int = 64) -> tuple[dict, dict]:
    """A backward of (2, 3, t, 64) heads whose gradients lie at these addresses with these strides."""
    read = {n: ((i + 1) << 30, "bfloat16", [192 * t, 64, 192]) for i, n in enumerate("qkvo")}
    read["grad"] = (9 << 30, "bfloat16", [192 * t, 64, 192])
    read["lse"] = (10 << 30, "float32", [3 * t, t])
    written = {
        n: (a, "bfloat16", strides) for n, a in zip(("grad_q", "grad_k", "grad_v"), (dq, dk, dv))
    }
    return {"b": 2, "h": 3, "t": t, "width": 64, "causal": 1}, {**read, **written}


def test_gradients_may_lie_between_each_other() -> None:
    def why(*places: int, strides: list[int]) -> str:
        given = attention(*places, strides)
        return _cuda.cute_refusal("attention_short_backward", "bf16_causal_128", *given)

    at, packed = 12 << 30, [576 * 64, 64, 576]
    assert why(at, at + 384, at + 768, strides=packed) == ""
    assert why(at + 768, at, at + 384, strides=packed) == ""
    assert "shares memory" in why(at, at + 384, at + 384, strides=packed)
    assert "shares memory" in why(at, at + 368, at + 768, strides=packed)  # into the last head
    assert "shares memory" in why(at, at + 1152, at + 768, strides=packed)  # the next row
    assert why(at, at + 1152 * 128, at + 768, strides=packed) == ""  # beyond the last batch
    # Batches the fastest of the strides; rows too close; apart from each other.
    assert why(at, at + 128, at + 256, strides=[192, 384 * 64, 384]) == ""
    assert "too close" in why(at, at + 384, at + 768, strides=[576 * 64, 64, 64])
    assert "too close" in why(at, at + 384, at + 768, strides=[576 * 63, 64, 576])
    given = attention(at, at + 384, at + 768, packed)
    assert "causal = 1" in _cuda.cute_refusal("attention_short_backward", "bf16_full_128", *given)
    assert "t = 64" not in _cuda.cute_refusal("attention_short_backward", "bf16_full_256", *given)


def test_refusals() -> None:
    def why(extents: dict, tensors: dict, variant: str = "bf16_bf16_256x32") -> str:
        return _cuda.cute_refusal("layer_norm_forward", variant, extents, tensors)

    extents, tensors = layer_norm(4, 64)
    assert why(extents, tensors) == ""
    assert why({"m": 4, "n": 100}, tensors) == "n = 100 is not a multiple of 8"
    assert why({"m": 0, "n": 64}, tensors) == "m = 0 is not from 1 to 2147483647"
    assert why(extents, {**tensors, "weight": (0x9000, "float32", 0)}) == (
        "weight is float32, not bfloat16"
    )
    assert why(extents, {**tensors, "x": (0x100008, "bfloat16", 64)}) == (
        "x is not aligned to 16 bytes"
    )
    assert why(extents, {k: v for k, v in tensors.items() if k != "y"}) == "y is missing"
    assert "y shares memory" in why(extents, {**tensors, "y": (0x100010, "bfloat16", 64)})
    assert why(extents, {**tensors, "y": tensors["x"]}) == ""
    with pytest.raises(ValueError, match="no CuTe kernel is called 'layer'"):
        _cuda.cute_refusal("layer", "x", extents, tensors)
    with pytest.raises(ValueError, match="has no variant 'x'"):
        why(extents, tensors, "x")
    with pytest.raises(TypeError, match="has no tensor 'z'"):
        why(extents, {**tensors, "z": tensors["x"]})
    with pytest.raises(TypeError, match="needs the extent n"):
        why({"m": 4}, tensors)


def test_modes() -> None:
    with pytest.raises(ValueError, match="must be off, table, model or all, got 'on'"):
        _cuda.set_cute_mode("on")
    for name in ("off", "table", "model", "all"):
        _cuda.set_cute_mode(name)
        assert _cuda.cute_mode() == name


def test_the_variable_is_checked(run_python) -> None:
    made = run_python("from vibetensor import _cuda; print(_cuda.cute_mode())",
                      env={"VT_CUTE_KERNELS": "all"})  # fmt: skip
    assert made.stdout.strip() == "all", made.stderr
    made = run_python("from vibetensor import _cuda; _cuda.cute_mode()",
                      env={"VT_CUTE_KERNELS": "some"})  # fmt: skip
    assert "VT_CUTE_KERNELS must be off, table, model or all, got 'some'" in made.stderr
