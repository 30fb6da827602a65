"""The registry: every kernel with its variants, contract and reference.

A family is a folder of this package; its modules register kernels as they are imported.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contract import Contract

ROOT = Path(__file__).parent
FAMILIES = (
    "norms",
    "cross_entropy",
    "softmax",
    "dropout",
    "embedding",
    "adamw",
    "gemm",
    "attention",
)


@dataclass(frozen=True)
class Kernel:
    """One kernel.

    `variants` are frozen dataclasses, each with a `name` property that is unique in the kernel.
    `make(variant)` returns an object whose `@cute.jit __call__` takes the contract's tensors, its
    scalars and a stream. `reference` is the same function in NumPy, float64 inside, on the
    contract's arrays by name; it returns what the kernel writes, by name.
    """

    name: str
    variants: tuple[Any, ...]
    contract: Callable[[Any], Contract]
    make: Callable[[Any], Any]
    reference: Callable[..., dict[str, Any]]
    doc: str = ""
    #: Machine instructions that must be in the code of every variant.
    instructions: tuple[str, ...] = ()
    family: str = ""

    def prefix(self, variant: Any) -> str:
        """The name of a variant's object and symbols."""
        return f"{self.name}_{variant.name}"

    def options(self, variant: Any) -> dict[str, Any]:
        return {k: v for k, v in asdict(variant).items()}


_kernels: dict[str, Kernel] = {}


def register(kernel: Kernel) -> Kernel:
    """Adds a kernel. Names are unique, and all variants take the same arguments."""
    from dataclasses import replace

    if not re.fullmatch(r"[a-z][a-z0-9_]*", kernel.name):
        raise ValueError(f"'{kernel.name}' cannot be a kernel's name: lower case, digits and _")
    if kernel.name in _kernels:
        raise ValueError(f"kernel '{kernel.name}' is registered already")
    if not kernel.variants:
        raise ValueError(f"kernel '{kernel.name}' has no variants")
    names = [v.name for v in kernel.variants]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise ValueError(f"kernel '{kernel.name}': variants named alike: {', '.join(twice)}")
    signatures = {kernel.contract(v).signature() for v in kernel.variants}
    if len(signatures) != 1:
        raise ValueError(f"kernel '{kernel.name}': its variants differ in their arguments")
    contract = kernel.contract(kernel.variants[0])
    named = (*contract.extents, *contract.tensors, *contract.scalars)
    if "values" in [x.name for x in named]:
        raise ValueError(f"kernel '{kernel.name}': 'values' is taken in the C++ structure")
    module = kernel.make.__module__
    kernel = replace(kernel, family=kernel.family or module.rpartition(".")[0].rpartition(".")[2])
    _kernels[kernel.name] = kernel
    return kernel


def load(families: tuple[str, ...] = FAMILIES) -> dict[str, Kernel]:
    """The registered kernels of `families`, by name. Imports the DSL where it is installed."""
    package = __name__.rpartition(".")[0]
    for family in families:
        if family not in FAMILIES:
            raise ValueError(f"no family is called '{family}': {', '.join(FAMILIES)}")
        for module in pkgutil.iter_modules([str(ROOT / family)]):
            importlib.import_module(f"{package}.{family}.{module.name}")
    return {n: k for n, k in _kernels.items() if k.family in families}


def jobs(families: tuple[str, ...] = FAMILIES) -> Iterator[tuple[Kernel, Any]]:
    """Every (kernel, variant)."""
    for kernel in load(families).values():
        for variant in kernel.variants:
            yield kernel, variant
