"""The op table's generator: it refuses a bad row by name, and what is checked in is current."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
GENERATOR = REPO / "csrc" / "ops" / "gen"

GOOD = {
    "op": "thing",
    "schema": "(Tensor self, Tensor other) -> Tensor",
    "kind": "pointwise",
    "backward": {"self": "grad"},
    "doc": "Does a thing.",
}


@pytest.fixture
def generator(monkeypatch):
    """The generator's modules by name."""
    monkeypatch.syspath_prepend(str(GENERATOR))

    def module(name):
        return __import__(name)

    return module


BAD_ROWS = [
    ({"op": None}, "row without a valid 'op' name"),
    ({"op": "two words"}, "row without a valid 'op' name: .*two words"),
    ({"unknown_field": 1}, r"thing: unknown fields \['unknown_field'\]"),
    ({"schema": None}, "thing: missing field 'schema'"),
    ({"kind": None}, "thing: missing field 'kind'"),
    ({"doc": None}, "thing: missing field 'doc'"),
    ({"doc": " "}, "thing: doc must say"),
    ({"kind": "wise"}, "thing: kind must be one of .*, got 'wise'"),
    ({"capture": "net"}, "thing: capture must be one of .*, got 'net'"),
    ({"promote": "down"}, "thing: promote must be one of .*, got 'down'"),
    ({"dtypes": "some"}, "thing: dtypes must be one of .*, got 'some'"),
    ({"output": "float8"}, "thing: output must be one of .*, got 'float8'"),
    ({"autocast": "higher"}, "thing: autocast must be one of .*, got 'higher'"),
    ({"variants": "function"}, "thing: variants must be a list of names, got 'function'"),
    ({"variants": ["faster"]}, "thing: variants must be of .*faster"),
    ({"aliases": "other"}, "thing: aliases must be a list of names"),
    ({"samples": "unarry"}, "thing: samples must be a list or one of .*'unarry'"),
    ({"schema": "Tensor self -> Tensor"}, r"thing: schema must read '\(args\) -> returns'"),
    ({"schema": "(Tensor) -> Tensor"}, "thing: cannot read argument 'Tensor'"),
    ({"schema": "(Tensr self) -> Tensor"}, "thing: argument 'self' has unknown type 'Tensr'"),
    ({"schema": "(Tensor new) -> Tensor"}, "thing: argument name 'new' is a C\\+\\+ keyword"),
    ({"schema": "(Tensor a, Tensor a) -> Tensor"}, "thing: duplicate argument names"),
    ({"schema": "(Tensor self, int n=x) -> Tensor"}, "thing: .*'n' .* not a literal: 'x'"),
    ({"schema": "(Tensor self, int n=None) -> Tensor"}, "thing: .*'n' .*cannot default to None"),
    ({"schema": "(Tensor self) -> Matrix"}, "thing: unknown return type 'Matrix'"),
    ({"schema": "(Tensor[] self) -> Tensor"}, "thing: a pointwise op takes tensors"),
    ({"schema": "(Tensor self) -> (Tensor a, Tensor b)"}, "thing: a pointwise op .* one Tensor"),
    ({"kind": "native", "variants": ["inplace"]}, "thing: the inplace variant .* pointwise"),
    ({"backward": ["grad"]}, "thing: backward must map input names"),
    ({"backward": {"third": "grad"}}, "thing: backward names 'third', which is not an argument"),
    (
        {"schema": "(Tensor self, int n) -> Tensor", "backward": {"n": "grad"}},
        "thing: backward names 'n', which is not a tensor",
    ),
    ({"backward": None}, "thing: needs 'backward', 'via_composite' or 'differentiable: false'"),
    ({"kind": "composite"}, "thing: a composite op is differentiated through its parts"),
    ({"random": True}, "thing: a random op's schema ends with 'Generator"),
]


@pytest.mark.parametrize(("change", "says"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_bad_row_is_refused_by_name(generator, change, says) -> None:
    table, schema = generator("table"), generator("schema")
    assert table.make_op(dict(GOOD), "file.yaml").name == "thing"
    row = {k: v for k, v in {**GOOD, **change}.items() if v is not None}
    with pytest.raises(schema.SchemaError, match=says):
        table.make_op(row, "file.yaml")


def test_schema_types_and_defaults(generator) -> None:
    parsed = generator("schema").parse(
        "op",
        "(Tensor self, int[2] size, *, float eps=1e-5, dtype? dtype=None) -> (Tensor a, Tensor b)",
    )
    assert [a.name for a in parsed.args] == ["self", "size", "eps", "dtype"]
    assert parsed.args[1].repeat == 2
    assert [a.kwonly for a in parsed.args] == [False, False, True, True]
    assert parsed.cpp_return == "std::tuple<Tensor, Tensor>"


def test_a_row_becomes_a_front_with_autograd_and_the_consumer_point(generator) -> None:
    row = {**GOOD, "schema": "(Tensor self, *, Scalar by=2) -> Tensor", "op": "twice"}
    op = generator("table").make_op({**row, "variants": ["function", "inplace"]}, "x.yaml")
    code = generator("emit_front").front_file([op])
    for piece in (
        "Tensor twice(const Tensor& self, const Scalar& by)",
        "Tensor twice_(",
        "make_node<autograd::TwiceBackward>",
        "thread_state.consumer",
        "check_inplace",
        "rebase_history",
    ):
        assert piece in code
    assert generator("emit_front").ids([op]) == ["twice", "twice_"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- just text", "bad.yaml: a row must be a mapping"),
        ("op: thing", "bad.yaml: expected a list of rows"),
        ("- {op: thing", "bad.yaml: "),
        (
            "- {op: thing, schema: () -> Tensor, kind: native, doc: A.}\n" * 2,
            "thing: defined twice, in bad.yaml and bad.yaml",
        ),
        (
            "- {op: a.b, schema: () -> Tensor, kind: native, doc: A.}\n"
            "- {op: a_b, schema: () -> Tensor, kind: native, doc: A.}\n",
            "a_b: defined twice",
        ),
    ],
)
def test_bad_file_stops_the_generator_and_writes_nothing(tmp_path, text, says) -> None:
    folder = tmp_path / "table"
    folder.mkdir()
    (folder / "bad.yaml").write_text(text)
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, GENERATOR / "generate.py", "--table", folder, "--out", out],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.startswith("op table: ") and says in done.stderr
    assert "Traceback" not in done.stderr and not out.exists()


def test_unchanged_files_are_left_alone(tmp_path) -> None:
    table = REPO / "csrc" / "ops" / "table"
    command = [sys.executable, GENERATOR / "generate.py", "--table", table, "--out", tmp_path]
    subprocess.run(command, check=True, timeout=60)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 20
    changed = next(path for path in files if path.name == "ops.md")
    changed.write_text("stale")
    subprocess.run(command, check=True, timeout=60)
    assert changed.read_text().startswith("# Ops")
    assert [p for p, t in files.items() if p.stat().st_mtime_ns != t] == [changed]


def test_checked_in_files_are_current(generator) -> None:
    """docs/ops.md and the golden stub. After a change of the table: python csrc/ops/gen/refresh.py"""
    for path, text in generator("refresh").checked_in().items():
        assert path.read_text() == text, f"{path} is stale; run csrc/ops/gen/refresh.py"


def test_docs_list_every_op(generator) -> None:
    page = (REPO / "docs" / "ops.md").read_text()
    for op in generator("table").load(REPO / "csrc" / "ops" / "table"):
        assert f"| `{op.name}` |" in page
    ops, functions = page.split("## From other data")
    for part, columns in ((ops, 5), (functions, 2)):
        rows = [line for line in part.splitlines() if line.startswith("| `")]
        assert rows
        for line in rows:
            assert line.replace("\\|", "").count("|") == columns + 1, line
    # Written in Python, so not in the table.
    for name in ("tensor", "from_numpy", "unique", "unique_consecutive", "block_diag",
                 "cartesian_prod", "atleast_1d", "atleast_2d", "atleast_3d"):  # fmt: skip
        assert f"| `{name}(" in functions


def test_stub_names_every_public_op(generator) -> None:
    """And nothing that the runtime does not have."""
    import ast

    import vibetensor.torch as vt

    tree = ast.parse((REPO / "tests" / "ops" / "golden" / "_ops.pyi").read_text())
    functions = {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}
    runtime = {name for name in dir(vt._C._ops) if not name.startswith("_")}
    assert functions == runtime
    (tensor,) = (n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Tensor")
    methods = {node.name for node in tensor.body if isinstance(node, ast.FunctionDef)}
    assert {name for name in methods if not hasattr(vt.Tensor, name)} == {"__getattr__"}


def test_stub_types(generator) -> None:
    """The shapes a signature can take, on a row made for it."""
    table, stub = generator("table"), generator("emit_stub")
    rows = [
        {**GOOD, "op": "plus", "schema": "(Tensor self, Tensor|Scalar other=1) -> Tensor"},
        {
            "op": "best",
            "schema": "(Tensor self, int? dim=None) -> (Tensor values, Tensor indices)",
            "kind": "native",
            "differentiable": False,
            "doc": "D.",
        },
        {
            "op": "fresh",
            "schema": "(int[] size, *, dtype? dtype=None, device? device=None) -> Tensor",
            "kind": "composite",
            "variants": ["function"],
            "doc": "D.",
        },
    ]
    text = stub.stub([table.make_op(row, "f.yaml") for row in rows])
    expected = """
        class _best_result(NamedTuple):
            values: Tensor
            indices: Tensor
        def best(self, dim: builtins.int | None = None) -> _best_result: ...
        def plus(self, other: Tensor | Number = 1) -> Tensor: ...
        def plus(input: Tensor, other: Tensor | Number = 1, *, out: Any = None) -> Tensor: ...
        def fresh(size: Sequence[builtins.int] | builtins.int, *, dtype: _dtype | None = None,
        def fresh(*size: builtins.int, dtype: _dtype | None = None, device: _device | None = None,
    """
    for line in textwrap.dedent(expected).strip().splitlines():
        assert line.strip() in text
