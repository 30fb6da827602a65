"""Rows that name an algorithm of cuBLASLt: the format, files that are wrong, merging, what the C++ table
says of them, what is chosen, and when measurements make a row. Needs no GPU."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from vibetensor.cute_kernels import launch_table, product_table, registry, tuning_table
from vibetensor.cute_kernels.product_table import Configuration, Product, ProductRow
from vibetensor.torch.cuda import tunable

KERNELS = registry.load()
GPU = "A GPU"
SPLIT = Configuration(66, tile=20, stages=36, split_k=4, reduction=2, cluster=2)
PLAIN = Configuration(66, tile=24, stages=36, custom=3, swizzle=1, inner=5)


def product(m: int = 384, **changed: Any) -> Product:
    given = {"dtype": "bf16", "layout": "nt", "batch": 1, "m": m, "n": 1152, "k": 16384}
    return Product(**{**given, **changed})


def row(m: int = 384, algorithm: Configuration = SPLIT, **changed: Any) -> ProductRow:
    return ProductRow(product(m, **changed), algorithm, 20.5, 25.25, 130101)


def as_json(**changed: Any) -> dict[str, Any]:
    given = row().to_json() | changed
    return {k: v for k, v in given.items() if v is not ...}


ROWS = [
    row(),
    row(1152, PLAIN, accumulate=True),
    row(64, PLAIN, dtype="f16", layout="tn", bias=True, epilogue="gelu_tanh", batch=7),
    row(64, dtype="tf32", layout="tt", epilogue="relu"),
    row(64, Configuration(1), dtype="f64", layout="nn", epilogue="gelu_tanh_backward"),
]


def test_rows_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "products.json"
    product_table.update(path, GPU, ROWS, [r.product for r in ROWS])
    back = product_table.read_rows(path, GPU)
    assert set(back) == set(ROWS) and len(back) == len(ROWS)
    assert {(r.us, r.first_us, r.version) for r in back} == {(20.5, 25.25, 130101)}
    text = path.read_text()
    assert json.loads(text)["gpus"] == [GPU]
    assert sum('"algorithm"' in line for line in text.splitlines()) == len(ROWS)  # a line each
    product_table.update(path, GPU, [], [])
    assert path.read_text() == text
    with pytest.raises(ValueError, match="its rows are of A GPU, this is Another"):
        product_table.read_rows(path, "Another")
    with pytest.raises(ValueError, match="its rows are of A GPU, not of Another"):
        product_table.update(path, "Another", ROWS, [])
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


def test_checked_in_tables_keep_their_text() -> None:
    tables = sorted((registry.ROOT / "tuning").glob("*.json"))
    assert tables
    for path in tables:
        assert product_table.text_of(product_table.read_record(path)) == path.read_text()


def test_merging_keeps_what_was_not_measured(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    kernels = [{"kernel": "softmax_forward", "variant": KERNELS["softmax_forward"].variants[0].name,
                "extents": {"n": [64, 256]}}]  # fmt: skip
    record = {"gpus": [GPU, "Its like"], "multiprocessors": 7, "rows": kernels,
              "library": {"gemm_tn": [[1, 2, 3, 4]]}}  # fmt: skip
    product_table.write(path, record)
    product_table.update(path, GPU, ROWS, [])
    now = json.loads(path.read_text())
    assert {k: now[k] for k in record} == record
    # Measured again: one with another algorithm, one without a row, a new one.
    again = [row(algorithm=PLAIN), row(9)]
    measured = [again[0].product, again[1].product, ROWS[1].product]
    got = product_table.update(path, "Its like", again, measured)
    want = {r.product: r.algorithm for r in [*ROWS, *again] if r.product != ROWS[1].product}
    assert {r.product: r.algorithm for r in got} == want
    assert [r.product for r in got] == sorted(want)
    assert {k: v for k, v in json.loads(path.read_text()).items() if k != "cublaslt"} == record


def test_a_write_that_fails_leaves_the_file(tmp_path: Path) -> None:
    path = tmp_path / "gpu.json"
    product_table.update(path, GPU, ROWS, [])
    text = path.read_text()
    with pytest.raises(TypeError):
        product_table.write(path, {"gpus": [GPU], "cublaslt": [{"at": object()}]})
    assert path.read_text() == text and list(tmp_path.iterdir()) == [path]


WRONG: list[tuple[Any, str]] = [
    (as_json(dtype="int8"), "dtype is one of bf16, f16, f32, tf32, f64, not 'int8'"),
    (as_json(dtype=["bf16"]), "dtype is one of"),
    (as_json(dtype=...), "lacks dtype"),
    (as_json(layout="t"), "layout is one of"),
    (as_json(epilogue="gelu"), "epilogue is one of"),
    (as_json(epilogue=None), "epilogue is one of"),
    (as_json(bias=1), "bias is true or false"),
    (as_json(at=[1, 2, 3]), "'at' is batch, m, n, k"),
    (as_json(at={"m": 1}), "'at' is batch, m, n, k"),
    (as_json(at=[1, 0, 3, 4]), "an extent is an integer from 1"),
    (as_json(at=[1, 2, 3, 4.0]), "an extent is an integer"),
    (as_json(at=[True, 2, 3, 4]), "an extent is an integer"),
    (as_json(at=[1, 2, 3, 2**63]), "an extent is an integer"),
    (as_json(algorithm={}), "algorithm: lacks id"),
    (as_json(algorithm=[66]), "algorithm: is no object"),
    (as_json(algorithm={"id": 66, "stage": 1}), "'stage' is not known"),
    (as_json(algorithm={"id": -1}), "id is an integer from 0"),
    (as_json(algorithm={"id": 66, "cluster": 2**16}), "cluster is an integer from 0 to 65535"),
    (as_json(algorithm={"id": 66, "tile": 2**32}), "tile is an integer"),
    (as_json(algorithm={"id": 66, "reduction": 1}), "reduction 1 rounds the parts of sums"),
    (as_json(us=-1), "us is a number of microseconds"),
    (as_json(us=float("nan")), "us is a number of microseconds"),
    (as_json(first_us="1"), "first_us is a number of microseconds"),
    (as_json(version="13"), "version is an integer"),
    (as_json(tile=1), "'tile' is not known"),
    ([1], "is no object"),
    (None, "is no object"),
]


@pytest.mark.parametrize("wrong, message", WRONG, ids=[m for _, m in WRONG])
def test_wrong_rows_are_told_by_number(tmp_path: Path, wrong: Any, message: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"gpus": [GPU], "cublaslt": [row(1).to_json(), wrong]}))
    with pytest.raises(ValueError) as error:
        product_table.read_rows(path, GPU)
    assert message in str(error.value) and f"{path}, cublaslt row 1" in str(error.value)
    with pytest.raises(ValueError, match="cublaslt row 1"):  # and the build stops
        tuning_table.read_tables(KERNELS, tmp_path)


def test_a_product_has_one_row(tmp_path: Path) -> None:
    twice = [row().to_json(), row(algorithm=PLAIN).to_json()]
    with pytest.raises(ValueError, match="row 1: bf16 nt 384x1152x16384 has a row already"):
        product_table.rows_from(twice, "here")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "7", "null", '{"gpus": []}', '{"gpus": ["", "x"]}', '{"gpus": "A GPU"}',
     '{"gpus": ["A GPU"], "cublaslt": {}}', '{"gpus": ["A GPU"], "other": 1}',
     '{"gpus": ["A GPU"], "rows": 5}', '{"gpus": ["A GPU"], "library": [1]}',
     '{"gpus": ["A GPU"], "cublaslt": ' + "[" * 100_000, '{"gpus": ["A GPU"], "multiprocessors": 1'
     + "0" * 10_000],
)  # fmt: skip
def test_files_that_are_no_tables(tmp_path: Path, text: str) -> None:
    path = tmp_path / "gpu.json"
    path.write_text(text)
    for door in (
        product_table.read_rows,
        lambda path, gpu: product_table.update(path, gpu, ROWS, []),
    ):
        with pytest.raises(ValueError, match=str(path)):
            door(path, GPU)
    assert path.read_text() == text


def test_files_that_are_too_large(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "gpu.json"
    product_table.update(path, GPU, ROWS, [])
    monkeypatch.setattr(product_table, "_MOST_BYTES", path.stat().st_size)
    assert len(product_table.read_rows(path, GPU)) == len(ROWS)
    endless = Path("/dev/zero")  # says that it has no bytes
    path.write_text(path.read_text() + " ")
    for one in (path, endless) if endless.exists() else (path,):
        with pytest.raises(ValueError, match=f"{one}: is larger than"):
            product_table.read_rows(one, GPU)
    monkeypatch.setattr(product_table, "_MOST_ROWS", len(ROWS) - 1)
    monkeypatch.setattr(product_table, "_MOST_BYTES", 1 << 20)
    with pytest.raises(ValueError, match="at most 4 rows"):
        product_table.read_rows(path, GPU)


def test_processes_share_a_table(
    tmp_path: Path, start_python: Callable[..., subprocess.Popen[str]]
) -> None:
    """None loses another's rows, and nothing stays behind beside the table."""
    path = tmp_path / "tables" / "gpu.json"
    path.parent.mkdir()
    writer = (
        "import sys; from pathlib import Path\n"
        "from vibetensor.cute_kernels import product_table as t\n"
        "print(flush=True); sys.stdin.read(1)\n"
        "for m in range(int(sys.argv[2]), 60, 3):\n"
        "    p = t.Product('bf16', 'nt', 1, m + 1, 8, 8)\n"
        "    t.update(Path(sys.argv[1]), 'A GPU', [t.ProductRow(p, t.Configuration(1), 1.0, 2.0, 3)], [p])\n"
    )
    with ExitStack() as stack:
        writers = [
            stack.enter_context(start_python(writer, path, first, stdin=subprocess.PIPE))
            for first in range(3)
        ]
        for each in writers:
            assert each.stdout and each.stdout.read(1) == "\n"  # all have started
        for each in writers:
            assert each.stdin
            each.stdin.close()
        assert [each.wait(60) for each in writers] == [0, 0, 0]
    assert sorted(r.product.m for r in product_table.read_rows(path, GPU)) == list(range(1, 61))
    assert [each.name for each in path.parent.iterdir()] == ["gpu.json"]


def test_torn_and_damaged_files(tmp_path: Path) -> None:
    """A file cut off or changed anywhere reads as some table or raises ValueError that names it."""
    path = tmp_path / "gpu.json"
    product_table.update(path, GPU, ROWS, [])
    whole = path.read_bytes()
    rng = random.Random(0)
    refused = 0
    for at in [*range(0, len(whole) - 2, 37), *rng.sample(range(len(whole)), 200)]:
        cut = whole[:at]
        damaged = bytearray(whole)
        damaged[at] = rng.randrange(256)
        for content, must_fail in ((cut, True), (bytes(damaged), False)):
            path.write_bytes(content)
            try:
                product_table.read_rows(path, GPU)
                assert not must_fail
            except ValueError as error:
                refused += 1
                assert str(path) in str(error)
    assert refused > 200
    with pytest.raises(OSError):
        product_table.read_rows(tmp_path / "absent.json", GPU)


def test_the_generated_table(tmp_path: Path) -> None:
    product_table.update(tmp_path / "gpu.json", 'A "GPU"', ROWS, [])
    tables = tuning_table.read_tables(KERNELS, tmp_path)
    assert tables[0].rows == () and set(tables[0].products) == set(ROWS)
    text = launch_table._table(KERNELS, None, tables)
    assert (
        '{"A \\"GPU\\"", {DType::BFloat16, kTransposeA, '
        "static_cast<int32_t>(GemmEpilogue::None), 1, 384, 1152, 16384}, "
        "{66, 20u, 4, 2u, 0u, 0u, 36u, 0, 2}}"
    ) in text
    assert (
        "{DType::Float16, kTransposeB | kBias, static_cast<int32_t>(GemmEpilogue::GeluTanh), 7,"
        in text
    )
    assert "{DType::Float32, kTransposeB | kTransposeA | kTf32," in text
    assert "{DType::BFloat16, kTransposeA | kAccumulate," in text
    assert "{DType::Float64, 0, static_cast<int32_t>(GemmEpilogue::GeluTanhBackward)," in text
    assert "return kProducts;" in text
    assert "return {};" in launch_table._products(())


def test_rows_for_the_library(tmp_path: Path) -> None:
    own = {"kernel": "gemm_tn", "variant": "library", "dtype": "bf16",
           "extents": {x: [8, 8] for x in "lmnk"}}  # fmt: skip

    def rows(**changed: Any) -> tuple[tuning_table.Row, ...]:
        record = {"gpus": [GPU], "rows": [{**own, **changed}]}
        (tmp_path / "gpu.json").write_text(json.dumps(record))
        return tuning_table.rows_of(tuning_table.read_tables(KERNELS, tmp_path))

    assert rows() == (
        tuning_table.Row(GPU, "gemm_tn", "library", {x: (8, 8) for x in "lmnk"}, "bfloat16"),
    )
    text = launch_table._table(KERNELS, None, tuning_table.read_tables(KERNELS, tmp_path))
    assert (
        "gemm_tn_tuned[] = {{0, -1, {{{8, 8}, {8, 8}, {8, 8}, {8, 8}}}, DType::BFloat16}}" in text
    )
    for changed in ({"dtype": "f32"}, {"dtype": None}, {"kernel": "softmax_forward"}):
        with pytest.raises(ValueError, match="the library's rows are of products"):
            rows(**changed)


# --- what is chosen


@pytest.fixture
def native() -> Iterator[Any]:
    cuda = pytest.importorskip("vibetensor._cuda", reason="this build has no CUDA")
    before = cuda.measured_products_enabled()
    yield cuda
    cuda.enable_measured_products(before)
    cuda.remove_added_products()


def test_added_rows_are_found(native: Any) -> None:
    for r in ROWS:
        assert native.measured_algorithm(GPU, r.product.native) is None
    native.add_measured_products(GPU, [(r.product.native, r.algorithm.native) for r in ROWS])
    for r in ROWS:
        assert Configuration(*native.measured_algorithm(GPU, r.product.native)) == r.algorithm
        assert native.measured_algorithm("Another", r.product.native) is None
    for changed in ({"m": 385}, {"layout": "nn"}, {"bias": True}, {"accumulate": True},
                    {"dtype": "f16"}, {"epilogue": "relu"}, {"batch": 2}):  # fmt: skip
        assert native.measured_algorithm(GPU, product(**changed).native) is None
    native.add_measured_products(GPU, [(ROWS[0].product.native, PLAIN.native)])
    assert Configuration(*native.measured_algorithm(GPU, ROWS[0].product.native)) == PLAIN
    native.enable_measured_products(False)
    assert native.measured_algorithm(GPU, ROWS[0].product.native) is None
    native.enable_measured_products(True)
    native.remove_added_products()
    assert native.measured_algorithm(GPU, ROWS[0].product.native) is None


def test_compiled_rows_are_those_of_the_tables(native: Any) -> None:
    want = [
        (gpu, r.product.native, r.algorithm.native)
        for table in tuning_table.read_tables(KERNELS)
        for gpu in table.gpus
        for r in table.products
    ]
    assert [(gpu, tuple(p), tuple(c)) for gpu, p, c in native.compiled_products()] == want
    for gpu, p, c in want:
        assert tuple(native.measured_algorithm(gpu, p)) == c


def test_bad_rows_are_refused_whole(native: Any) -> None:
    good = (ROWS[0].product.native, SPLIT.native)
    for bad in (
        (product(dtype="int8").native, SPLIT.native),
        (product(layout="xx").native, SPLIT.native),
        (product(epilogue="gelu").native, SPLIT.native),
        (ROWS[0].product.native, (*SPLIT.native[:-1], 2**16)),
        (ROWS[0].product.native, (2**31, *SPLIT.native[1:])),
    ):
        with pytest.raises(ValueError):
            native.add_measured_products(GPU, [good, bad])
        assert native.measured_algorithm(GPU, ROWS[0].product.native) is None


def test_the_variable_disables_rows(run_python: Any) -> None:
    pytest.importorskip("vibetensor._cuda", reason="this build has no CUDA")
    for value, want in (("0", "False"), ("1", "True"), ("", "True")):
        made = run_python(
            "from vibetensor import _cuda; print(_cuda.measured_products_enabled())",
            env={"VT_MEASURED_PRODUCTS": value},
        )
        assert made.stdout.strip() == want, made.stderr


# --- when a row is written


def test_a_win_is_more_than_noise() -> None:
    rng = random.Random(1)
    still = [100 + rng.gauss(0, 2) for _ in range(21)]
    assert tunable.wins(still, [t * 0.95 for t in still])
    assert not tunable.wins(still, [t * 0.98 for t in still])  # under 3%
    assert not tunable.wins([5.0] * 21, [4.75] * 21)  # under 0.3 us
    assert tunable.wins([5.0] * 21, [4.65] * 21)
    # A median that is lower, but not round by round.
    mixed = [80.0] * 11 + [120.0] * 10
    assert not tunable.wins([100.0] * 21, mixed)
    # The same algorithm twice, with 5% of noise.
    twice = [[[100 + rng.gauss(0, 5) for _ in range(21)] for _ in range(2)] for _ in range(300)]
    assert sum(tunable.wins(a, b) for a, b in twice) <= 3


def test_rounds_empty_the_cache_before_each_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    import vibetensor.torch as torch

    done: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            done.append("event")
            self.at = len(done)

        def elapsed_time(self, end: Any) -> float:
            return end.at - self.at

    class Flush:
        def zero_(self) -> None:
            done.append("flush")

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("wait"))
    launches = [lambda i=i: done.append(f"launch-{i}") for i in range(4)]
    times = tunable._rounds(launches, [0, 2, 3], 6, Flush())
    assert times == {i: [2000.0] * 6 for i in (0, 2, 3)}
    assert done[:3] == ["launch-0", "launch-2", "launch-3"] and "launch-1" not in done
    rounds = " ".join(done[3:]).split(" wait")[:-1]
    assert len(rounds) == 6
    orders = set()
    for text in rounds:
        assert text.split()[:5] == ["flush"] * 5  # four to be ahead of the device, one to empty
        assert text.count("flush event launch-") == 3
        orders.add(tuple(word[-1] for word in text.split() if word.startswith("launch")))
    assert len(orders) >= 5
    before = {pair for order in orders for pair in zip(order, order[1:])}
    assert len(before) == 6  # each follows each other one


def compared(
    monkeypatch: pytest.MonkeyPatch, true: list[float], noise: float, others: int = 0
) -> Any:
    """What is found of answers that take `true` microseconds, the last `others` of them no answers."""
    rng = random.Random(3)
    asked = []

    def rounds(launches: Any, which: Any, count: int, flush: Any) -> dict[int, list[float]]:
        which = list(which)
        assert len(launches) == len(true)
        asked.append((which, count))
        return {i: [true[i] * (1 + rng.gauss(0, noise)) for _ in range(count)] for i in which}

    monkeypatch.setattr(tunable, "_rounds", rounds)
    own = len(true) - others
    launches = [lambda: None] * own
    names = {f"other {i}": (lambda: None) for i in range(others)}
    found = tunable._compared(launches, [f"c{i}" for i in range(own)], names, None)
    return found, asked


def test_the_best_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found, asked = compared(monkeypatch, [100, 140, 88, 99, 90, 200, 88.5], 0.01)
    assert found["configuration"] in ("c2", "c6") and found["us"] < 91
    assert 97 < found["first_us"] < 103 and found["answers"] == 7
    assert [count for _, count in asked] == list(tunable.ROUNDS)
    assert set(asked[0][0]) == set(range(7)) and asked[2][0] == [0, asked[2][0][1]]
    assert len(asked[1][0]) <= 1 + tunable.FINALISTS and 0 in asked[1][0]


def test_the_first_answer_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    for true in ([100], [100, 99, 120], [100, 100, 100, 100, 100, 100], [5, 4.9]):
        found, _ = compared(monkeypatch, list(true), 0.02)
        assert "configuration" not in found and found["us"] <= found["first_us"]


def test_other_launches_are_timed_beside(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = compared(monkeypatch, [100, 80, 70, 300], 0.005, others=2)
    assert found["configuration"] == "c1" and set(found["others"]) == {"other 0", "other 1"}
    assert 68 < found["others"]["other 0"] < 72 and 78 < found["beside_us"] < 82


class Gpu:
    """Stands for the extension on a machine with a GPU, whose products take what `times` says."""

    name = GPU

    def __init__(self, seen: list[Any], times: dict[Product, list[float] | str]) -> None:
        self.seen, self.times, self.added = seen, times, []
        self.captured = False

    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    set_device = staticmethod(lambda index: None)
    cublaslt_version = staticmethod(lambda: 130101)
    current_stream = staticmethod(lambda index: 0)

    def stream_is_captured(self, index: int, stream: int) -> bool:
        return self.captured

    def properties(self, index: int) -> Any:
        return self

    def seen_products(self) -> list[Any]:
        return self.seen

    def add_measured_products(self, gpu: str, rows: list[Any]) -> None:
        self.added.append((gpu, rows))

    @property
    def configurations(self) -> list[Any]:
        return [SPLIT.native, Configuration(7).native, PLAIN.native]

    def run(self, answer: int) -> None:
        if answer == 1:
            raise RuntimeError("cuBLASLt error: not supported after all")

    def trial(self, s: Any) -> Any:
        if isinstance(self.times[s.product], str):
            raise RuntimeError(self.times[s.product])
        self.current = s.product
        return {}, self

    def rounds(self, launches: Any, which: Any, count: int, flush: Any) -> dict[int, list[float]]:
        return {i: [self.times[self.current][i]] * count for i in which}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    def made(seen: list[Any], times: dict[Product, Any]) -> Gpu:
        fake = Gpu(seen, times)
        for name in ("required", "native"):
            monkeypatch.setattr(tunable._backend, name, lambda: fake)
        monkeypatch.setattr(tunable, "_trial", fake.trial)
        monkeypatch.setattr(tunable, "_rounds", fake.rounds)
        monkeypatch.setattr(tunable, "_flush", lambda index: None)
        monkeypatch.setattr(tunable, "_results", {})
        return fake

    return made


def test_tuning_from_what_was_seen_to_rows_that_are_read(gpu: Any, tmp_path: Path) -> None:
    small, large, stays, broken = product(8), product(800), product(80), product(4)
    strides = [1, 2, 3, 0, 0, 0]

    def seen(p: Product, alignment: int = 256, device: int = 0) -> Any:
        return p.native, strides, alignment, device

    import vibetensor.torch as torch

    assert torch.cuda.tunable is tunable
    fake = gpu([seen(small), seen(broken), seen(stays), seen(large, 16), seen(large), seen(small, 256, 1)],
               {small: [10.0, 9.0], large: [100.0, 80.0], stays: [50.0, 49.0],
                broken: "cuBLASLt has no algorithm for it\nand more"})  # fmt: skip
    found = tunable.seen()
    assert [s.product for s in found] == [large, large, stays, small, broken]
    assert [s.alignment for s in found[:2]] == [256, 16] and found[0].strides == tuple(strides)
    lines: list[str] = []
    results = {r.product: r for r in tunable.tune(report=lines.append)}
    assert len(lines) == 4 and set(results) == {small, large, stays, broken}
    assert results[large].configuration == PLAIN and results[large].us == 80
    assert results[stays].configuration is None and results[small].configuration == PLAIN
    assert results[broken].problem == "cuBLASLt has no algorithm for it"
    assert {r.product: r for r in tunable.get_results()} == results
    path = tmp_path / "products.json"
    # A row of what could not be measured stays, that of what is no faster now goes.
    product_table.update(path, GPU, [row(4), row(80), row(77)], [])
    assert tunable.write_file(str(path)) and tunable.read_file(str(path))
    ((name, rows),) = fake.added
    assert name == GPU and dict(rows) == {
        small.native: PLAIN.native, large.native: PLAIN.native,
        broken.native: SPLIT.native, product(77).native: SPLIT.native}  # fmt: skip
    fake.times[small] = "CUDA error: an illegal address"
    with pytest.raises(RuntimeError, match="illegal address"):
        tunable.tune()
    with pytest.raises(ValueError, match="is of device 1, not 0"):
        tunable.tune([tunable.Seen(small, tuple(strides), 256, 1)])
    fake.captured = True
    with pytest.raises(RuntimeError, match="cannot be timed while they are captured"):
        tunable.tune()
    path.write_text('{"gpus": ["Another"]}')
    for door in (tunable.read_file, tunable.write_file):
        with pytest.raises(ValueError, match="its rows are of Another"):
            door(str(path))
    assert len(fake.added) == 1


# --- bench/tune.py --workload


@pytest.fixture(scope="module")
def products() -> Any:
    bench = Path(__file__).parents[2] / "bench"
    if not bench.exists():
        pytest.skip("needs a checkout")
    sys.path.insert(0, str(bench))
    try:
        import tune_products
    finally:
        sys.path.remove(str(bench))
    return tune_products


def test_products_know_their_kernels(products: Any) -> None:
    for changed, want in (
        ({}, "gemm_nt"),
        ({"layout": "tn", "bias": True}, "gemm_bias_tn"),
        ({"layout": "nn", "bias": True}, ""),
        ({"accumulate": True}, "gemm_add_nt"),
        ({"layout": "tn", "bias": True, "accumulate": True}, ""),
        ({"layout": "tt"}, ""),
        ({"dtype": "f32"}, ""),
        ({"layout": "tn", "epilogue": "gelu_tanh"}, ""),
    ):
        assert products.kernel_of(product(**changed)) == want


def test_rows_that_keep_a_product_with_the_library(products: Any) -> None:
    def result(own: float, cute: float) -> Any:
        return tunable.Result(product(layout="tn"), GPU, first_us=own, us=own, beside_us=own,
                              others={"v": cute})  # fmt: skip

    assert products.library_row(result(100, 102), "v") is None
    assert products.library_row(result(100, 90), "v") is None
    assert products.library_row(result(100, 110), "") is None  # the table has none
    made = products.library_row(result(100, 110), "v")
    assert made["kernel"] == "gemm_tn" and made["extents"]["m"] == [384, 384]
    other = {**made, "extents": {**made["extents"], "m": [5, 5]}}
    kernel = {"kernel": "gemm_tn", "variant": "x", "extents": {"m": [1, 9]}}
    merge = products.with_library_rows
    assert merge([kernel], [made], [product(layout="tn")]) == [made, kernel]
    assert merge([other, made, kernel], [], [product(layout="tn")]) == [other, kernel]
    assert merge([made, kernel], [], [product(layout="nn")]) == [made, kernel]


def test_the_table_chooses_by_the_product(products: Any, native: Any,
                                          monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    class H200:
        name, major, minor, multi_processor_count = "NVIDIA H200", 9, 0, 132

    monkeypatch.setattr(products.torch.cuda, "get_device_properties", H200)
    compiled = bool(native.cute_compiled_by())
    before = native.cute_mode()
    chosen = products.cute_choice(Product("bf16", "tn", 1, 32768, 3072, 768))
    assert ("turns" in chosen) == compiled
    assert products.cute_choice(Product("bf16", "tn", 1, 128, 128, 128)) == ""
    assert (
        products.cute_choice(Product("bf16", "tn", 1, 32768, 3072, 768, bias=True)) or not compiled
    )
    assert products.cute_choice(Product("f32", "tn", 1, 32768, 3072, 768)) == ""
    assert native.cute_mode() == before
