"""Environment variables that switch something on or off."""

from __future__ import annotations

import pytest

from vibetensor._environment import env_flag


@pytest.mark.parametrize("otherwise", [False, True])
@pytest.mark.parametrize(
    ("value", "on"),
    [
        (None, None),
        ("", None),
        ("0", False),
        ("off", False),
        ("No", False),
        ("FALSE", False),
        ("1", True),
        ("on", True),
        ("yes", True),
        ("2", True),
    ],
)
def test_values(
    monkeypatch: pytest.MonkeyPatch, value: str | None, on: bool | None, otherwise: bool
) -> None:
    monkeypatch.delenv("VT_NVTX", raising=False)
    if value is not None:
        monkeypatch.setenv("VT_NVTX", value)
    assert env_flag("VT_NVTX", otherwise) is (otherwise if on is None else on)
