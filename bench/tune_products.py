"""What tune.py --workload measures: the algorithms that cuBLASLt offers for every product of a training
step, in turns with the CuTe variants of the same product where they are compiled in."""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from train_process import build
from workloads import WORKLOADS

import vibetensor.torch as torch
from vibetensor.cute_kernels import device, product_table, registry
from vibetensor.cute_kernels.product_table import Product
from vibetensor.cute_kernels.tuning_table import DTYPES, LIBRARY
from vibetensor.torch.cuda import tunable
from vibetensor.torch.cuda.tunable import Result, Seen

#: Whose products a table is for; "batched" are products of attention's heads, which fused kernels compute
#: in the others.
TRAINED = ("minigpt", "vit", "gpt2", "llama1b")
CHOICES = (*WORKLOADS, "batched")
KERNELS = registry.load()


def products_of(workload: str) -> list[Seen]:
    """The products of a workload's steps, eager and captured, that this process has not had before. Runs
    them at full size and without CuTe kernels, as a build without these does."""
    from vibetensor import _cuda

    before = set(tunable.seen())
    mode = _cuda.cute_mode()
    _cuda.set_cute_mode("off")
    try:
        _batched() if workload == "batched" else _steps(workload)
    finally:
        _cuda.set_cute_mode(mode)
    gc.collect()
    torch.cuda.empty_cache()
    return [s for s in tunable.seen() if s not in before]


def _steps(name: str) -> None:
    workload = WORKLOADS[name]
    options = {"workload": name, "scale": "full", "device": "cuda", "mode": "capture",
               "dtype": workload.dtype}  # fmt: skip
    step, steady = build(options, torch)
    rng = np.random.default_rng(0)
    x, y = (torch.from_numpy(a).cuda() for a in workload.batch(workload.config("full"), rng))
    for _ in range(6):
        step(x, y)
        if steady():
            break
    else:
        raise RuntimeError(f"{name}: the step was not captured")
    torch.cuda.synchronize()


def _batched() -> None:
    """Scores and weighted sums of heads, forward and backward, and their accumulation."""
    for count, t, width in ((384, 256, 64), (384, 1024, 64), (128, 512, 128)):
        q, k, v = (
            torch.randn(count, t, width, device="cuda").to(torch.bfloat16).requires_grad_()
            for _ in range(3)
        )
        scores = torch.bmm(q, k.transpose(1, 2))
        torch.bmm(scores, v).backward(torch.ones_like(v))
        with torch.no_grad():
            torch.baddbmm(v, scores.detach(), k.detach(), out=torch.empty_like(v))


def kernel_of(product: Product) -> str:
    """The CuTe kernel that computes a product; empty where there is none."""
    if product.epilogue or product.dtype not in DTYPES or product.layout == "tt":
        return ""
    kind = "bias_" * product.bias + "add_" * product.accumulate
    name = f"gemm_{kind}{product.layout}"
    return name if name in KERNELS and name != "gemm_bias_add_tn" else ""


def _arguments(seen: Seen, flat: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a product as its CuTe kernel has them."""
    p = seen.product
    lda, ldb, ldc, step_a, step_b, step_c = seen.strides
    a = (p.k, p.m) if p.layout[1] == "t" else (p.m, p.k)
    b = (p.n, p.k) if p.layout[0] == "t" else (p.k, p.n)

    def shaped(name: str, rows: int, columns: int, ld: int, step: int) -> Any:
        return flat[name].as_strided((p.batch, rows, columns), (step or rows * ld, ld, 1),
                                     flat[name].storage_offset())  # fmt: skip

    d = shaped("c", p.m, p.n, ldc, step_c)
    given = {"a": shaped("a", *a, lda, step_a), "b": shaped("b", *b, ldb, step_b), "d": d}
    given |= {"c": d} if p.accumulate else {}
    given |= {"bias": flat["bias"]} if p.bias else {}
    multiprocessors = torch.cuda.get_device_properties().multi_processor_count
    return {**given, "max_blocks": multiprocessors}


def cute_launches(seen: Seen, flat: dict[str, Any]) -> dict[str, Callable[[], object]]:
    """The compiled CuTe variants that apply to a product."""
    from vibetensor import _cuda

    name = kernel_of(seen.product)
    shared = seen.product.batch > 1 and 0 in seen.strides[3:]  # by all products of a batch
    if not name or shared or not _cuda.cute_compiled_by():
        return {}
    if torch.cuda.get_device_capability() != (9, 0):
        return {}
    arguments = _arguments(seen, flat)
    found: dict[str, Callable[[], object]] = {}
    for variant in KERNELS[name].variants:
        if variant.dtype != seen.product.dtype:
            continue
        launch = device.prepared(name, variant.name, **arguments)
        try:
            launch()
        except ValueError:
            continue  # its contract does not hold
        found[variant.name] = launch
    return found


def cute_choice(product: Product) -> str:
    """The variant that this build's table launches for a dense, aligned product; empty for none."""
    from vibetensor import _cuda

    name = kernel_of(product)
    if not name:
        return ""
    m, n, k, dtype = product.m, product.n, product.k, DTYPES[product.dtype]
    rows = {"a": m if product.layout[1] == "t" else k, "b": k if product.layout[0] == "t" else n,
            "d": n}  # fmt: skip
    steps = {"a": m * k, "b": k * n, "d": m * n}
    tensors: dict[str, Any] = {
        t: (i << 40, dtype, [steps[t], ld]) for i, (t, ld) in enumerate(rows.items(), 1)
    }
    if product.accumulate:
        tensors["c"] = tensors["d"]
    if product.bias:
        tensors["bias"] = (9 << 40, dtype, 0)
    extents = {"l": product.batch, "m": product.m, "n": product.n, "k": product.k}
    gpu = torch.cuda.get_device_properties()
    mode = _cuda.cute_mode()
    _cuda.set_cute_mode("table")
    try:
        return _cuda.cute_choice(name, extents, tensors, gpu.name, gpu.major, gpu.minor,
                                 gpu.multi_processor_count)  # fmt: skip
    finally:
        _cuda.set_cute_mode(mode)


def library_row(result: Result, chosen: str) -> dict[str, Any] | None:
    """The row that keeps a product with the library, where the CuTe variant that the table has chosen
    was slower than the library's best answer by more than a row wants."""
    p = result.product
    us, own = result.others.get(chosen), result.beside_us
    if us is None or us - own < max(tunable.LEAST_GAIN * us, tunable.LEAST_MICROSECONDS):
        return None
    extents = {axis: [value, value] for axis, value in zip("lmnk", (p.batch, p.m, p.n, p.k))}
    return {"kernel": kernel_of(p), "variant": LIBRARY, "dtype": p.dtype, "extents": extents,
            "us": round(own, 2), "cute_us": round(us, 2)}  # fmt: skip


def with_library_rows(
    rows: list[dict[str, Any]], new: list[dict[str, Any]], measured: list[Product]
) -> list[dict[str, Any]]:
    """A table's rows of kernels with those of the library for single products, which come first; those
    of products that were measured again are not kept."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["kernel"], row["dtype"], tuple(low for low, _ in row["extents"].values())

    again = {(kernel_of(p), p.dtype, (p.batch, p.m, p.n, p.k)) for p in measured}
    own = [r for r in rows if r["variant"] == LIBRARY and key(r) not in again]
    return sorted(own + new, key=key) + [r for r in rows if r["variant"] != LIBRARY]


def tune(workloads: list[str], path: Path) -> None:
    """Measures the products of each workload and merges what won into the table, one after the other,
    so that a run that was cut off can go on with the rest."""
    gpu = torch.cuda.get_device_name()
    for name in workloads:
        began = time.perf_counter()
        products = products_of(name)
        ran = time.perf_counter()
        results = tunable.tune(products, report=print, others=cute_launches)
        measured = [r for r in results if not r.problem]
        rows = tunable.rows_of(measured)
        product_table.update(path, gpu, rows, [r.product for r in measured])
        kept = [row for r in measured if (row := library_row(r, cute_choice(r.product)))]
        record = product_table.read_record(path)
        kernels = record.get("rows", [])
        merged = with_library_rows(kernels, kept, [r.product for r in measured])
        if merged != kernels:
            product_table.write(path, {**record, "rows": merged})
        gained = sum(r.first_us - r.us for r in measured if r.configuration)
        first = sum(r.first_us for r in measured)
        print(f"{name}: {len(results)} products, {len(rows)} rows that take {gained:.0f} us less of "
              f"{first:.0f} (each product once), {len(kept)} for the library before a CuTe variant; "
              f"{ran - began:.1f} s for its steps, {time.perf_counter() - ran:.1f} s measuring")  # fmt: skip
        sys.stdout.flush()
        torch.cuda.empty_cache()
