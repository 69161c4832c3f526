from __future__ import annotations

import sys
from pathlib import Path

# The reader of compiled kernels is one of the developers' scripts, which are no package.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
