"""Every test that needs PyTorch is selected by `-m torch`, or fails where it is skipped."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

CONFTEST = Path(__file__).parents[1] / "conftest.py"

HOOKS = f"""
    import runpy, sys
    sys.modules["torch"] = None  # as where PyTorch is not installed
    sys.path.append({str(CONFTEST.parents[1])!r})  # where conftest.py finds its own modules
    shared = runpy.run_path({str(CONFTEST)!r})
    pytest_runtest_makereport = shared["pytest_runtest_makereport"]

    def pytest_collection_modifyitems(items):
        shared["_mark_torch"](items)
"""

TESTS = """
    import pytest

    @pytest.fixture
    def framework():
        return pytest.importorskip("torch")

    @pytest.fixture
    def above(framework):
        return framework

    @pytest.fixture(params=["ours", pytest.param("theirs", marks=pytest.mark.torch)])
    def either(request):
        if request.param == "theirs":
            pytest.importorskip("torch")

    def hidden():
        return pytest.importorskip("torch.nn")

    def test_of_a_fixture(framework): pass
    def test_of_a_fixture_of_a_fixture(above): pass
    def test_of_either(either): pass
    def test_of_its_own(): pytest.importorskip("torch.utils.data")
    def test_of_another_module(): pytest.importorskip("no_such_module")
    def test_of_a_helper(): hidden()
    def test_of_nothing(): pass
"""


def test_marks(tmp_path: Path, run_python) -> None:
    (tmp_path / "conftest.py").write_text(textwrap.dedent(HOOKS))
    (tmp_path / "test_all.py").write_text(textwrap.dedent(TESTS))
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = torch: needs PyTorch\n")
    child = "import sys, pytest; sys.exit(pytest.main(sys.argv[1:]))"
    arguments = ["-v", "-p", "no:cacheprovider"]
    selected = run_python(child, *arguments, "-m", "torch").stdout
    assert sorted(re.findall(r"::(\S+) SKIPPED", selected)) == [
        "test_of_a_fixture",
        "test_of_a_fixture_of_a_fixture",
        "test_of_either[theirs]",
        "test_of_its_own",
    ]
    everything = run_python(child, *arguments).stdout
    assert re.findall(r"::(\S+) FAILED", everything) == ["test_of_a_helper"]
    assert "`-m torch` does not select it" in everything
    assert "2 passed" in everything and "5 skipped" in everything
