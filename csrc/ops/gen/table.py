"""Loads and checks the op table. A bad row is refused with its name and what is wrong."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from schema import Arg, Schema, SchemaError, parse

KINDS = {"pointwise", "native", "view", "composite"}
PROMOTIONS = {"common": "Common", "float": "Float", "none": "None"}
CAPTURE = {
    "pointwise",
    "reduction",
    "norm",
    "gemm",
    "attention",
    "movement",
    "random",
    "optimizer",
    "view",
    "opaque",
    "creation",
    "composite",
}
FIELDS = {
    "op",
    "schema",
    "kind",
    "promote",
    "output",
    "dtypes",
    "capture",
    "variants",
    "random",
    "random_numel",
    "aliases",
    "python",
    "autocast",
    "differentiable",
    "backward",
    "via_composite",
    "node_name",
    "samples",
    "test_dtypes",
    "torch",
    "doc",
    "out",
    "method_aliases",
    "tolerance",
    "skip_grad",
    "device",
    "host_scalars",
    "fits",
    "same_dtype",
    "check",
    "float8",
}
VARIANTS = {"function", "method", "inplace"}
AUTOCAST = {"lower", "float32", "promote"}
FLOAT8 = {"kernel": "native", "widened": "pointwise"}
SAMPLE_SETS = {
    "unary",
    "unary_positive",
    "unary_unit",
    "binary",
    "binary_nonzero",
    "compare",
    "reduce",
}
DTYPES = {
    *("bool", "uint8", "int8", "int16", "int32", "int64"),
    *("float16", "bfloat16", "float32", "float64"),
}
DTYPE_CLASSES = {"all", "numeric", "float", "integral", "bits", "float_or_int"}


@dataclass
class Op:
    name: str
    schema: Schema
    kind: str
    row: dict
    file: str
    backward: list[tuple[tuple[str, ...], str]] = field(default_factory=list)

    @property
    def id(self) -> str:
        return self.name.replace(".", "_")

    @property
    def python_name(self) -> str | None:
        return self.row.get("python", self.name.split(".")[0])

    @property
    def variants(self) -> list[str]:
        return self.row.get("variants", ["function", "method"])

    @property
    def inplace(self) -> bool:
        return "inplace" in self.variants

    @property
    def mutated(self) -> list[Arg]:
        return [a for a in self.schema.args if a.mutated]

    @property
    def via_composite(self) -> str | None:
        return self.row.get("via_composite")

    @property
    def differentiable(self) -> bool:
        return bool(self.backward) or bool(self.via_composite)

    @property
    def tensor_args(self) -> list[Arg]:
        return [a for a in self.schema.args if a.is_tensor or a.is_list]

    @property
    def diff_inputs(self) -> list[Arg]:
        """Tensor arguments that have a gradient, in schema order."""
        if self.via_composite and not self.backward:
            return [a for a in self.tensor_args]
        named = {n for names, _ in self.backward for n in names}
        return [a for a in self.tensor_args if a.name in named]

    @property
    def output_names(self) -> list[str]:
        returns = self.schema.returns
        if len(returns) == 1:
            return ["result"]
        return [name or f"result{i}" for i, (_, name) in enumerate(returns)]

    @property
    def is_factory(self) -> bool:
        """Whether it makes a tensor from nothing: keyword-only dtype and device."""
        keywords = {a.name for a in self.schema.args if a.kwonly}
        returns_tensor = [kind for kind, _ in self.schema.returns] == ["Tensor"]
        return returns_tensor and {"dtype", "device"} <= keywords

    @property
    def random(self) -> bool:
        return bool(self.row.get("random"))


def _fail(name: str, what: str) -> None:
    raise SchemaError(f"{name}: {what}")


def make_op(row: dict, file: str) -> Op:
    if not isinstance(row, dict):
        raise SchemaError(f"{file}: a row must be a mapping, got {row!r}")
    name = row.get("op")
    if not isinstance(name, str) or not re.fullmatch(
        r"[A-Za-z_][A-Za-z0-9_]*(\.[A-Za-z_0-9]+)?", name
    ):
        raise SchemaError(f"{file}: row without a valid 'op' name: {row!r}")
    unknown = set(row) - FIELDS
    if unknown:
        _fail(name, f"unknown fields {sorted(unknown)}")
    for key in ("schema", "kind", "doc"):
        if key not in row:
            _fail(name, f"missing field '{key}'")
    if row["kind"] not in KINDS:
        _fail(name, f"kind must be one of {sorted(KINDS)}, got '{row['kind']}'")
    if row.get("capture", "opaque") not in CAPTURE:
        _fail(name, f"capture must be one of {sorted(CAPTURE)}, got '{row['capture']}'")
    if row.get("promote", "common") not in PROMOTIONS:
        _fail(name, f"promote must be one of {sorted(PROMOTIONS)}, got '{row['promote']}'")
    if row.get("dtypes", "all") not in DTYPE_CLASSES:
        _fail(name, f"dtypes must be one of {sorted(DTYPE_CLASSES)}, got '{row['dtypes']}'")
    if not isinstance(row["doc"], str) or not row["doc"].strip():
        _fail(name, "doc must say what the op does")
    if row.get("output", "bool") not in DTYPES:
        _fail(name, f"output must be one of {sorted(DTYPES)}, got '{row['output']}'")
    if row.get("autocast", "lower") not in AUTOCAST:
        _fail(name, f"autocast must be one of {sorted(AUTOCAST)}, got '{row['autocast']}'")
    for key, known in (("variants", VARIANTS), ("aliases", None), ("method_aliases", None)):
        items = row.get(key, [])
        if not isinstance(items, list) or not all(isinstance(i, str) for i in items):
            _fail(name, f"{key} must be a list of names, got {items!r}")
        if known and not set(items) <= known:
            _fail(name, f"{key} must be of {sorted(known)}, got {items}")
    if "float8" in row and row["kind"] != FLOAT8.get(row["float8"]):
        _fail(name, "float8 is 'kernel' on a native op or 'widened' on a pointwise one")
    samples = row.get("samples", [])
    if not isinstance(samples, list) and samples not in SAMPLE_SETS:
        _fail(name, f"samples must be a list or one of {sorted(SAMPLE_SETS)}, got {samples!r}")
    schema = parse(name, str(row["schema"]))
    op = Op(name, schema, row["kind"], row, file)
    if op.kind == "pointwise":
        bad = [a.name for a in schema.args if a.is_list or a.mutated]
        if bad or len(schema.returns) != 1 or schema.returns[0][0] != "Tensor":
            _fail(name, "a pointwise op takes tensors and attributes and returns one Tensor")
    elif op.inplace:
        _fail(
            name,
            "the inplace variant is generated for pointwise ops only; write a row with 'Tensor! self'",
        )
    names = {a.name for a in schema.args}
    for key in ("fits", "same_dtype"):
        unknown = [n for n in row.get(key, []) if n not in names]
        if unknown:
            _fail(name, f"{key} names {unknown}, which are no arguments")
    if "check" in row and op.kind != "pointwise":
        _fail(name, "check is a rule of pointwise ops; others check in their own code")
    if "same_dtype" in row and op.kind != "pointwise":
        _fail(name, "same_dtype is a rule of pointwise ops")
    if "fits" in row and op.kind != "pointwise" and not op.mutated:
        _fail(name, "fits is a rule of pointwise ops and of those that write in place")
    tensor_names = {a.name for a in op.tensor_args}
    backward = row.get("backward") or {}
    if not isinstance(backward, dict):
        _fail(name, "backward must map input names to expressions")
    for key, formula in backward.items():
        inputs = tuple(part.strip() for part in str(key).split(","))
        for item in inputs:
            if item not in names:
                _fail(name, f"backward names '{item}', which is not an argument")
            if item not in tensor_names:
                _fail(name, f"backward names '{item}', which is not a tensor")
        op.backward.append((inputs, str(formula)))
    if op.kind in ("pointwise", "native", "view"):
        floats_out = row.get("output") in (None, "float32", "float64")
        has_tensor = bool(op.tensor_args)
        decided = op.differentiable or row.get("differentiable") is False
        if has_tensor and floats_out and not decided:
            _fail(name, "needs 'backward', 'via_composite' or 'differentiable: false'")
    elif backward:
        _fail(name, "a composite op is differentiated through its parts; drop 'backward'")
    if op.random and (not schema.args or schema.args[-1].type != "Generator?"):
        _fail(name, "a random op's schema ends with 'Generator? generator=None'")
    return op


def load(folder: Path) -> list[Op]:
    """Every row of every file, in file then row order. Raises SchemaError."""
    ops: list[Op] = []
    seen: dict[str, str] = {}
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    for path in sorted(folder.glob("*.yaml")):
        try:
            rows = yaml.load(path.read_text(), Loader=loader) or []
        except yaml.YAMLError as error:
            raise SchemaError(f"{path.name}: {error}") from error
        if not isinstance(rows, list):
            raise SchemaError(f"{path.name}: expected a list of rows")
        for row in rows:
            op = make_op(row, path.name)
            if op.id in seen:
                raise SchemaError(f"{op.name}: defined twice, in {seen[op.id]} and {path.name}")
            seen[op.id] = path.name
            ops.append(op)
    return ops
