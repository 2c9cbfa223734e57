"""Every script under bench/ can be loaded: a name that moved breaks them silently, since most run for hours and rarely."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCH = Path(__file__).parents[2] / "bench"
LOAD_ALL = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
for path in sys.argv[2:]:
    runpy.run_path(path, run_name="loaded")
    print(path)
"""


def test_every_bench_loads() -> None:
    scripts = sorted(str(path) for path in BENCH.glob("*.py"))
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL, str(BENCH), *scripts], capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == scripts and len(scripts) > 10
