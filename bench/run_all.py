"""Runs every benchmark that this machine can run, one after the other; each appends its rows to bench/results.

make bench            or            python bench/run_all.py --only bench_cut.py
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
SCRIPTS = (
    "bench_tiny.py", "bench_parity.py", "bench_cut.py", "bench_batch.py", "bench_plugin.py", "bench_subsets.py",
    "search_methods.py", "bench_latency_reward.py", "bench_lookahead.py", "bench_tune.py", "bench_specialists.py",
    "bench_methods.py", "bench_lexi.py", "bench_memory.py",
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=SCRIPTS, help="may be repeated")
    failed = []
    for script in parser.parse_args().only or SCRIPTS:
        began = time.monotonic()
        print(f"== {script}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script)]).returncode:
            failed.append(script)
        print(f"== {script}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
