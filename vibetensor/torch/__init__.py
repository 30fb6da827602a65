"""torch's names over vibetensor's core. Ops come from the op table; what is written in Python here
has no arithmetic of its own."""

import math as _math
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from vibetensor import _C
from vibetensor._C import (
    Generator,
    OutOfMemoryError,
    Size,
    Tensor,
    device,
    dtype,
    get_default_device,
    get_default_dtype,
    get_num_threads,
    is_grad_enabled,
    is_inference_mode_enabled,
    layout,
    memory_format,
    set_num_threads,
    as_tensor,
    from_dlpack,
    from_numpy,
    tensor,
)

__version__ = "0.1.0"

inf, nan, pi, e = _math.inf, _math.nan, _math.pi, _math.e
newaxis = None

_OPS = {name: getattr(_C._ops, name) for name in dir(_C._ops) if not name.startswith("__")}
globals().update(_OPS)
if _TYPE_CHECKING:  # generated, in the wheel only
    from vibetensor._ops import *  # noqa: F403

_CONSTANTS = (
    "bool",
    "uint8",
    "int8",
    "int16",
    "int32",
    "int64",
    "float16",
    "bfloat16",
    "float32",
    "float64",
    "float8_e4m3fn",
    "float8_e5m2",
    "half",
    "float",
    "double",
    "short",
    "int",
    "long",
    "contiguous_format",
    "channels_last",
    "preserve_format",
    "strided",
)
globals().update({name: getattr(_C, name) for name in _CONSTANTS})

from vibetensor.torch import _tensor as _tensor  # noqa: E402  (adds methods to Tensor)
from vibetensor.torch import autograd as autograd  # noqa: E402
from vibetensor.torch._tensor import (  # noqa: E402
    is_complex,
    is_floating_point,
    is_nonzero,
    is_tensor,
    numel,
)
from vibetensor.torch._tensor_str import set_printoptions  # noqa: E402
from vibetensor.torch._compositions import (  # noqa: E402
    cross,
    diag,
    diag_embed,
    kron,
    nanquantile,
    quantile,
)
from vibetensor.torch._variadic import (  # noqa: E402
    atleast_1d,
    atleast_2d,
    atleast_3d,
    block_diag,
    broadcast_shapes,
    broadcast_tensors,
    cartesian_prod,
    chain_matmul,
    einsum,
    meshgrid,
    nonzero,
    repeat_interleave,
    tensordot,
    unique,
    unique_consecutive,
    where,
)
from vibetensor.torch.autograd.grad_mode import (  # noqa: E402
    enable_grad,
    inference_mode,
    no_grad,
    set_grad_enabled,
)
from vibetensor.torch.functional import (  # noqa: E402
    can_cast,
    finfo,
    iinfo,
    promote_types,
    result_type,
)
from vibetensor.torch import random as random  # noqa: E402
from vibetensor.torch.random import (  # noqa: E402
    default_generator,
    get_rng_state,
    initial_seed,
    manual_seed,
    seed,
    set_rng_state,
)
from vibetensor.torch import amp as amp  # noqa: E402
from vibetensor.torch import backends as backends  # noqa: E402
from vibetensor.torch import cuda as cuda  # noqa: E402
from vibetensor.torch import library as library  # noqa: E402
from vibetensor.torch import nn as nn  # noqa: E402
from vibetensor.torch import optim as optim  # noqa: E402
from vibetensor.torch import utils as utils  # noqa: E402
from vibetensor.torch._custom_op import ops as ops  # noqa: E402
from vibetensor.torch.amp import autocast  # noqa: E402
from vibetensor.torch.amp.autocast_mode import (  # noqa: E402
    clear_autocast_cache,
    get_autocast_cpu_dtype,
    get_autocast_dtype,
    get_autocast_gpu_dtype,
    is_autocast_cache_enabled,
    is_autocast_cpu_enabled,
    is_autocast_enabled,
    set_autocast_cache_enabled,
    set_autocast_dtype,
    set_autocast_enabled,
)
from vibetensor.torch.session import (  # noqa: E402
    compile,
    get_float32_matmul_precision,
    set_default_device,
    set_default_dtype,
    set_float32_matmul_precision,
    are_deterministic_algorithms_enabled,
    is_deterministic_algorithms_warn_only_enabled,
    use_deterministic_algorithms,
)

_HAND_WRITTEN = [
    "Generator",
    "OutOfMemoryError",
    "Size",
    "Tensor",
    "device",
    "dtype",
    "layout",
    "memory_format",
    "get_default_device",
    "get_default_dtype",
    "get_num_threads",
    "set_num_threads",
    "is_grad_enabled",
    "is_inference_mode_enabled",
    "as_tensor",
    "from_dlpack",
    "from_numpy",
    "tensor",
    "inf",
    "nan",
    "pi",
    "e",
    "newaxis",
    "is_complex",
    "is_floating_point",
    "is_nonzero",
    "is_tensor",
    "numel",
    "set_printoptions",
    "atleast_1d",
    "atleast_2d",
    "atleast_3d",
    "block_diag",
    "broadcast_shapes",
    "broadcast_tensors",
    "cartesian_prod",
    "cross",
    "diag",
    "diag_embed",
    "einsum",
    "kron",
    "nanquantile",
    "quantile",
    "tensordot",
    "meshgrid",
    "nonzero",
    "unique",
    "unique_consecutive",
    "where",
    "enable_grad",
    "inference_mode",
    "no_grad",
    "set_grad_enabled",
    "can_cast",
    "finfo",
    "iinfo",
    "promote_types",
    "result_type",
    "default_generator",
    "get_rng_state",
    "initial_seed",
    "manual_seed",
    "seed",
    "set_rng_state",
    "autocast",
    "clear_autocast_cache",
    "get_autocast_cpu_dtype",
    "get_autocast_dtype",
    "get_autocast_gpu_dtype",
    "is_autocast_cache_enabled",
    "is_autocast_cpu_enabled",
    "is_autocast_enabled",
    "set_autocast_cache_enabled",
    "set_autocast_dtype",
    "set_autocast_enabled",
    "compile",
    "get_float32_matmul_precision",
    "set_default_device",
    "set_default_dtype",
    "set_float32_matmul_precision",
    "are_deterministic_algorithms_enabled",
    "is_deterministic_algorithms_warn_only_enabled",
    "use_deterministic_algorithms",
    "save",
    "load",
    "autograd",
    "amp",
    "backends",
    "cuda",
    "library",
    "nn",
    "ops",
    "optim",
    "utils",
    "random",
]
__all__ = [
    *_CONSTANTS,
    *_HAND_WRITTEN,
    *(name for name in _OPS if not name.startswith("_")),
]


def save(obj: _Any, f: _Any, **options: _Any) -> None:
    """Saves tensors and plain containers; see vibetensor.torch.serialization.save."""
    from vibetensor.torch.serialization import save as save_object

    save_object(obj, f, **options)


def load(f: _Any, map_location: _Any = None, **options: _Any) -> _Any:
    """Loads what save() wrote; see vibetensor.torch.serialization.load."""
    from vibetensor.torch.serialization import load as load_object

    return load_object(f, map_location=map_location, **options)


if _TYPE_CHECKING:
    from vibetensor.graphs import Graph as Graph
    from vibetensor.graphs import graph as graph


def __getattr__(name: str) -> _Any:
    """What is built on this module and comes when it is asked for."""
    if name == "serialization":
        from importlib import import_module

        return import_module("vibetensor.torch.serialization")
    if name in ("Graph", "graph", "graphs"):
        from vibetensor import graphs

        return graphs if name == "graphs" else getattr(graphs, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
