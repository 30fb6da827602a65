"""Measures the variants of CuTe kernels, and the algorithms of cuBLASLt, on the GPU at hand and writes the
table of choices, cute_kernels/tuning/GPU.json.

python bench/tune.py [--kernel layer_norm_forward ...] [--least-gain 0.03]
python bench/tune.py --workload all             # minigpt, vit, gpt2, llama1b, batched; some 60 s
python bench/tune.py --workload gpt2            # or another of these, reverse, vibe-vit, vibe-shakespeare

--kernel: for each kernel and shape every variant that applies is timed beside the library's kernel, the
L2 cache emptied before each launch. Where the best one is faster by --least-gain, its row goes into the
table; the row's ranges reach half way (geometrically) to the neighbouring shapes. Of products, the shapes
where the library's kernel stays are written down too: the model for shapes in no row is fitted to both.
Rows of kernels that were not measured are kept.

--workload: runs a step of the workload (eager, then captured) to see its products, and times for each the
answers that cuBLASLt offers, up to 32, in turns on random data, the L2 cache emptied before each. The best
of 5, then 9 rounds is compared with the library's first answer in 21 rounds more: a row that names it by
its configuration is written where it takes 3% and 0.3 us less, and less in 80% of these rounds. Where
CuTe kernels are compiled in, their variants take turns with the answers; if the table has one for the
product and the library is faster than it by as much, a row says so. The table is written after each
workload, so a run that was cut off goes on with the others. Rows of products that were not measured are
kept. `torch.cuda.tunable` does the same for products of your own.

Build again to use the table; or torch.cuda.tunable.read_file(table) for the rows of products.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tune_cases
import tune_products
from tune_cases import DTYPES, ROWS, VOCABULARIES, Case

import vibetensor.torch as torch
import vibetensor.torch.nn.functional as F
from vibetensor import _C
from vibetensor.cute_kernels import device, model, product_table, registry, tuning_table

TUNING = Path(registry.__file__).parent / "tuning"
FLUSH_SECONDS = 20e-6  # less than 128 MiB take to write
#: Extents that decide between variants, or that rows hold for alone.
EXACT = ("l", "causal", "width")


def neighbourhoods(points: list[int]) -> dict[int, tuple[int, int]]:
    """Closed ranges around sorted points, meeting at geometric means; the ends reach a factor 2."""
    points = sorted(set(points))
    ranges = {}
    for i, p in enumerate(points):
        low = math.isqrt(points[i - 1] * p) + 1 if i else max(1, p // 2)
        high = math.isqrt(p * points[i + 1]) if i + 1 < len(points) else 2 * p
        ranges[p] = (low, high)
    return ranges


def _time(call: Callable[[], object], flush: Any, rounds: int = 15) -> float:
    """Median microseconds on the device."""
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    # The device is kept busy for longer than the call takes to issue, so that it never waits for it.
    flushes = 1 + math.ceil((time.perf_counter() - began) / FLUSH_SECONDS)
    spent = []
    for _ in range(rounds):
        for _ in range(flushes):
            flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        spent.append(start.elapsed_time(end) * 1000)
    return statistics.median(spent)


def _norms(kind: str, backward: bool) -> Iterator[tuple[str, Case]]:
    for code, dtype in DTYPES.items():
        for n in (64, 128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 8192, 16384):
            for m in ROWS:
                x, dy = (torch.randn(m, n, device="cuda").to(dtype) for _ in range(2))
                w, b = (torch.randn(n, device="cuda").to(dtype) for _ in range(2))
                y, dx = torch.empty_like(x), torch.empty_like(x)
                mean, rstd = (torch.zeros(m, device="cuda") for _ in range(2))
                rstd.fill_(1.0)
                centred = kind == "layer_norm"
                groups = max(4, min(132 * max(1, min(8192 // n, 16)), m) // 4 * 4)
                parts = [torch.empty(groups, n, device="cuda") for _ in range(2)]

                def given(_, t=(x, w, b, y, mean, rstd), centred=centred) -> dict[str, Any]:
                    x, w, b, y, mean, rstd = t
                    extra = {"bias": b, "mean": mean} if centred else {}
                    return {"x": x, "weight": w, "y": y, "rstd": rstd, "eps": 1e-5, **extra}

                def given_back(
                    _, t=(x, dy, w, dx, mean, rstd, parts), centred=centred
                ) -> dict[str, Any]:
                    x, dy, w, dx, mean, rstd, parts = t
                    extra = {"bias_parts": parts[1], "mean": mean} if centred else {}
                    return {"dy": dy, "total": x, "weight": w, "rstd": rstd, "dx": dx,
                            "weight_parts": parts[0], **extra}  # fmt: skip

                leaf = x.detach().requires_grad_()
                weight, bias = w.detach().requires_grad_(), b.detach().requires_grad_()
                leaves = [leaf, weight, bias] if centred else [leaf, weight]

                def forward(leaves=leaves, n=n, centred=centred) -> object:
                    if centred:
                        return F.layer_norm(leaves[0], (n,), leaves[1], leaves[2])
                    return F.rms_norm(leaves[0], (n,), leaves[1])

                if backward:
                    out = forward()

                    def library(out=out, leaves=leaves, dy=dy) -> object:
                        return torch.autograd.grad(out, leaves, dy, retain_graph=True)

                    yield code, Case({"m": m, "n": n}, given_back, library)
                else:

                    def library(forward=forward) -> object:
                        with torch.no_grad():
                            return forward()

                    yield code, Case({"m": m, "n": n}, given, library)


def _softmax(backward: bool) -> Iterator[tuple[str, Case]]:
    for code, dtype in DTYPES.items():
        for n in (64, 256, 512, 1024, 2048, 4096, 8192, 16384):
            for m in ROWS:
                x, dy = (torch.randn(m, n, device="cuda").to(dtype) for _ in range(2))
                y = torch.softmax(x, -1)
                out = torch.empty_like(x)

                def given(_, t=(x, dy, y, out)) -> dict[str, Any]:
                    x, dy, y, out = t
                    named = {"dy": dy, "y": y, "dx": out} if backward else {"x": x, "y": out}
                    return {**named, "logarithm": 0}

                leaf = x.detach().requires_grad_()
                made = torch.softmax(leaf, -1)

                def library(t=(x, dy, leaf, made)) -> object:
                    x, dy, leaf, made = t
                    if backward:
                        return torch.autograd.grad(made, leaf, dy, retain_graph=True)
                    return torch.softmax(x, -1)

                yield code, Case({"m": m, "n": n}, given, library)


def _cross_entropy(backward: bool) -> Iterator[tuple[str, Case]]:
    for code, dtype in DTYPES.items():
        for n, rows in VOCABULARIES:
            for m in rows:
                x = torch.randn(m, n, device="cuda").to(dtype)
                targets = torch.randint(0, n, (m,), device="cuda")
                losses, weights, lse = (torch.empty(m, device="cuda") for _ in range(3))
                record = torch.zeros(3, dtype=torch.int64, device="cuda")
                ones = torch.ones(1, device="cuda")
                dx = torch.empty_like(x)

                def given(_, t=(x, targets, losses, weights, lse, record, ones, dx)) -> dict:
                    x, targets, losses, weights, lse, record, ones, dx = t
                    named = {"logits": x, "targets": targets, "lse": lse}
                    if backward:
                        named |= {"grad": ones, "total_weight": ones, "dx": dx}
                    else:
                        named |= {"losses": losses, "weights": weights, "record": record}
                    return {**named, "ignore_index": -100, "smoothing": 0.0}

                leaf = x.detach().requires_grad_()
                loss = F.cross_entropy(leaf, targets)

                def library(t=(x, targets, leaf, loss)) -> object:
                    x, targets, leaf, loss = t
                    if backward:
                        return torch.autograd.grad(loss, leaf, retain_graph=True)
                    return F.cross_entropy(x, targets)

                yield code, Case({"m": m, "n": n}, given, library)


def _linear_shapes(layout: str) -> Iterator[tuple[int, int, int]]:
    """Rows, columns and summed extent of the products of transformers' linear layers."""
    for m in (8192, 16384, 32768):
        for d in (256, 384, 512, 768, 1024, 2048):
            for n, k in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d)):
                yield {"tn": (m, n, k), "nn": (m, k, n), "nt": (n, k, m)}[layout]
    for m, n, k in ((32768, 50304, 768), (16384, 32000, 2048)):
        yield {"tn": (m, n, k), "nn": (m, k, n), "nt": (n, k, m)}[layout]


def _products(layout: str, epilogue: str = "", tanh: bool = False) -> Iterator[tuple[str, Case]]:
    """In bfloat16 and float16; `tanh`: GELU's other form."""
    for code in ("bf16", "f16"):
        yield from ((code, case) for case in _products_of(DTYPES[code], layout, epilogue, tanh))


def _products_of(dtype: Any, layout: str, epilogue: str, tanh: bool) -> Iterator[Case]:
    form = "tanh" if tanh else "none"
    for m, n, k in _linear_shapes(layout):
        if epilogue and n > 8192:
            continue
        if epilogue in ("slope", "again") and n != 4 * k:
            continue  # the gradient of what is behind an activation

        def rand(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda").to(dtype)

        a = rand(1, k, m) if layout == "nt" else rand(1, m, k)
        b = rand(1, n, k) if layout == "tn" else rand(1, k, n)
        left = a[0].t() if layout == "nt" else a[0]
        right = b[0].t() if layout == "tn" else b[0]
        c = torch.zeros(1, m, n, device="cuda", dtype=dtype)
        d = torch.empty_like(c)
        bias = rand(n)
        sums = torch.empty(-(-m // 128) * 4, n, device="cuda")
        extra = {
            "": {},
            "add": {"c": c},
            "bias": {"bias": bias},
            "gelu": {"bias": bias, "z": c},
            "slope": {"z": c, "sums": sums},
            "again": {"z": c, "y": torch.empty_like(c), "sums": sums},
        }[epilogue]

        def given(_, t=(a, b, d, extra)) -> dict[str, Any]:
            return {"a": t[0], "b": t[1], "d": t[2], **t[3], "max_blocks": 132}

        def library(t=(left, right, b, c, d, bias), epilogue=epilogue) -> object:
            left, right, b, c, d, bias = t
            if epilogue == "add":
                return c[0].addmm_(left, right)
            if epilogue == "bias":
                return F.linear(left, b[0], bias)
            if epilogue == "gelu":
                return F.gelu(F.linear(left, b[0], bias), approximate=form)
            if epilogue in ("slope", "again"):
                dz = _C._ops.gelu_backward(left @ right, c[0], form)
                y = F.gelu(c[0], approximate=form) if epilogue == "again" else None
                return dz, dz.sum(0), y
            return torch.mm(left, right)

        yield Case({"l": 1, "m": m, "n": n, "k": k}, given, library)


CASES: dict[str, Callable[[], Iterator[tuple[str, Case]]]] = {
    "layer_norm_forward": lambda: _norms("layer_norm", False),
    "layer_norm_backward": lambda: _norms("layer_norm", True),
    "rms_norm_forward": lambda: _norms("rms_norm", False),
    "rms_norm_backward": lambda: _norms("rms_norm", True),
    "softmax_forward": lambda: _softmax(False),
    "softmax_backward": lambda: _softmax(True),
    "cross_entropy_forward": lambda: _cross_entropy(False),
    "cross_entropy_backward": lambda: _cross_entropy(True),
    **{f"gemm_{x}": lambda x=x: _products(x) for x in ("tn", "nn", "nt")},
    **{f"gemm_add_{x}": lambda x=x: _products(x, "add") for x in ("tn", "nn", "nt")},
    "gemm_bias_tn": lambda: _products("tn", "bias"),
    "gemm_bias_gelu_tn": lambda: _products("tn", "gelu"),
    "gemm_slope_gelu_nn": lambda: _products("nn", "slope"),
    "gemm_slope_gelu_again_nn": lambda: _products("nn", "again"),
    "gemm_bias_gelu_tanh_tn": lambda: _products("tn", "gelu", tanh=True),
    "gemm_slope_gelu_tanh_nn": lambda: _products("nn", "slope", tanh=True),
    "gemm_slope_gelu_tanh_again_nn": lambda: _products("nn", "again", tanh=True),
    "attention_short_forward": lambda: tune_cases.attention(False),
    "attention_short_backward": lambda: tune_cases.attention(True),
    "dropout_forward": tune_cases.dropout,
    "embedding_backward": tune_cases.embedding,
    "adamw_step": tune_cases.adamw,
    "cross_entropy_in_place": tune_cases.loss_in_place,
}


def code_of(variant: Any) -> str:
    """The dtype that a variant's cases have."""
    return variant.gradients if hasattr(variant, "gradients") else variant.dtype


def measure(
    name: str, least_gain: float, flush: Any
) -> tuple[list[dict[str, Any]], list[list[int]]]:
    """The rows of one kernel and the shapes where the library's stays, and a line for each shape on
    the way."""
    kernel = registry.load()[name]
    found = []
    measured: dict[str, list[dict[str, int]]] = {}  # every shape, also where the library won
    for code, case in CASES[name]():
        measured.setdefault(code, []).append(case.extents)
        library = _time(case.library, flush)
        best, best_time = None, math.inf
        for variant in kernel.variants:
            if code_of(variant) != code:
                continue
            try:
                arguments = case.arguments(variant)
                device.launch(name, variant.name, **arguments)
            except ValueError:
                continue  # its contract does not hold for this shape
            spent = _time(device.prepared(name, variant.name, **arguments), flush)
            if spent < best_time:
                best, best_time = variant, spent
        shape = ", ".join(f"{k}={v}" for k, v in case.extents.items())
        print(f"{name} {code} {shape}: library {library:.1f} us, "
              f"{best.name if best else 'no variant'} {best_time:.1f} us", flush=True)  # fmt: skip
        if best is not None and best_time < library * (1 - least_gain):
            found.append((code, case.extents, best.name, best_time, library))
    rows, kept = [], []
    shape_of = model.is_product(kernel)
    # The model knows one dtype: products of another take as long, and are not in it.
    won = [extents for code, extents, *_ in found if code == "bf16"]
    for extents in measured.get("bf16", ()):
        if shape_of and extents not in won:
            kept.append([extents[axis] for axis in model.EXTENTS])
    for code, extents, variant, spent, library in found:
        points = measured[code]
        ranges = {
            axis: [value, value]
            if axis in EXACT
            else list(neighbourhoods([p[axis] for p in points])[value])
            for axis, value in extents.items()
        }
        in_model = shape_of and code == "bf16"
        at = {"at": [extents[axis] for axis in model.EXTENTS]} if in_model else {}
        rows.append({"kernel": name, "variant": variant, "extents": ranges, **at,
                     "us": round(spent, 2), "library_us": round(library, 2)})  # fmt: skip
    return rows, kept


def tune_kernels(names: list[str], least_gain: float, path: Path, gpu: str) -> None:
    """Measures kernels and writes their rows."""
    from vibetensor import _cuda

    if not _cuda.cute_compiled_by():
        raise SystemExit("this build has no CuTe kernels: build with -DVT_CUTE=ON")
    _cuda.set_cute_mode("off")  # the library's kernels are the other side
    record = product_table.read_record(path) if path.exists() else {"gpus": [gpu]}
    # Those of the library for single products are of --workload.
    rows = [
        r
        for r in record.get("rows", [])
        if r["kernel"] not in names or r["variant"] == tuning_table.LIBRARY
    ]
    kept = {n: shapes for n, shapes in record.get("library", {}).items() if n not in names}
    flush = torch.empty(128 << 20, dtype=torch.uint8, device="cuda")
    for name in names:
        won, lost = measure(name, least_gain, flush)
        rows += won
        if lost:
            kept[name] = lost
    size = torch.cuda.get_device_properties().multi_processor_count
    product_table.write(path, {**record, "multiprocessors": size, "library": kept, "rows": rows})
    print(f"{len(rows)} rows in {path}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernel", action="append", choices=sorted(CASES))
    parser.add_argument("--least-gain", type=float, default=0.03)
    parser.add_argument("--workload", action="append", choices=("all", *tune_products.CHOICES))
    parser.add_argument("--table", type=Path, help="another file than that of cute_kernels/tuning")
    given = parser.parse_args()
    if given.kernel and given.workload:
        parser.error("--kernel and --workload exclude each other")
    if not torch.cuda.is_available():
        raise SystemExit("tuning needs a GPU that this build of vibetensor can use")
    gpu = torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-") + ".json"
    path = given.table or TUNING / name
    if given.workload:
        everything = [*tune_products.TRAINED, "batched"]
        asked = everything if "all" in given.workload else given.workload
        tune_products.tune(asked, path)
    else:
        tune_kernels(given.kernel or sorted(CASES), given.least_gain, path, gpu)


if __name__ == "__main__":
    main()
