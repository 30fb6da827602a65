"""vibetensor: a deep-learning training runtime with torch's Python API.

`import vibetensor as vt` and `import vibetensor.torch as torch` are the same API.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

from vibetensor import torch as torch
from vibetensor.torch import *  # noqa: F403
from vibetensor.torch import __all__ as _names

__version__ = torch.__version__

for _name in ("nn", "optim", "autograd", "amp", "utils", "cuda", "backends", "random", "library"):
    globals()[_name] = getattr(torch, _name)


class _Twins:
    """Imports `vibetensor.X` as `vibetensor.torch.X`, so that both names mean one module."""

    @staticmethod
    def find_spec(name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, inner = name.partition(".")
        if package != "vibetensor" or inner.partition(".")[0] == "torch":
            return None
        twin = f"vibetensor.torch.{inner}"
        parent = sys.modules.get(twin.rpartition(".")[0])
        if (
            parent is None
            or "." in inner
            and parent is not sys.modules.get(name.rpartition(".")[0])
        ):
            return None  # not below a package of torch's names
        if twin not in sys.modules and not PathFinder.find_spec(twin, parent.__path__):
            return None
        return ModuleSpec(name, _Twins)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        return None

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        name = module.__name__
        sys.modules[name] = import_module(f"vibetensor.torch.{name.partition('.')[2]}")


sys.meta_path.insert(0, _Twins)  # type: ignore[arg-type]

__all__ = [*_names, "torch"]


def __getattr__(name: str) -> object:
    """Names that torch's namespace resolves lazily, and the runtime's own submodules."""
    if name in ("graphs", "io", "train", "viz", "examples", "cute_kernels", "float8"):
        return import_module(f"vibetensor.{name}")
    if name == "safetensors":
        from vibetensor.io import safetensors

        return safetensors
    return getattr(torch, name)
