"""Every family's kernels, compiled to PTX and run on the CPU, against their references.

Needs the CuTe DSL, and no GPU. What is written is poisoned before, rows are padded, and accesses
outside the tensors, misaligned ones and broken shuffles or barriers are errors (ptx_machine.py).
"""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("cutlass", reason="needs the CuTe DSL")

from emulate import emulate, rounded, variant_of
from ptx_machine import Memory, bfloat16_values

RNG = np.random.default_rng(7)
NAMES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}
#: A rounding of the result, and what float32 arithmetic adds.
TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-10, "float32": 4e-6}


def numbers(shape, dtype: str = "float32", scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    return rounded(RNG.normal(size=shape) * scale + shift, dtype)


def close(got, want, dtype: str) -> None:
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape
    limit = TOLERANCE[dtype] * np.maximum(np.abs(want), np.abs(want).max() / 16 + 1e-30)
    worst = np.abs(got - want) / limit
    assert (worst <= 1).all(), f"{worst.max():.3g} of the tolerance at {np.argmax(worst)}"


NORMS = [
    ("layer_norm_forward", "bf16_bf16_256x32", 5, 72, True),
    ("layer_norm_forward", "bf16_f32_1024x64", 3, 520, True),
    ("layer_norm_forward", "f32_f32_512x32", 5, 384, False),
    ("layer_norm_forward", "f16_f16_16384x1024", 1, 16376, True),
    ("rms_norm_forward", "bf16_bf16_512x32", 6, 512, True),
    ("rms_norm_forward", "f32_f32_1024x64", 3, 1000, True),
    ("rms_norm_forward", "f16_f16_512x32", 5, 264, False),
]


@pytest.mark.parametrize(("kernel", "variant", "m", "n", "full"), NORMS)
def test_norm_forward(kernel: str, variant: str, m: int, n: int, full: bool) -> None:
    found, v = variant_of(kernel, variant)
    dtype, parameters = NAMES[v.dtype], NAMES[v.parameters]
    arrays = {"x": numbers((m, n), dtype, 2, 30), "y": "out", "rstd": "out"}
    given = {}
    if full:
        given = {"residual": numbers((m, n), dtype), "weight": numbers(n, parameters)}
        arrays |= {**given, "total": "out"}
        if v.centred:
            given["bias"] = numbers(n, parameters)
            arrays |= {"bias": given["bias"], "mean": "out"}
    out = emulate(kernel, variant, (-(-m // v.rows),), {"m": m, "n": n}, arrays, {"eps": 1e-5}, 8)
    assert out is not None
    want = found.reference(arrays["x"], 1e-5, round_to=lambda a: rounded(a, dtype), **given)
    for name, value in out.items():
        if name == "total":
            assert np.array_equal(value, want[name])
        else:
            close(value, want[name], "float32" if name in ("mean", "rstd") else dtype)


def test_norm_forward_in_place() -> None:
    x = numbers((3, 64), "bfloat16")
    arrays = {"x": x, "y": "x"}
    out = emulate(
        "rms_norm_forward", "bf16_bf16_256x32", (1,), {"m": 3, "n": 64}, arrays, {"eps": 1e-6}
    )
    assert out is not None
    want = variant_of("rms_norm_forward", "bf16_bf16_256x32")[0].reference(x, 1e-6)
    close(out["y"], want["y"], "bfloat16")


BACKWARD = [
    ("layer_norm_backward", "bf16_bf16_256x32", 19, 72, 8, True),
    ("layer_norm_backward", "bf16_f32_1024x64", 9, 520, 4, True),
    ("layer_norm_backward", "f32_f32_512x32", 5, 384, 8, False),
    ("layer_norm_backward", "f32_f32_16384x512", 5, 16384, 4, True),
    ("rms_norm_backward", "bf16_bf16_512x32", 11, 512, 4, True),
    ("rms_norm_backward", "f16_f16_256x32", 3, 256, 4, False),
]


@pytest.mark.parametrize(("kernel", "variant", "m", "n", "groups", "full"), BACKWARD)
def test_norm_backward(kernel: str, variant: str, m: int, n: int, groups: int, full: bool) -> None:
    found, v = variant_of(kernel, variant)
    dtype = NAMES[v.dtype]
    total = numbers((m, n), dtype, 2, 3)
    forward = variant_of(kernel.replace("backward", "forward"), variant.replace("x512", "x1024")
                         if v.capacity == 16384 else variant)[0]  # fmt: skip
    statistics = forward.reference(total, 1e-5)
    given = {"dy": numbers((m, n), dtype), "total": total}
    given["rstd"] = statistics["rstd"].astype(np.float32)
    if v.centred:
        given["mean"] = statistics["mean"].astype(np.float32)
    if full:
        given["weight"] = numbers(n, NAMES[v.parameters])
        given["dtotal"] = numbers((m, n), dtype)
    arrays = {**given, "dx": "out"}
    if full:
        arrays |= {"weight_parts": "out"} | ({"bias_parts": "out"} if v.centred else {})
    extents = {"m": m, "n": n, "groups": groups}
    out = emulate(kernel, variant, (groups // v.rows,), extents, arrays, pad=8)
    assert out is not None
    want = found.reference(**given)
    close(out["dx"], want["dx"], dtype)
    if full:
        close(out["weight_parts"].sum(0), want["dweight"], "float32")
        if v.centred:
            close(out["bias_parts"].sum(0), want["dbias"], "float32")


CROSS_ENTROPY = [
    ("bf16_v8_32", 5, 65, 0.0),
    ("bf16_v1_32", 5, 65, 0.1),
    ("f32_v4_256", 3, 3001, 0.1),
    ("f16_v8_256", 2, 5000, 0.0),
    ("f32_v1_32", 3, 100, 0.0),
    ("bf16_v8_1024", 2, 20011, 0.2),
]


@pytest.mark.parametrize(("variant", "m", "n", "smoothing"), CROSS_ENTROPY)
def test_cross_entropy(variant: str, m: int, n: int, smoothing: float) -> None:
    kernel, v = variant_of("cross_entropy_in_place", variant)
    dtype = NAMES[v.dtype]
    x = numbers((m, n), dtype, 4)
    if smoothing == 0:
        x[0, 3] = -np.inf
    targets = RNG.integers(0, n, m)
    targets[0] = n - 1
    targets[1] = -100
    scalars = {"ignore_index": -100, "smoothing": smoothing}
    extents = {"m": m, "n": n, "words": 3, "grads": 1, "one": 1}
    pad = -n % 8 if v.width > 1 else 3
    grid = (-(-m // v.rows),)
    read = {"logits": x, "targets": targets, "record": np.zeros(3)}
    weight = np.array([float((targets != -100).sum())])
    want = kernel.reference(x, targets, -100, smoothing, 2.0, weight[0])

    out = emulate("cross_entropy_forward", variant, grid, extents,
                  {**read, "losses": "out", "weights": "out", "lse": "out"}, scalars, pad)  # fmt: skip
    assert out is not None and not out["record"].any()
    for name in ("losses", "weights", "lse"):
        close(out[name], want[name], "float32")

    gradient = {"grad": np.array([2.0]), "total_weight": weight}
    backward = {"logits": x, "targets": targets, "lse": want["lse"], **gradient, "dx": "out"}
    out = emulate("cross_entropy_backward", variant, grid, extents, backward, scalars, pad)
    assert out is not None
    close(out["dx"], want["dx"], dtype)

    both = {**read, "losses": "out", "lse": "out", **gradient, "dx": "logits"}
    out = emulate("cross_entropy_in_place", variant, grid, extents, both, scalars, pad)
    assert out is not None
    close(out["losses"], want["losses"], "float32")
    close(out["dx"], want["dx"], dtype)


def test_cross_entropy_gradient_a_row() -> None:
    m, n = 5, 40
    x, targets, grad = numbers((m, n)), RNG.integers(0, n, m), numbers(m)
    kernel, _ = variant_of("cross_entropy_backward", "f32_v4_32")
    want = kernel.reference(x, targets, grad=grad)
    out = emulate(
        "cross_entropy_backward",
        "f32_v4_32",
        (2,),
        {"m": m, "n": n, "grads": m, "one": 1},
        {"logits": x, "targets": targets, "lse": want["lse"], "grad": grad, "dx": "out"},
        {"ignore_index": -100, "smoothing": 0.0},
    )
    assert out is not None
    close(out["dx"], want["dx"], "float32")


def test_cross_entropy_of_extremes() -> None:
    n = 300
    x = numbers((4, n), scale=4)
    x[0, 7] = np.nan
    x[1, 7] = np.inf
    x[2] = -np.inf
    x[3] *= 1e30
    targets = np.array([0, 0, 0, int(np.argmax(x[3]))])
    out = emulate(
        "cross_entropy_in_place",
        "f32_v4_32",
        (1,),
        {"m": 4, "n": n, "words": 3, "grads": 1, "one": 1},
        {"logits": x, "targets": targets, "record": np.zeros(3), "losses": "out", "lse": "out",
         "grad": np.ones(1), "dx": "out"},
        {"ignore_index": -100, "smoothing": 0.0},
    )  # fmt: skip
    assert out is not None
    assert np.isnan(out["losses"][:3]).all() and out["losses"][3] == 0
    assert np.isnan(out["dx"][0]).all()
    assert not out["dx"][3].any()


def test_norm_of_a_row_with_nan_and_inf() -> None:
    x = numbers((3, 64), "bfloat16")
    x[0, 5], x[1, 5] = np.nan, np.inf
    out = emulate(
        "layer_norm_forward",
        "bf16_bf16_256x32",
        (1,),
        {"m": 3, "n": 64},
        {"x": x, "y": "out"},
        {"eps": 1e-5},
    )
    assert out is not None
    assert np.isnan(out["y"][:2]).all()
    want = variant_of("layer_norm_forward", "bf16_bf16_256x32")[0].reference(x[2:], 1e-5)
    close(out["y"][2:], want["y"], "bfloat16")


@pytest.mark.parametrize("target", [-1, 40, 2**40])
def test_cross_entropy_stops_at_a_target_out_of_range(target: int) -> None:
    memory = Memory()
    out = emulate(
        "cross_entropy_forward",
        "f32_v4_32",
        (1,),
        {"m": 1, "n": 40, "words": 3},
        {"logits": numbers((1, 40)), "targets": np.array([target]), "record": np.zeros(3),
         "losses": "out", "lse": "out"},
        {"ignore_index": -100, "smoothing": 0.0},
        memory=memory,
    )  # fmt: skip
    assert out is None
    record = np.array([10, target, 40], np.int64).tobytes()
    assert record in memory.bytes.tobytes()


@pytest.mark.parametrize("variant", ["bf16_256x32", "f32_1024x128", "f16_512x64"])
@pytest.mark.parametrize("logarithm", [0, 1])
def test_softmax(variant: str, logarithm: int) -> None:
    kernel, v = variant_of("softmax_forward", variant)
    dtype = NAMES[v.dtype]
    m, n = 5, v.capacity - 24
    x = numbers((m, n), dtype, 5)
    x[1, 5] = -np.inf
    grid, extents, scalars = (-(-m // v.rows),), {"m": m, "n": n}, {"logarithm": logarithm}
    out = emulate("softmax_forward", variant, grid, extents, {"x": x, "y": "out"}, scalars, 8)
    assert out is not None
    want = kernel.reference(x, logarithm)["y"]
    finite = np.isfinite(want)
    assert np.array_equal(out["y"][~finite], want[~finite])
    close(np.where(finite, out["y"], 0), np.where(finite, want, 0), dtype)
    y = np.where(finite, rounded(want, dtype), -30)
    dy = numbers((m, n), dtype)
    backward = {"dy": dy, "y": y, "dx": "out"}
    out = emulate("softmax_backward", variant, grid, extents, backward, scalars, 8)
    assert out is not None
    close(out["dx"], variant_of("softmax_backward", variant)[0].reference(dy, y, logarithm)["dx"],
          dtype)  # fmt: skip


@pytest.mark.parametrize("variant", ["bf16_256", "f32_256"])
@pytest.mark.parametrize("state", [None, [99, 2**33]])
def test_dropout(variant: str, state: list[int] | None) -> None:
    kernel, v = variant_of("dropout_forward", variant)
    n = 2 * v.threads * v.width + 24
    x = numbers(n, NAMES[v.dtype])
    scalars = {"limit": int(0.3 * 2**32), "scale": 1 / 0.7, "seed": 2**40 + 5, "offset": 2**32 - 3}
    arrays = {"x": x, "y": "out", "mask": "out"}
    if state:
        arrays["state"] = np.array(state)
    out = emulate("dropout_forward", variant, (3,), {"n": n, "words": 2}, arrays, scalars)
    assert out is not None
    want = kernel.reference(x, **scalars, state=state)
    assert np.array_equal(out["mask"], want["mask"])
    assert 0.6 < want["mask"].mean() < 0.8
    close(out["y"], want["y"], NAMES[v.dtype])


@pytest.mark.parametrize("variant", ["bf16_32", "f32_128"])
def test_embedding_backward(variant: str) -> None:
    kernel, v = variant_of("embedding_backward", variant)
    positions, words, d = 40, 11, 2 * v.threads * v.width - 8 if v.threads == 32 else 72
    indices = RNG.integers(0, words, positions)
    order = np.argsort(indices, kind="stable")
    dy = numbers((positions, d), NAMES[v.dtype])
    before = np.zeros((words, d))
    given = {"dy": dy, "keys": indices[order], "order": order, "table": before}
    grid = (positions, -(-d // (v.threads * v.width)))
    extents = {"positions": positions, "words": words, "d": d}
    out = emulate("embedding_backward", variant, grid, extents, given, {"padding_idx": 4})
    assert out is not None
    want = kernel.reference(dy, indices[order], order, before, 4)["table"]
    close(out["table"], want, NAMES[v.dtype])
    assert not out["table"][4].any()


@pytest.mark.parametrize("variant", ["f32_512", "bf16_256"])
@pytest.mark.parametrize(("step", "skip"), [(1, 0), (1000, 0), (3, 1)])
def test_adamw(variant: str, step: int, skip: int) -> None:
    kernel, v = variant_of("adamw_step", variant)
    gradients = NAMES[v.gradients]
    memory, rows, chunks, tensors = Memory(), [], [], []
    for which, numel in enumerate((10, 8195)):
        arrays = [numbers(numel), numbers(numel, gradients), numbers(numel) * 0.1,
                  np.abs(numbers(numel)) * 0.01]  # fmt: skip
        copy = np.zeros(numel, np.uint16)
        from emulate import stored

        held = [stored(a, gradients if i == 1 else "float32") for i, a in enumerate(arrays)]
        places = [memory.place(a) for a in (*held, copy)]
        if which == 0:
            places[4] = 0
        rows.append([*places, numel])
        chunks += [[which, at] for at in range(0, numel, 8192)]
        tensors.append((arrays, held, copy))
    beta1, beta2, decay, eps = 0.9, 0.999, 0.1, 1e-8
    settings = np.array([1e-3, step, 0.5, skip])
    out = emulate(
        "adamw_step",
        variant,
        (len(chunks),),
        {"count": 2, "six": 6, "blocks": len(chunks), "two": 2, "four": 4},
        {"tensors": np.array(rows), "chunks": np.array(chunks), "numbers": settings},
        {"keep1": 1 - beta1, "keep2": 1 - beta2, "log_beta1": np.log(beta1),
         "log_beta2": np.log(beta2), "weight_decay": decay, "eps": eps},
        memory=memory,
    )  # fmt: skip
    assert out is not None
    for row, (arrays, held, copy) in zip(rows, tensors):
        want = kernel.reference(*arrays, settings, beta1, beta2, decay, eps)
        for at, like, name in ((0, 0, "weight"), (2, 2, "average"), (3, 3, "square")):
            close(memory.read(row[at], held[like]), want[name], "float32")
        if row[4]:
            written = bfloat16_values(memory.read(row[4], copy))
            if skip:
                assert not written.any()
            else:
                new = memory.read(row[0], held[0])
                assert np.array_equal(written, rounded(new, "bfloat16"))
