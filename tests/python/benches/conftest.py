"""The benchmark's code is not installed: it lies beside its command."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[3] / "benches" / "python"))
