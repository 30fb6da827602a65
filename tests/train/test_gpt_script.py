"""A script written for torch runs with only its import changed, and learns the same."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

SCRIPT = (Path(__file__).parent / "gpt_script.py").read_text()
IMPORTS = "import torch\nimport torch.nn as nn\nfrom torch.nn import functional as F\n"
CHANGED = (
    "import vibetensor.torch as torch\nimport vibetensor.torch.nn as nn\n"
    "from vibetensor.torch.nn import functional as F\n"
)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_same_losses_with_the_import_changed(dtype, tolerance, tmp_path, run_python) -> None:
    random = np.random.default_rng(1)
    for split in ("train", "val"):
        text = (np.arange(600) * 3 + random.integers(0, 2, 600).cumsum()) % 17
        text.astype(np.uint16).tofile(tmp_path / f"{split}.bin")
    assert SCRIPT.count(IMPORTS) == 1
    for source, full in ((SCRIPT, ""), (SCRIPT.replace(IMPORTS, CHANGED), "1")):
        # torch neither pins memory without a device nor compiles without a C++ compiler.
        done = run_python(source, tmp_path, env={"DTYPE": dtype, "COMPILE": full, "PIN": full})
        assert done.returncode == 0, done.stderr
    theirs = json.loads((tmp_path / f"losses-torch-{dtype}.json").read_text())
    ours = json.loads((tmp_path / f"losses-vibetensor.torch-{dtype}.json").read_text())
    np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=tolerance)
    np.testing.assert_allclose(ours["validation"], theirs["validation"], rtol=tolerance)
    assert np.mean(ours["losses"][-4:]) < 0.8 * ours["losses"][0]
    if dtype == "float32":
        assert ours["greedy"] == theirs["greedy"]
    sampled = np.array(ours["sampled"])
    assert sampled.shape == (2, 33) and (sampled >= 0).all() and (sampled < 17).all()
