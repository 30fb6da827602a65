"""torch's own operator samples: values, dtypes, shapes, views, gradients, forms of call and errors.

`op_db_expected.py` lists what may differ, sample by sample, with the reason. The list is strict: a
listed sample that passes is a failure, so it can only shrink.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("expecttest", reason="torch's operator samples need expecttest")

import vibetensor.torch as vt  # noqa: E402

from .op_db import (  # noqa: E402
    DTYPES,
    MORE_DTYPES,
    RANDOM,
    SAMPLES_OF_MORE,
    SAMPLES_PER_CASE,
    Case,
    Translator,
    Untranslatable,
    cases,
    compare,
    compare_views,
    error_samples,
    its_other_dtype,
    leaves,
    same_order,
    samples,
    tensors_in,
)
from .op_db_expected import ALL, CHANCE, EXPECTED, TOLERANCE_SCALE  # noqa: E402

CASES = cases()
Outcome = tuple[int, str]


def _call(function: Callable[..., Any], args: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(args[0], *args[1], **args[2])


def _both(case: Case, sample: Any, grad: bool = False) -> tuple[Any, Any, Translator] | None:
    """The sample's arguments for torch and for us; None if it uses what we do not have."""
    translate = Translator(grad)
    try:
        theirs, ours = translate((sample.input, sample.args, sample.kwargs))
    except Untranslatable:
        return None
    return theirs, ours, translate


def _scale(case: Case) -> float:
    return TOLERANCE_SCALE.get(case.info.name, 1)


def _outcome(number: int, check: Callable[[], None]) -> Iterator[Outcome]:
    try:
        check()
    except Exception as error:  # every failure is reported with its sample
        text = str(error).strip().splitlines() or [""]
        yield number, f"{type(error).__name__}: {' | '.join(line for line in text[:8] if line)}"


def _supported(result: Any) -> bool:
    """False for results that vibetensor has no dtype for."""
    return all(
        hasattr(vt, str(leaf.dtype).removeprefix("torch."))
        for leaf in leaves(result)
        if isinstance(leaf, torch.Tensor)
    )


def forward_failures(case: Case, dtype: str) -> Iterator[Outcome]:
    count = SAMPLES_OF_MORE if dtype in MORE_DTYPES else SAMPLES_PER_CASE
    for number, sample in samples(case, dtype, count=count):
        both = _both(case, sample)
        if both is None:
            continue
        theirs, ours, _ = both
        try:
            expected = _call(case.callable(torch), theirs)
        except Exception:  # the sample is for a wrapper that op_db has around the operator
            continue
        if not _supported(expected):
            continue

        def check(
            sample: Any = sample, theirs: Any = theirs, ours: Any = ours, expected: Any = expected
        ) -> None:
            actual = _call(case.callable(vt), ours)
            mine, wanted = leaves(actual), leaves(expected)
            assert len(mine) == len(wanted), f"{len(mine)} results, torch has {len(wanted)}"
            my_inputs, its_inputs = tensors_in(ours, vt.Tensor), tensors_in(theirs, torch.Tensor)
            for a, b in zip(mine, wanted):
                compare_views(a, b, my_inputs, its_inputs)
            same_order(case, sample, mine, wanted)
            random = case.is_random(sample)
            for a, b in zip(mine, wanted):
                compare(a, b, _scale(case), not random)
            if not random:
                for a, b in zip(my_inputs, its_inputs):
                    compare(a, b, _scale(case))  # changed alike or not at all

        yield from _outcome(number, check)


def _gradients(library: Any, result: Any, inputs: list[Any], second: bool) -> list[Any]:
    """Gradients of a fixed weighting of the outputs and, if asked, of their squares."""
    outputs = [r for r in leaves(result) if isinstance(r, library.Tensor) and r.requires_grad]
    weights = np.random.default_rng(3)
    total = None
    for out in outputs:
        weight = library.as_tensor(weights.uniform(0.5, 1.5, tuple(out.shape)))
        term = (out.to(library.float64) * weight).sum()
        total = term if total is None else total + term
    if total is None:
        return [None] * len(inputs)
    first = library.autograd.grad(total, inputs, create_graph=second, allow_unused=True)
    if not second:
        return list(first)
    live = [g for g in first if g is not None and g.requires_grad]
    score = sum((g * g).sum() for g in live) if live else None
    if score is None:
        return [*first, *[None] * len(inputs)]
    return [*first, *library.autograd.grad(score, inputs, allow_unused=True)]


def _compare_gradient(ours: Any, theirs: Any, scale: float) -> None:
    """No gradient at all and one of zeros mean the same."""
    if ours is not None and theirs is not None:
        compare(ours, theirs, scale)
        return
    known = ours if theirs is None else theirs
    assert known is None or not (known != 0).any(), (
        f"{'no gradient' if ours is None else 'a gradient'}, unlike torch"
    )


def gradient_failures(case: Case) -> Iterator[Outcome]:
    for index, (number, sample) in enumerate(samples(case, "float64", requires_grad=True)):
        both = _both(case, sample, grad=True)
        if both is None or not both[2].theirs or case.is_random(sample):
            continue
        theirs, ours, translate = both
        second = case.info.supports_gradgrad and index < 4
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                result = _call(case.callable(torch), theirs)
                expected = _gradients(torch, result, translate.theirs, second)
        except Exception:
            continue

        def check(
            ours: Any = ours,
            result: Any = result,
            expected: Any = expected,
            inputs: Any = translate.ours,
            second: bool = second,
        ) -> None:
            mine = _call(case.callable(vt), ours)
            for a, b in zip(leaves(mine), leaves(result)):
                if isinstance(b, torch.Tensor):
                    assert a.requires_grad == b.requires_grad, f"requires_grad {a.requires_grad}"
            actual = _gradients(vt, mine, inputs, second)
            for place, (a, b) in enumerate(zip(actual, expected)):
                try:
                    _compare_gradient(a, b, 10 * _scale(case))
                except AssertionError as error:
                    order, which = divmod(place, len(inputs))
                    raise AssertionError(f"d{order + 1} of input {which}: {error}") from None

        yield from _outcome(number, check)


def _form_failures(
    case: Case, form: str, dtypes: tuple[str, ...], call: Callable[..., Any]
) -> Iterator[Outcome]:
    """Another form of call (method, in place, out=) on a few samples of some dtypes."""
    for dtype in dtypes:
        if getattr(torch, dtype) not in case.info.dtypes:
            continue
        for number, sample in samples(case, dtype, count=4):
            both = _both(case, sample)
            if both is None:
                continue
            theirs, ours, _ = both
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    expected = call(torch, theirs, None)
            except Exception:
                expected = None
            if expected is not None and not _supported(expected):
                continue

            def check(sample: Any = sample, ours: Any = ours, expected: Any = expected) -> None:
                if expected is None:  # torch refuses: for instance a result that does not fit
                    try:
                        call(vt, ours, None)
                    except Exception:
                        return
                    raise AssertionError("no error, unlike torch")
                mine, wanted = leaves(call(vt, ours, expected)), leaves(expected)
                same_order(case, sample, mine, wanted)
                for a, b in zip(mine, wanted):
                    compare(a, b, _scale(case), not case.is_random(sample))

            for _, text in _outcome(number, check):
                yield number, f"{form} [{dtype}] {text}"


def method_failures(case: Case) -> Iterator[Outcome]:
    name = getattr(case.info.method_variant, "__name__", None)

    def call(library: Any, args: Any, expected: Any) -> Any:
        return _call(getattr(library.Tensor, name), args)

    if name and hasattr(torch.Tensor, name) and not case.path.startswith("Tensor."):
        yield from _form_failures(case, "method", ("float32", "int64"), call)


def inplace_failures(case: Case) -> Iterator[Outcome]:
    name = getattr(case.info.inplace_variant, "__name__", None)

    def call(library: Any, args: Any, expected: Any) -> Any:
        result = _call(getattr(library.Tensor, name), args)
        assert result is args[0]
        return result

    if name and hasattr(torch.Tensor, name):
        yield from _form_failures(case, "in place", ("float32", "int64", "bool"), call)


def inplace_gradient_failures(case: Case) -> Iterator[Outcome]:
    """The in-place form on a copy of each input, through which the gradient must find its way."""
    name = getattr(case.info.inplace_variant, "__name__", None)
    if not name or not hasattr(torch.Tensor, name):
        return
    for number, sample in samples(case, "float64", requires_grad=True, count=6):
        both = _both(case, sample, grad=True)
        if both is None or case.is_random(sample) or not isinstance(sample.input, torch.Tensor):
            continue
        theirs, ours, translate = both

        def run(library: Any, args: Any, inputs: Any) -> list[Any]:
            copy = args[0].clone()
            result = _call(getattr(library.Tensor, name), (copy, *args[1:]))
            assert result is copy
            return [result.detach(), *_gradients(library, result, inputs, False)]

        try:
            expected = run(torch, theirs, translate.theirs)
        except Exception:  # results that do not fit are compared by inplace_failures
            continue

        def check(ours: Any = ours, expected: Any = expected, inputs: Any = translate.ours) -> None:
            for a, b in zip(run(vt, ours, inputs), expected):
                _compare_gradient(a, b, 10 * _scale(case))

        yield from _outcome(number, check)


def out_failures(case: Case) -> Iterator[Outcome]:
    def call(library: Any, args: Any, expected: Any) -> Any:
        plain = _call(case.callable(library), args)
        several = isinstance(plain, tuple)
        made = [library.empty(0, dtype=leaf.dtype) for leaf in (plain if several else [plain])]
        out = tuple(made) if several else made[0]
        result = _call(case.callable(library), (args[0], args[1], {**args[2], "out": out}))
        assert all(a is b for a, b in zip(leaves(result), made))
        return result

    if case.info.supports_out and not case.path.startswith("Tensor."):
        yield from _form_failures(case, "out", ("float32", "int64"), call)


def error_failures(case: Case) -> Iterator[Outcome]:
    for number, error in error_samples(case):
        both = _both(case, error.sample_input)
        if both is None:
            continue
        theirs, ours, _ = both
        try:
            _call(case.callable(torch), theirs)
        except Exception as raised:
            wanted = type(raised)
        else:
            continue  # refused by a wrapper of op_db, not by the operator

        def check(ours: Any = ours, wanted: Any = wanted) -> None:
            try:
                _call(case.callable(vt), ours)
            except Exception as mine:
                assert isinstance(mine, wanted) or (
                    # torch's NotImplementedError of a dtype is a RuntimeError too.
                    issubclass(wanted, RuntimeError) and isinstance(mine, RuntimeError)
                ), f"{type(mine).__name__} ({mine}), torch raises {wanted.__name__}"
            else:
                raise AssertionError(f"no error, torch raises {wanted.__name__}")

        yield from _outcome(number, check)


def _verify(case: Case, what: str, outcomes: Iterator[Outcome]) -> None:
    """Exactly the listed samples fail."""
    failed: dict[int, str] = {}
    for number, text in outcomes:
        failed.setdefault(number, text)
    listed, _reason = EXPECTED.get((case.name, what), ((), ""))
    if listed == ALL:
        assert failed, f"{case.name} {what} is listed as different but passes"
        return
    chance = CHANCE.get((case.name, what), ())
    new = [f"sample {n}: {text}" for n, text in failed.items() if n not in (*listed, *chance)]
    gone = [n for n in listed if n not in failed]
    assert not new, f"{case.name} {what} differs from torch:\n" + "\n".join(new)
    assert not gone, f"{case.name} {what}: samples {gone} are listed as different but pass"


CHECKS: dict[str, Callable[[Case], Iterator[Outcome]]] = {
    "gradients": gradient_failures,
    "method": method_failures,
    "inplace": inplace_failures,
    "inplace gradients": inplace_gradient_failures,
    "out": out_failures,
    "errors": error_failures,
}


def _plan() -> list[tuple[Case, str]]:
    plan = []
    for case in CASES:
        plan += [(case, d) for d in DTYPES if getattr(torch, d) in case.info.dtypes]
        plan += [(case, d) for d in its_other_dtype(case)]
        if case.info.supports_autograd and case.info.name not in RANDOM:
            plan += [(case, "gradients"), (case, "inplace gradients")]
        plan += [(case, form) for form in ("method", "inplace", "out")]
        if case.info.error_inputs_func is not None:
            plan.append((case, "errors"))
    return plan


PLAN = _plan()


@pytest.fixture(scope="module", autouse=True)
def one_thread_each() -> Iterator[None]:
    """The samples are small: threads would only wait for each other."""
    before = torch.get_num_threads(), vt.get_num_threads()
    torch.set_num_threads(1)
    vt.set_num_threads(1)
    yield
    torch.set_num_threads(before[0])
    vt.set_num_threads(before[1])


@pytest.mark.parametrize(
    ("case", "what"), [pytest.param(c, w, id=f"{c.name}-{w}") for c, w in PLAN]
)
def test_operator(case: Case, what: str) -> None:
    if what in (*DTYPES, *MORE_DTYPES):
        _verify(case, what, forward_failures(case, what))
    else:
        _verify(case, what, CHECKS[what](case))


def test_list_names_tests_that_exist() -> None:
    """An entry for a check that is never made would hide nothing and stay forever."""
    known = {(case.name, what) for case, what in PLAN}
    assert [key for key in EXPECTED if key not in known] == []
    assert all(reason for _, reason in EXPECTED.values())
