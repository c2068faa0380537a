"""Makes the folders of the checkout that no package holds importable: `benchmarks` and `tools`."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.append(str(ROOT))  # last: what is installed goes first
