"""The benchmarks, a folder for each subject; README.md says what is measured and how.

A script puts the project's root on the path and imports from here. The kernels' folder is added here, since a bare
machine has neither them nor fastrm installed.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # of the project
DATA = ROOT.parent / "shared" / "data"  # real data beside the project, where there are any

if (_kernels := str(ROOT / "kernels")) not in sys.path:
    sys.path.insert(0, _kernels)
