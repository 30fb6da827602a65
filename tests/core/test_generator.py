"""The op table's generator: what it accepts, and that it refuses a bad row by name."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

GENERATOR = Path(__file__).parents[2] / "csrc" / "ops" / "gen"
pytest.importorskip("yaml")


@pytest.fixture(scope="module")
def gen():
    sys.path.insert(0, str(GENERATOR))
    import emit_front
    import schema
    import table

    yield type("Gen", (), {"schema": schema, "table": table, "front": emit_front})
    sys.path.remove(str(GENERATOR))


GOOD = {
    "op": "twice",
    "schema": "(Tensor self, *, Scalar by=2) -> Tensor",
    "kind": "pointwise",
    "backward": {"self": "ops::twice(grad, by)"},
    "doc": "By a factor.",
}


def test_schema_types_and_defaults(gen) -> None:
    parsed = gen.schema.parse(
        "op",
        "(Tensor self, int[2] size, *, float eps=1e-5, dtype? dtype=None) -> (Tensor a, Tensor b)",
    )
    assert [a.name for a in parsed.args] == ["self", "size", "eps", "dtype"]
    assert parsed.args[1].repeat == 2
    assert [a.kwonly for a in parsed.args] == [False, False, True, True]
    assert parsed.cpp_return == "std::tuple<Tensor, Tensor>"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "magic"}, "twice: kind must be one of"),
        ({"colour": "red"}, "twice: unknown fields"),
        ({"schema": "(Tenser self) -> Tensor"}, "twice: argument 'self' has unknown type 'Tenser'"),
        ({"schema": "Tensor self"}, "twice: schema must read"),
        (
            {"backward": {"other": "grad"}},
            "twice: backward names 'other', which is not an argument",
        ),
        ({"backward": {"by": "grad"}}, "twice: backward names 'by', which is not a tensor"),
        ({"backward": None}, "twice: needs 'backward'"),
        ({"promote": "up"}, "twice: promote must be one of"),
        ({"random": True}, "twice: a random op's schema ends with"),
        ({"schema": "(Tensor self, int for) -> Tensor"}, "is a C\\+\\+ keyword"),
    ],
)
def test_bad_rows_are_refused_by_name(gen, change, message) -> None:
    with pytest.raises(gen.schema.SchemaError, match=message):
        gen.table.make_op({**GOOD, **change}, "x.yaml")


def test_a_row_becomes_a_front_with_autograd_and_the_consumer_point(gen) -> None:
    op = gen.table.make_op({**GOOD, "variants": ["function", "inplace"]}, "x.yaml")
    code = gen.front.front_file([op])
    for piece in (
        "Tensor twice(const Tensor& self, const Scalar& by)",
        "Tensor twice_(",
        "make_node<autograd::TwiceBackward>",
        "thread_state.consumer",
        "check_inplace",
        "rebase_history",
    ):
        assert piece in code
    assert gen.front.ids([op]) == ["twice", "twice_"]


def test_the_same_name_twice_is_refused(gen, tmp_path) -> None:
    row = "- {op: one, schema: '(Tensor self) -> Tensor', kind: composite, doc: d}\n"
    (tmp_path / "a.yaml").write_text(row)
    (tmp_path / "b.yaml").write_text(row)
    with pytest.raises(gen.schema.SchemaError, match="one: defined twice, in a.yaml and b.yaml"):
        gen.table.load(tmp_path)
