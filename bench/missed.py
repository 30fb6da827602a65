"""Why goals of single kernels are missed: what was measured and tried. `tables.py` puts it below the table.

Shapes are patterns of `fnmatch`. The longer story of each is in NOTES.md, with what was predicted.
"""

from __future__ import annotations

from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any


@dataclass(frozen=True)
class Reason:
    """Of rows whose kernel and shape match."""

    kernel: str
    shape: str
    text: str


REASONS = (
    Reason(
        "GEMM wgrad, bias gradient inside", "*",
        "The product alone is what torch is timed with; the bias gradient reads the gradient once more, "
        "56 us. Tried: the library's own epilogue for it, which is a kernel afterwards (76 us), and sums by "
        "idle warps while tiles are in shared memory (20 us less of 40 for q, k and v, nothing in whole "
        "steps). Captured steps have these sums from the kernel that makes the gradient.",
    ),
    Reason(
        "GEMM *GELU*", "*",
        "The product alone is what torch is timed with. The rest of a tile costs a warp 1,970 instructions "
        "with GELU, 1.14 times as long as its products take, and 2,990 with the slope, 1.3 times. Tried: "
        "polynomials of degree 7, 5 and 4, one barrier a piece instead of two, pieces by twos, stages "
        "released later, stores put off: 0 to 4%, and the best of it is kept. Product and GELU apart take "
        "348 us for 258, product and slope 437 for 278 (`tune.py`).",
    ),
    Reason(
        "GEMM *", "8192x8192x8192",
        "torch has cuBLASLt's first answer; here the fastest of its eight is taken, faster than every CuTe "
        "variant. All run at 700 W, the most that the GPU may draw, so that it is energy that counts: 1.03 "
        "to 1.06x in three runs.",
    ),
    Reason(
        "GEMM *", "32768x768x768",
        "cuBLASLt's kernel in both: 1.00 to 1.01x in other runs.",
    ),
    Reason(
        "GEMM *", "32768x50304x768",
        "cuBLASLt's kernel in both. All of its answers and every CuTe variant were timed for 50 ms on end "
        "in pieces of 8192 rows, as steps have them: the choices are the fastest or within 3% of it.",
    ),
    Reason(
        "GEMM *", "16384x*",
        "As fast as torch's: cuBLASLt's fastest answer, faster than every CuTe variant (`tune.py`, in turns "
        "and L2 emptied).",
    ),
    Reason(
        "attention forward", "B64 H6 T256 D64 causal",
        "cuDNN's kernel in both where query, key and value are tensors of their own (ours 28.5 us); of one "
        "tensor ours, 28.3 us for cuDNN's 32. The CuTe kernel takes 23 us in a loop and is not faster by 3% "
        "once L2 is emptied (`tune.py`).",
    ),
    Reason(
        "attention forward", "B512 H6 T65 D64",
        "A block for a head; it waits for instructions in 46 to 60% of the issue slots, for memory in 38%. "
        "Addresses by exclusive or and masks on edge tiles alone took it from 42 to 37 us in a loop.",
    ),
    Reason(
        "attention forward", "B* T1024 D64 causal",
        "Exponentials take as long as products: instructions are short. Tried: an eighth to a half of them "
        "by polynomials (9 to 15% slower), warpgroups by turns (1 to 3% slower).",
    ),
    Reason("attention forward", "B* T2048 D64 causal", "As of 1024 rows."),
    Reason(
        "attention *", "B* D128 causal",
        "cuDNN's kernels in both: ours are of heads of 64. At 60 and 74% of the rate of plain products they "
        "left least to gain.",
    ),
    Reason(
        "*Norm backward*", "16384x384",
        "50 MB in two launches, of which the second adds up the rows' sums. Tried: two or three stages, 8 to "
        "16 warps, which make no difference.",
    ),
)  # fmt: skip


def reason_of(row: dict[str, Any]) -> str:
    """Why the goal of a row is missed; empty where nobody has said it."""
    if row["goal"].startswith("≤"):
        least = row["of_limit"] * row["vibetensor_us"]
        if least > float(row["goal"].split()[1]):
            return f"Its bytes alone take {least:.0f} us at the rate of copies, more than the goal."
    for reason in REASONS:
        if fnmatchcase(row["kernel"], reason.kernel) and fnmatchcase(row["shape"], reason.shape):
            return reason.text
    return ""
