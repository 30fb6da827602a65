"""vibetensor: a deep-learning training runtime with torch's Python API.

`import vibetensor as vt` and `import vibetensor.torch as torch` are the same API.
"""

import sys

from vibetensor import torch as torch
from vibetensor.torch import *  # noqa: F403
from vibetensor.torch import __all__ as _names

__version__ = torch.__version__

# `import vibetensor.nn` and `from vibetensor.utils.data import DataLoader` work as with torch.
for _name in ("nn", "optim", "autograd", "amp", "utils", "cuda", "backends", "random", "library"):
    _module = getattr(torch, _name)
    globals()[_name] = _module
    sys.modules.setdefault(f"vibetensor.{_name}", _module)
for _full, _module in list(sys.modules.items()):
    if _full.startswith("vibetensor.torch.") and _module is not None:
        sys.modules.setdefault("vibetensor." + _full.removeprefix("vibetensor.torch."), _module)

__all__ = [*_names, "torch"]


def __getattr__(name: str) -> object:
    """Names that torch's namespace resolves lazily, and the runtime's own submodules."""
    if name in ("graphs", "io", "train", "viz", "examples", "cute_kernels", "float8"):
        import importlib

        return importlib.import_module(f"vibetensor.{name}")
    if name == "safetensors":
        from vibetensor.io import safetensors

        return safetensors
    return getattr(torch, name)
