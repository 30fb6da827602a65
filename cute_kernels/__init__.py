"""CuTe kernels for Hopper GPUs, compiled ahead of time and linked into the CUDA library, and ops made
of users' own (`register`).

`python -m vibetensor.cute_kernels build` compiles them where the CuTe DSL is installed; docs/cute-kernels.md
tells how they are written, chosen and measured. Importing this package imports neither the DSL nor CUDA.
"""

from .contract import Contract, Extent, Scalar, Tensor
from .user_ops import register, registered

__all__ = ["Contract", "Extent", "Scalar", "Tensor", "register", "registered"]
