"""Anomaly mode: errors in backward name the forward line, and nan gradients are errors."""

from __future__ import annotations

from vibetensor import _C


class set_detect_anomaly:
    """Switches anomaly mode at once; as a context manager, for the block only."""

    def __init__(self, mode: bool, check_nan: bool = True) -> None:
        self._before = _C._get_anomaly()
        _C._set_anomaly(mode, check_nan)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *exc: object) -> None:
        _C._set_anomaly(*self._before)


class detect_anomaly:
    """Anomaly mode for a block. Slow: every recorded op keeps its traceback."""

    def __init__(self, check_nan: bool = True) -> None:
        self.check_nan = check_nan

    def __enter__(self) -> None:
        self._before = _C._get_anomaly()
        _C._set_anomaly(True, self.check_nan)

    def __exit__(self, *exc: object) -> None:
        _C._set_anomaly(*self._before)
