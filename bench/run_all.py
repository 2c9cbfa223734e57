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
SECOND = "bench_methods.py --model bench/models/llama4-tiny"
COMMANDS = (
    "bench_tiny.py", "bench_parity.py", "bench_cut.py", "bench_batch.py", "bench_plugin.py", "bench_subsets.py",
    "search_methods.py", "bench_latency_reward.py", "bench_lookahead.py", "bench_tune.py", "bench_specialists.py",
    "bench_methods.py --tuning", f"{SECOND} --methods full-model reap leap --experts 32 16 8 4 --tuning",
    f"{SECOND} --methods frequency gate-mass --tuning", SECOND, "bench_lexi.py", "bench_memory.py",
)  # fmt: skip
"""What is run: scripts of this folder with their flags, from the folder above, which paths among them are below."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scripts = sorted({command.split()[0] for command in COMMANDS})
    parser.add_argument("--only", action="append", choices=scripts, help="may be repeated")
    only, failed = parser.parse_args().only or scripts, []
    for command in COMMANDS:
        script, *flags = command.split()
        if script not in only:
            continue
        began = time.monotonic()
        print(f"== {command}", flush=True)
        if subprocess.run([sys.executable, str(HERE / script), *flags], cwd=HERE.parent).returncode:
            failed.append(command)
        print(f"== {command}: {time.monotonic() - began:.0f} s", flush=True)
    if failed:
        print(f"failed: {'; '.join(failed)}", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    raise SystemExit(main())
