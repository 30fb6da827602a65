"""The device that tests run on: `pytest --device`. For test modules; conftest.py sets it first."""

from __future__ import annotations

import os

# As it was asked for: cpu, cuda, cuda:1 or simulated.
DEVICE_NAME = os.environ.get("VT_TEST_DEVICE", "cpu")
# Without its index, as autocast and GradScaler take it.
DEVICE = DEVICE_NAME.partition(":")[0]
