"""tests/cute imports its own modules by name."""

import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
# Where the DSL drops what it is asked to keep; read as it is imported.
os.environ.setdefault("CUTE_DSL_DUMP_DIR", tempfile.mkdtemp(prefix="vibetensor-cute-"))
