"""Products of matrices of 8-bit floats with scales: torch.nn.functional.scaled_mm."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from typing import Any

from vibetensor import _C
from vibetensor._C import Tensor


class ScalingType(enum.Enum):
    """How a matrix was scaled before it was rounded to 8 bits."""

    TensorWise = 0
    RowWise = 1
    BlockWise1x16 = 2
    BlockWise1x32 = 3
    BlockWise1x128 = 4
    BlockWise128x128 = 5


class SwizzleType(enum.Enum):
    """How the scales of blocks lie in memory."""

    NO_SWIZZLE = 0
    SWIZZLE_32_4_4 = 1


def scaled_mm(
    mat_a: Tensor,
    mat_b: Tensor,
    scale_a: Tensor | list[Tensor],
    scale_recipe_a: ScalingType | list[ScalingType],
    scale_b: Tensor | list[Tensor],
    scale_recipe_b: ScalingType | list[ScalingType],
    swizzle_a: SwizzleType | list[SwizzleType] | None = None,
    swizzle_b: SwizzleType | list[SwizzleType] | None = None,
    bias: Tensor | None = None,
    output_dtype: Any = _C.bfloat16,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    """mat_a @ mat_b of 8-bit floats, each times its scale, plus a bias: (m, k), (k, n) → (m, n).

    The recipes are both ``TensorWise`` (a float32 number each) or both ``RowWise`` (scales (m, 1) and
    (1, n)). Sums are in float32 and rounded once to ``output_dtype`` (None: that of ``mat_a``).
    Raises NotImplementedError for scales of blocks, swizzles and other contracted dimensions, and
    ValueError for scales that are not what their recipe says.
    """
    recipe_a, recipe_b = (
        _one(scale_recipe_a, "scale_recipe_a"),
        _one(scale_recipe_b, "scale_recipe_b"),
    )
    a, b = _one(scale_a, "scale_a"), _one(scale_b, "scale_b")
    if recipe_a is not recipe_b or recipe_a not in (ScalingType.TensorWise, ScalingType.RowWise):
        raise NotImplementedError(
            f"scaled_mm: recipes {recipe_a} and {recipe_b}; both must be ScalingType.TensorWise or "
            "both ScalingType.RowWise"
        )
    swizzles = [s for s in (swizzle_a, swizzle_b) if s is not None]
    if any(_one(s, "swizzle") is not SwizzleType.NO_SWIZZLE for s in swizzles):
        raise NotImplementedError("scaled_mm: scales of tensors and rows are not swizzled")
    if tuple(contraction_dim) not in ((), (1, 0), (-1, -2)):
        raise NotImplementedError(
            f"scaled_mm: contraction_dim {tuple(contraction_dim)}; columns of mat_a meet rows of "
            "mat_b, which is (1, 0) or ()"
        )
    if recipe_a is ScalingType.TensorWise and (a.numel() != 1 or b.numel() != 1):
        raise ValueError(
            "scaled_mm: ScalingType.TensorWise wants scales of one number, got shapes "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    m, n = mat_a.shape[0], mat_b.shape[-1]
    if recipe_a is ScalingType.RowWise and (a.numel(), b.numel()) != (m, n):
        raise ValueError(
            f"scaled_mm: ScalingType.RowWise wants scales of shapes [{m}, 1] and [1, {n}], got "
            f"{list(a.shape)} and {list(b.shape)}"
        )
    return _C._ops._scaled_mm(
        mat_a, mat_b, a, b, bias=bias, out_dtype=output_dtype, use_fast_accum=use_fast_accum
    )


def _one(value: Any, name: str) -> Any:
    """A list of one member as that member."""
    if not isinstance(value, list | tuple):
        return value
    if len(value) != 1:
        raise NotImplementedError(f"scaled_mm: one {name} a matrix, got {len(value)}")
    return value[0]
