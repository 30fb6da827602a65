"""Fixtures of the tests beside it."""

import pytest


@pytest.fixture
def torch():
    """PyTorch as the reference; tests that ask for it are skipped where it is not installed."""
    return pytest.importorskip("torch")
