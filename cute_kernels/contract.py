"""Memory contracts: what a kernel may be given, as data.

From them come the placeholders a kernel is compiled with, the C++ structure of its arguments, the
checks made before a launch, and the tables of the documentation. A contract is a promise to the
compiler: what breaks it is never launched, the caller takes its other path.
"""

from __future__ import annotations

from dataclasses import dataclass, field

#: Bytes of an element.
ITEM_SIZE = {
    "bfloat16": 2,
    "float16": 2,
    "float32": 4,
    "int32": 4,
    "int64": 8,
    "uint8": 1,
    "uint64": 8,
}
SCALARS = {"float32": "float", "int32": "int32_t", "int64": "int64_t", "uint64": "uint64_t"}
INT32_MAX = 2**31 - 1


@dataclass(frozen=True)
class Extent:
    """A number of elements known at the launch, or another number that no tensor has and that decides
    between variants. Zero elements are never launched."""

    name: str
    divisible_by: int = 1
    minimum: int = 1
    maximum: int = INT32_MAX


@dataclass(frozen=True)
class Tensor:
    """One tensor argument.

    `shape` names extents. The last dimension is dense; the others have strides of their own, in
    elements, multiples of `stride_divisible_by`. An optional tensor may be a null pointer; the
    kernel asks at run time. `may_alias` names the tensors whose memory it may be, element for
    element; any other overlap of something written is refused.
    """

    name: str
    dtype: str
    shape: tuple[str, ...]
    access: str = "read"  # read, write, update
    align: int = 16
    stride_divisible_by: int = 8
    optional: bool = False
    may_alias: tuple[str, ...] = ()


@dataclass(frozen=True)
class Scalar:
    """A number passed by value."""

    name: str
    type: str


@dataclass(frozen=True)
class Contract:
    """What one variant of a kernel takes, in the order of its arguments."""

    extents: tuple[Extent, ...]
    tensors: tuple[Tensor, ...]
    scalars: tuple[Scalar, ...] = field(default=())

    def __post_init__(self) -> None:
        names = [t.name for t in self.tensors] + [s.name for s in self.scalars]
        extents = {e.name for e in self.extents}
        if len(set(names)) != len(names):
            raise ValueError(f"argument names must differ, got {names}")
        for t in self.tensors:
            if t.dtype not in ITEM_SIZE:
                raise ValueError(f"tensor {t.name}: unknown dtype '{t.dtype}'")
            if t.access not in ("read", "write", "update"):
                raise ValueError(f"tensor {t.name}: unknown access '{t.access}'")
            if not 1 <= len(t.shape) <= 4:
                raise ValueError(f"tensor {t.name}: one to four dimensions, not {len(t.shape)}")
            if unknown := set(t.shape) - extents:
                raise ValueError(f"tensor {t.name}: no extent is called {sorted(unknown)}")
            if unknown := set(t.may_alias) - set(names):
                raise ValueError(f"tensor {t.name}: may alias unknown {sorted(unknown)}")
            if t.align < ITEM_SIZE[t.dtype] or t.align & (t.align - 1):
                raise ValueError(f"tensor {t.name}: alignment {t.align} is no power of two")
        for s in self.scalars:
            if s.type not in SCALARS:
                raise ValueError(f"scalar {s.name}: unknown type '{s.type}'")
        for name in names:
            # They become names in the exported C header.
            if not name.isidentifier() or name in ("do", "in", "out", "stream", "module", "ret"):
                raise ValueError(f"'{name}' cannot be an argument's name in C")

    def extent(self, name: str) -> Extent:
        return next(e for e in self.extents if e.name == name)

    def signature(self) -> tuple[object, ...]:
        """What all variants of a kernel share: the C++ structure of its arguments."""
        return (
            tuple(e.name for e in self.extents),
            tuple((t.name, t.shape, t.access) for t in self.tensors),
            tuple((s.name, s.type) for s in self.scalars),
        )
