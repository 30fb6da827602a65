"""Users' own kernels as ops: registration, shapes, gradients, capture, errors. Needs neither the DSL
nor a GPU: what stands for the compiled code gets addresses and computes on the host."""

from __future__ import annotations

import ctypes
import hashlib
import itertools
import json
import math
import sys
import threading
import types
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

import vibetensor
import vibetensor.torch as torch
from vibetensor.cute_kernels import Contract, Extent, Scalar, Tensor, objects, register, user_ops
from vibetensor.cute_kernels.shapes import Unfit, match
from vibetensor.graphs import capture

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
_numbers = itertools.count()


def fresh() -> str:
    return f"test_cute::op{next(_numbers)}"


@pytest.fixture(scope="module")
def example() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import scale_add_gelu
    finally:
        sys.path.remove(str(EXAMPLES))
    return scale_add_gelu


def test_the_guide_shows_the_example(example: Any) -> None:
    guide = (EXAMPLES.parent / "cute-kernels.md").read_text()
    text = Path(example.__file__).read_text()
    assert f"```python\n{text}```" in guide


def test_example_against_numpy(example: Any) -> None:
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(2, 5, 7))
    got = torch.ops.example.scale_add_gelu(
        torch.tensor(x, dtype=torch.float64, device="cpu"),
        torch.tensor(y, dtype=torch.float64, device="cpu"), 0.5
    )  # fmt: skip
    z = x * 0.5 + y
    want = 0.5 * z * (1 + np.vectorize(math.erf)(z * math.sqrt(0.5)))
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-14)


def test_example_gradients(example: Any) -> None:
    x, y = (torch.randn(3, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    op = torch.ops.example.scale_add_gelu
    assert torch.autograd.gradcheck(lambda x, y: op(x, y, 1.5), (x, y))
    assert torch.autograd.gradgradcheck(lambda x, y: op(x, y, scale=1.5), (x, y))


def train(op: Any, steps: int, captured: bool) -> np.ndarray:
    torch.manual_seed(3)
    w = torch.randn(4, 8).requires_grad_()
    optimizer = torch.optim.AdamW([w], lr=0.05)

    def step(x: Any) -> Any:
        optimizer.zero_grad()
        loss = op(w, x, 1.25).square().mean()
        loss.backward()
        optimizer.step()
        return loss

    run = capture(step) if captured else step
    return np.array([run(torch.randn(4, 8)).item() for _ in range(steps)])


def test_example_in_a_captured_step(example: Any) -> None:
    op = torch.ops.example.scale_add_gelu
    assert np.array_equal(train(op, 6, captured=True), train(op, 6, captured=False))


# --- with something in the place of the compiled code


class HostCode:
    """Does what the example's kernel does, at the addresses that it is given."""

    def __init__(self, refuse: str = "") -> None:
        self.refuse = refuse
        self.calls: list[Any] = []

    def launch(self, extents: Any, places: Any, scalars: Any, device: int) -> tuple[str, str]:
        self.calls.append((extents, places, scalars, device))
        if self.refuse:
            return "", self.refuse

        def array(place: Any) -> np.ndarray:
            count = math.prod(extents)
            data = (ctypes.c_float * count).from_address(place[0])
            return np.ctypeslib.as_array(data)

        x, y, z = map(array, places)
        total = x.astype(np.float64) * scalars[0] + y
        z[:] = 0.5 * total * (1 + np.vectorize(math.erf)(total * math.sqrt(0.5)))
        return "float32", ""


@pytest.fixture
def launched(example: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example as it is called on a GPU, here on the CPU too."""
    op = user_ops.registered()["example::scale_add_gelu"]
    code = HostCode()
    monkeypatch.setattr(op, "_native", code)
    monkeypatch.setitem(op.op._implementations, "cpu", op.run)
    return op.op, code


def test_launch_gets_the_contract(launched: Any) -> None:
    op, code = launched
    x, y = torch.randn(2, 3, 8), torch.randn(2, 3, 8)
    z = op(x, y, 0.5)
    ((extents, places, scalars, _),) = code.calls
    assert extents == [48] and scalars == [0.5]
    assert [p[1:] for p in places] == [("float32", [])] * 3
    assert places[0][0] == x.data_ptr() and places[2][0] == z.data_ptr()
    want = torch.nn.functional.gelu(x * 0.5 + y)
    np.testing.assert_allclose(z.cpu().numpy(), want.cpu().numpy(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_runs_the_reference(
    launched: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op, code = launched
    monkeypatch.setenv("VT_KERNEL_LOG", "1")
    user_ops._told.clear()
    base = torch.randn(8, 16)
    for x, y, why in (
        (torch.randn(9), torch.randn(9), "n = 9 is not a multiple of 8"),
        (torch.randn(4, 8), torch.randn(8), "it takes one"),
        (base[:, ::2], base[:, ::2], "its last dimension is not dense"),
        (torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64),
         "float32: x is float64, not float32"),
        (torch.randn(0), torch.randn(0), "x has no elements"),
    ):  # fmt: skip
        got = op(x, y, 2.0)
        want = torch.nn.functional.gelu(torch.add(y, x, alpha=2.0))
        assert torch.equal(got, want) and got.dtype == want.dtype
        assert why in capsys.readouterr().err
    assert not code.calls
    # What only the launch can see: the results that it was to write are there all the same.
    code.refuse = "x is not aligned to 16 bytes"
    x, y = torch.randn(8), torch.randn(8)
    assert torch.equal(op(x, y, 2.0), torch.nn.functional.gelu(torch.add(y, x, alpha=2.0)))
    assert len(code.calls) == 1 and "the reference, x is not aligned" in capsys.readouterr().err
    op(x, y, 2.0)
    assert not capsys.readouterr().err  # told once


def test_tensors_of_two_devices(example: Any) -> None:
    try:
        x = torch.ones(8, device="cuda")
    except RuntimeError:
        pytest.skip("needs a CUDA device; the simulated one will do")
    with pytest.raises(RuntimeError, match="on one device|on the same device"):
        torch.ops.example.scale_add_gelu(x, torch.ones(8, device="cpu"), 1.0)


def test_launch_in_a_captured_step(launched: Any) -> None:
    op, code = launched
    losses = train(op, 6, captured=True)
    before = len(code.calls)
    np.testing.assert_allclose(losses, train(op, 6, captured=False), rtol=1e-6)
    assert before >= 6 and len(code.calls) == before + 6


# --- the GPU, and what is on disk


class Machine:
    """GPUs of these compute capabilities, in the place of the CUDA library."""

    def __init__(self, *capabilities: tuple[int, int]) -> None:
        self.capabilities = capabilities
        self.added: list[str] = []

    def device_count(self) -> int:
        return len(self.capabilities)

    def properties(self, device: int) -> Any:
        major, minor = self.capabilities[device]
        return types.SimpleNamespace(major=major, minor=minor)

    def CuteKernel(self, *_: Any) -> Any:
        return types.SimpleNamespace(add=lambda name, *_: self.added.append(name))


class Device(NamedTuple):
    """A device that this machine need not have."""

    type: str
    index: int


def on_disk(op: Any, folder: Path, *variants: str) -> None:
    """A record with these variants, as another machine would have left it."""
    library = folder / f"{op.stem}-0.so"
    library.write_bytes(b"code")
    codes = [{"variant": v, "entry": "e", "init": "i", "load": "l", "registers": 1,
              "spilled_bytes": 0} for v in variants]  # fmt: skip
    record = {
        "hash": hashlib.sha256(b"code").hexdigest()[:24],
        "library": library.name,
        "dsl": "",
        "codes": codes,
    }
    (folder / f"{op.stem}-{op.key}.json").write_text(json.dumps(record))


def compiled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: Machine) -> Any:
    monkeypatch.setattr(vibetensor, "_cuda", machine, raising=False)
    monkeypatch.setattr(objects, "dsl_version", lambda: "")
    made = simple(objects_in=tmp_path)
    return user_ops.registered()[made._qualified]


def test_other_gpus_have_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = compiled(tmp_path, monkeypatch, other := Machine((8, 0), (10, 0)))
    on_disk(op, tmp_path, "only")
    assert op.native() is None and not other.added
    assert "compute capability 9.0 only" in op._problem
    assert not capsys.readouterr().err
    # A call on one of several is refused before anything is launched or put on a tape.
    mixed = compiled(tmp_path, monkeypatch, both := Machine((8, 0), (9, 0)))
    on_disk(mixed, tmp_path, "only")
    assert mixed.native() is not None and both.added == ["only"]
    place = types.SimpleNamespace(
        device=Device("cuda", 0), shape=(8,), stride=lambda: (1,), dtype=torch.float32
    )
    why = mixed.fit([place, place])
    assert isinstance(why, str) and "device 0 has 8.0" in why
    assert user_ops._unfit_device(1) == ""


def test_a_record_without_a_variant(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    op = compiled(tmp_path, monkeypatch, Machine((9, 0)))
    on_disk(op, tmp_path, "another")
    assert op.native() is None
    assert "has no code for only: remove it, and build it again" in capsys.readouterr().err


def test_a_record_without_a_hash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = compiled(tmp_path, monkeypatch, Machine((9, 0)))
    on_disk(op, tmp_path, "only")
    assert op.find() is not None
    (record,) = tmp_path.glob("*.json")
    for wrong in ("", "0", None, 3):
        record.write_text(json.dumps(json.loads(record.read_text()) | {"hash": wrong}))
        assert op.find() is None


def test_two_threads_compile_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    op = compiled(tmp_path, monkeypatch, Machine((9, 0)))
    made: list[str] = []
    find, both, looks = objects.find, threading.Barrier(2), itertools.count()

    def looked(*of: Any) -> Any:
        found = find(*of)
        if next(looks) < 2:
            both.wait(10)  # neither has found anything
        return found

    def compile_objects(stem: str, key: str, jobs: Any, folder: Path, *_: Any) -> Any:
        made.append(stem)
        on_disk(op, folder, "only")
        return find(stem, key, folder)

    monkeypatch.setattr(objects, "find", looked)
    monkeypatch.setattr(objects, "compile_objects", compile_objects)
    with ThreadPoolExecutor(2) as pool:
        got = list(pool.map(lambda _: op.build(tmp_path), range(2)))
    assert len(made) == 1 and sorted(compiled for _, compiled in got) == [False, True]
    assert got[0][0] == got[1][0]


# --- shapes


def contract_of(*shapes: tuple[str, ...]) -> Contract:
    names = dict.fromkeys(n for s in shapes for n in s)
    tensors = tuple(Tensor(n, "float32", s, stride_divisible_by=1) for n, s in zip("abc", shapes))
    return Contract(tuple(Extent(n) for n in names), tensors)


def test_leading_dimensions_are_put_together() -> None:
    rows = contract_of(("m", "n"), ("n",))
    x, w = torch.empty(3, 4, 5), torch.empty(5)
    assert match(rows, {"a": x, "b": w}) == ([12, 5], {"a": [5], "b": []})
    # A slice of columns has long steps; one of rows does not lie as one.
    assert match(rows, {"a": torch.empty(3, 4, 8)[..., :5], "b": w})[1]["a"] == [8]
    with pytest.raises(Unfit, match="do not lie as one"):
        match(rows, {"a": torch.empty(3, 6, 5)[:, :4], "b": w})
    with pytest.raises(Unfit, match="last dimension is not dense"):
        match(rows, {"a": torch.empty(5, 4).t(), "b": w})
    with pytest.raises(Unfit, match="1 dimensions, not 2 or more"):
        match(rows, {"a": w, "b": w})
    # Dimensions of one element have no steps of their own.
    assert match(rows, {"a": torch.empty(1, 5), "b": w}) == ([1, 5], {"a": [0], "b": []})
    batch = contract_of(("l", "m", "n"), ("l", "n", "k"))
    a, b = torch.empty(2, 3, 4, 5), torch.empty(2, 3, 5, 6)
    assert match(batch, {"a": a, "b": b})[0] == [6, 4, 5, 6]
    with pytest.raises(Unfit, match="b has l = "):  # as many, but others
        match(batch, {"a": a, "b": torch.empty(3, 2, 5, 6)})


def test_absent_tensors_leave_their_extents_at_the_least() -> None:
    assert match(contract_of(("n",), ("m",)), {"a": torch.empty(4), "b": None}) == (
        [4, 1], {"a": []}
    )  # fmt: skip


# --- registration


def simple(**changes: Any) -> Any:
    made = Contract(
        (Extent("n"),),
        (Tensor("x", "float32", ("n",)), Tensor("y", "float32", ("n",), "write")),
        (Scalar("scale", "float32"),),
    )
    given = {
        "name": fresh(),
        "schema": "(Tensor x, float scale) -> Tensor y",
        "kernel": lambda x, y, scale, stream: None,
        "contract": made,
        "reference": lambda x, scale: x * scale,
        "capture": "pointwise",
    } | changes
    return register(given.pop("name"), given.pop("schema"), **given)


def test_backward_is_a_function_or_an_op_by_names() -> None:
    x = torch.randn(4, dtype=torch.float64, requires_grad=True)
    by_function = simple(backward=lambda grad, scale: grad * scale)
    slope = fresh()
    simple(name=slope, schema="(Tensor x, float scale) -> Tensor y",
           backward=lambda grad, scale: grad * scale)  # fmt: skip
    by_op = simple(
        schema="(Tensor x, float scale) -> Tensor y",
        backward=torch.library.custom_op(
            fresh(), lambda grad, y, scale: grad * scale, mutates_args=(),
            schema="(Tensor grad, Tensor y, float scale) -> Tensor",
        ),
    )  # fmt: skip
    for op in (by_function, by_op):
        assert torch.autograd.gradcheck(lambda x, op=op: op(x, 3.0), (x,))
    no_gradient = simple()
    with pytest.raises(RuntimeError, match="no autograd formula was registered"):
        no_gradient(x, 2.0).sum().backward()


def test_results_are_like_a_keyword_tensor() -> None:
    op = simple(schema="(*, Tensor x, float scale) -> Tensor y")
    known = user_ops.registered()[op._qualified]
    x = torch.ones(3)
    made = known.fake(x=x, scale=2.0)
    assert made.shape == x.shape and made.dtype == x.dtype
    with pytest.raises(RuntimeError, match="like its first tensor, and none was given"):
        known.fake(scale=2.0)


def test_changed_arguments() -> None:
    made = Contract((Extent("n"),), (Tensor("x", "float32", ("n",), "update"),))
    op = simple(
        schema="(Tensor! x) -> ()", contract=made, kernel=lambda x, stream: None,
        reference=lambda x: [x.add_(1)][1:] or None, capture="opaque",
    )  # fmt: skip
    x = torch.zeros(3)
    op(x)
    assert x.sum().item() == 3
    with pytest.raises(ValueError, match="an op that changes its arguments has no backward"):
        simple(schema="(Tensor! x) -> ()", contract=made, kernel=lambda x, stream: None,
               capture="opaque", backward=lambda grad: grad)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"name": "plain"}, ValueError, "it is 'namespace::name'"),
        ({"capture": "fused"}, ValueError, "capture is one of pointwise, .*, not 'fused'"),
        ({"capture": "gemm"}, ValueError, "capture='gemm' needs a shape rule"),
        ({"kernel": 3}, TypeError, "the kernel must be a function"),
        ({"reference": None}, TypeError, "the reference must be a function"),
        ({"contract": lambda v: v}, TypeError, "must be or return a Contract"),
        ({"variants": ()}, ValueError, "no variants"),
        ({"variants": ("a", "a")}, ValueError, "variants named alike: a"),
        ({"variants": ("a-b",)}, ValueError, "'a-b' cannot be a variant's name"),
        ({"schema": "(Tensor x, float scale) -> Tensor"}, ValueError, "need names: 'Tensor y'"),
        ({"schema": "(Tensor z, float scale) -> Tensor y"}, ValueError, "by the contract"),
        ({"schema": "(Tensor! x, float scale) -> Tensor y"}, ValueError, "'x': 'update'"),
        ({"schema": "(Tensor? x, float scale) -> Tensor y"}, ValueError, "x may be None by"),
        ({"schema": "(Tensor x) -> Tensor y"}, ValueError, "its numbers are \\[\\]"),
        ({"schema": "(Tensor x, str scale) -> Tensor y"}, ValueError, "scale is str and float32"),
        ({"kernel": lambda y, x, scale, stream: 0}, ValueError, "the kernel takes \\(y, x"),
        ({"backward": lambda grad, w: grad}, ValueError, "its backward asks for 'w'"),
        ({"backward": "a::b"}, ValueError, "no custom op is called 'a::b'"),
        ({"backward": 3}, TypeError, "backward is a function or a custom op"),
        ({"setup_context": lambda ctx: 0}, ValueError, "setup_context without a backward"),
        ({"sources": ["no such file"]}, ValueError, "no such file"),
    ],
)
def test_bad_registrations(changes: dict[str, Any], error: type, message: str) -> None:
    before = set(user_ops.registered())
    with pytest.raises(error, match=message):
        simple(**changes)
    assert set(user_ops.registered()) == before


def test_contracts_that_cannot_be_called() -> None:
    with pytest.raises(ValueError, match="no tensor has the extent k"):
        simple(contract=Contract(
            (Extent("n"), Extent("k")),
            (Tensor("x", "float32", ("n",)), Tensor("y", "float32", ("n",), "write")),
            (Scalar("scale", "float32"),),
        ))  # fmt: skip
    with pytest.raises(ValueError, match="of a pointwise kernel have one shape"):
        simple(contract=Contract(
            (Extent("m"), Extent("n")),
            (Tensor("x", "float32", ("m", "n")), Tensor("y", "float32", ("n",), "write")),
            (Scalar("scale", "float32"),),
        ))  # fmt: skip


def test_a_name_is_taken_once() -> None:
    name = fresh()
    simple(name=name)
    with pytest.raises(ValueError, match="is registered already"):
        simple(name=name, reference=lambda x, scale: x)
