"""Runs a test once with vibetensor and once with PyTorch, so that what it states is torch's rule."""

from __future__ import annotations

import pytest

import vibetensor.torch


@pytest.fixture(params=["vibetensor", pytest.param("torch", marks=pytest.mark.torch)])
def api(request):
    """The library under test: vibetensor.torch, and PyTorch where it is installed."""
    if request.param == "vibetensor":
        return vibetensor.torch
    return pytest.importorskip("torch")
