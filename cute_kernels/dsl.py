"""The CuTe DSL where it is installed, and stand-ins for its names where it is not.

Kernel files import from here, so that their variants, contracts and references can be read on any
machine; only compiling needs the DSL. Importing this module imports the DSL.
"""

from __future__ import annotations

import os
from typing import Any

# Read by the DSL as it is imported: registers and spills of every kernel are wanted.
os.environ.setdefault("CUTE_DSL_COMPILER_OPT", "remarks{ptx}")

try:
    import cutlass as cutlass
    import cutlass.cute as cute
    import cutlass.pipeline as pipeline
    import cutlass.utils.hopper_helpers as hopper
    from cuda.bindings.driver import CUstream as CUstream
    from cutlass import BFloat16, Float16, Float32, Int32, Int64, Uint8, Uint32, Uint64, const_expr
    from cutlass.cute.nvgpu import OperandMajorMode as OperandMajorMode
    from cutlass.cute.nvgpu import cpasync as cpasync
    from cutlass.cute.nvgpu import warp as warp_copies
    from cutlass.cute.nvgpu import warpgroup as warpgroup
    from cutlass.memory import SmemAllocator as SmemAllocator
    from cutlass.tensor_utils import LayoutEnum as LayoutEnum

    PROBLEM = None
except ImportError as error:
    PROBLEM = f"the CuTe DSL is not installed ({error})"

    class _Absent:
        """Any name of the DSL: an annotation, or a decorator that leaves its function alone."""

        __module__ = "cutlass"

        def __init__(self, name: str) -> None:
            self.__name__ = name

        def __getattr__(self, name: str) -> _Absent:
            if name.startswith("__"):
                raise AttributeError(name)
            return _Absent(name)

        def __call__(self, function: Any = None, *_: Any, **__: Any) -> Any:
            return function

    cutlass, cute, CUstream, pipeline, hopper = map(  # type: ignore[assignment]
        _Absent, ("cutlass", "cute", "CUstream", "pipeline", "hopper")
    )
    cpasync, warpgroup, warp_copies, OperandMajorMode = map(  # type: ignore[assignment,misc]
        _Absent, ("cpasync", "warpgroup", "warp_copies", "OperandMajorMode")
    )
    SmemAllocator, LayoutEnum, const_expr = map(  # type: ignore[assignment,misc]
        _Absent, ("SmemAllocator", "LayoutEnum", "const_expr")
    )
    BFloat16, Float16, Float32 = map(  # type: ignore[assignment,misc]
        _Absent, ("BFloat16", "Float16", "Float32")
    )
    Int32, Int64, Uint8, Uint32, Uint64 = map(  # type: ignore[assignment,misc]
        _Absent, ("Int32", "Int64", "Uint8", "Uint32", "Uint64")
    )

#: The element types of contracts by their name there.
DTYPES = {
    "bfloat16": BFloat16,
    "float16": Float16,
    "float32": Float32,
    "int32": Int32,
    "int64": Int64,
    "uint8": Uint8,
    "uint64": Uint64,
}
