"""Record the cases, or compare them with what was recorded: ``python -m tests.kernels.recorded [write]``."""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
sys.path.insert(0, str(Path(__file__).parents[2] / "support"))

from . import compare, write

if __name__ == "__main__":
    if sys.argv[1:] == ["write"]:
        write()
    else:
        print(compare())
