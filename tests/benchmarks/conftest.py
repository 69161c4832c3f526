from __future__ import annotations

import sys
from pathlib import Path

# The harness is no package: `benchmarks/` itself is where its modules are imported from.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
