"""Everything that needs a CUDA GPU, in order: smoke, correctness, tuning, the kernel's bench, the engine's bench.

    make bench-gpu            or            python bench/run_gpu.py
    python bench/run_gpu.py --minutes 9           # what fits into nine minutes; the same command goes on afterwards
    python bench/run_gpu.py --smoke --out DIR     # a rehearsal on a CPU: every command, tiny sizes

Rows, tuned launches (kernels/) and logs (gpu_logs/) go to --out (default: $RESULTS, or else bench/results), which must
be kept between calls: gpu_logs/stages.json says which stages are done. They come in the order of their worth. Reckoned
for an H200, not measured: 12 s for each |I| and number of tokens that is tuned, 90 to 150 s an engine; all engines with
vLLM's own kernel within the first 30 minutes, everything within 50. A stage that time cut off goes on where it stopped,
since rows and tables are written as they come. One that failed is reported, its log named, and not run again without
--retry; the others still run.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from leap_serve.files import read_json, write_json

HERE = Path(__file__).resolve().parent
CORRECT = tuple(f"tests/leap_kernels/test_{name}.py" for name in ("fused_moe", "vllm_oracle", "timing"))
LOGS = "gpu_logs"
SMALL_GRID = ("1", "16", "64", "512", "4096")
TUNED_GRID = ("1", "8", "32", "64", "256", "1024", "4096")
SHORT, LONG = ("128",), ("128", "2048")
"""Input tokens: prompts of 2048 cost an engine another minute."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One command.

    ``least_s``: with less time left it is not begun (starting vLLM takes most of a minute). ``makes``: it is done
    only while this exists.
    """

    name: str
    command: Sequence[str]
    least_s: int = 60
    env: Mapping[str, str] = field(default_factory=dict)
    makes: Path | None = None


def stages(out: Path) -> list[Stage]:
    """What runs on a GPU. Engines come in the order in which their rows matter most."""
    python, tables = sys.executable, out / "kernels"
    ours = {"LEAP_KERNEL_CONFIGS": str(tables)}
    tuned = {**ours, "VLLM_TUNED_CONFIG_FOLDER": str(tables)}
    kernel = (python, str(HERE / "bench_kernel.py"), "--resume", "--out", str(out / "kernel.jsonl"))
    engine = (python, str(HERE / "bench_engine_gpu.py"), "--resume", "--out", str(out / "engine_gpu.jsonl"))
    pytest = (python, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *CORRECT)
    # Tens of GB long, though they take no room: not among what is copied or committed.
    sparse = Path(tempfile.gettempdir()) / f"leap-sparse-{os.getuid()}"

    def tuning(name: str, checkpoint: Path, tokens: Sequence[str]) -> Stage:
        command = (python, "-m", "leap_serve.cli", "tune-kernels", str(checkpoint), "-o", str(tables))
        return Stage(name, (*command, "--tokens", *tokens), 60)

    found = [
        Stage("kernels run", (*pytest, "-k", "equals_the_reference or sorts_stably")),
        Stage("engine runs", (*engine, "--experts", "16", "--batches", "1", "16", "--contexts", "128",
                                 "--output-tokens", "64", "--rounds", "3"), 120),
        Stage("kernels are right", pytest, 90),
        Stage("a checkpoint of every |I|", (python, str(HERE / "bench_engine_gpu.py"), "--sparse", str(sparse)),
              30, makes=sparse / "config.json"),
        tuning("tune Qwen3-30B-A3B", sparse, TUNED_GRID),
        Stage("kernel Qwen3-30B-A3B", (*kernel, "--models", "Qwen3-30B-A3B"), 60, ours),
    ]  # fmt: skip
    for experts, by, contexts in (
        ("128", "vllm", LONG), ("16", "vllm", LONG), ("16", "auto", LONG), ("8", "vllm", LONG),
        ("32", "vllm", SHORT), ("uneven", "vllm", SHORT), ("64", "vllm", SHORT),
        ("8", "auto", SHORT), ("32", "auto", SHORT), ("uneven", "auto", SHORT),
    ):  # fmt: skip
        sizes = ("--contexts", *contexts, "--output-tokens", "64", "--rounds", "3")
        found.append(
            Stage(f"engine {experts} {by}", (*engine, "--experts", experts, "--kernels", by, *sizes), 100, tuned)
        )
    for model in ("Qwen3-235B-A22B", "Llama-4-Maverick"):
        layers = sparse.with_name(f"{sparse.name}-{model}")
        write = (python, str(HERE / "bench_engine_gpu.py"), "--sparse", str(layers), "--model", model)
        found += [
            Stage(f"a checkpoint of {model}'s layers", write, 30, makes=layers / "config.json"),
            tuning(f"tune {model}", layers, SMALL_GRID),
            Stage(f"kernel {model}", (*kernel, "--models", model, "--tokens", *SMALL_GRID), 60, ours),
        ]
    return found


def rehearsal(out: Path) -> list[Stage]:
    """The same commands on a CPU: tests are collected only, kernels interpreted, sizes tiny."""
    python, sparse = sys.executable, out / "sparse"
    cpu = {"CUDA_VISIBLE_DEVICES": ""}
    interpreted = {**cpu, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    engine = (python, str(HERE / "bench_engine_gpu.py"), "--smoke")
    return [
        Stage("kernels are right", (python, "-m", "pytest", "-q", "--collect-only", "-m", "gpu", *CORRECT), 0, cpu),
        Stage("a checkpoint of every |I|", (*engine, "--sparse", str(sparse)), 0, cpu),
        Stage("a checkpoint of a model's layers", (python, str(HERE / "bench_engine_gpu.py"), "--model", "Llama-4-Maverick",
                                                   "--sparse", str(out / "layers")), 0, cpu),
        Stage("tune", (python, "-m", "leap_serve.cli", "tune-kernels", str(sparse), "-o", str(out / "kernels"),
                       "--tokens", "1", "--dtype", "float32"), 0, interpreted),
        Stage("kernel", (python, str(HERE / "bench_kernel.py"), "--smoke", "--resume",
                         "--out", str(out / "kernel.jsonl")), 0, cpu),
        Stage("engine", (*engine, "--resume", "--experts", "8", "--batches", "1",
                         "--out", str(out / "engine_gpu.jsonl")), 0, cpu),
    ]  # fmt: skip


def run(plan: Sequence[Stage], out: Path, minutes: float, retry: bool) -> bool:
    """Run what is not done yet for so many minutes; returns whether nothing is left and nothing failed."""
    deadline, state_file = time.monotonic() + 60 * minutes, out / LOGS / "stages.json"
    state = read_json(state_file) if state_file.exists() else {}
    for stage in plan:
        before = state.get(stage.name, {})
        done = before.get("done") and (stage.makes is None or stage.makes.exists())
        if done or (before.get("status") and not retry):
            continue
        left = deadline - time.monotonic()
        if left <= stage.least_s:
            print(f"-- {stage.name}: {left:.0f} s are left, it may need {stage.least_s}", flush=True)
            continue
        status, took = one(stage, out, left)
        state[stage.name] = {"done": status == 0, "status": status, "seconds": round(took + before.get("seconds", 0))}
        write_json(state_file, state)
    return report(plan, state, out)


def one(stage: Stage, out: Path, limit_s: float) -> tuple[int | None, float]:
    """Run one stage; returns its exit status, None where time ended it, and its seconds. What it says is logged, too."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1", **stage.env}
    began = time.monotonic()
    print(f"== {stage.name}", flush=True)
    with log_of(stage, out).open("ab") as log:
        process = subprocess.Popen(
            stage.command, cwd=HERE.parent, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit_s)
        except BaseException as stopped:
            # Engines and test runs have children of their own; all of them hold the GPU.
            os.killpg(process.pid, 9)
            process.wait()
            if not isinstance(stopped, subprocess.TimeoutExpired):
                raise
            status = None
    took = time.monotonic() - began
    print(log_of(stage, out).read_text(errors="replace")[-2500:], flush=True)
    print(f"== {stage.name}: {'out of time' if status is None else f'status {status}'} after {took:.0f} s", flush=True)
    return status, took


def log_of(stage: Stage, out: Path) -> Path:
    return out / LOGS / f"{stage.name.replace(' ', '_').replace('|', '')}.log"


def report(plan: Sequence[Stage], state: Mapping[str, Mapping[str, object]], out: Path) -> bool:
    failed = [stage for stage in plan if state.get(stage.name, {}).get("status")]
    left = [stage.name for stage in plan if not state.get(stage.name, {}).get("done") and stage not in failed]
    for stage in failed:
        print(f"failed: {stage.name}, see {log_of(stage, out)}; --retry runs it again", flush=True)
    print(f"left: {', '.join(left)}; run the same command again" if left else f"all stages were run; {out}", flush=True)
    return not failed and not left


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0, help="time that this call may take (default 60)")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("RESULTS") or HERE / "results"))
    parser.add_argument("--retry", action="store_true", help="run stages again that failed")
    parser.add_argument("--smoke", action="store_true", help="rehearse on a CPU")
    args = parser.parse_args()
    if args.smoke and args.out == HERE / "results":
        parser.error("--smoke needs --out: its rows do not belong among the results")
    if not args.smoke:
        import torch

        if not torch.cuda.is_available():
            parser.error("no CUDA GPU here: run it on one, or rehearse with --smoke --out DIR")
    out = args.out.resolve()
    (out / LOGS).mkdir(parents=True, exist_ok=True)
    print(json.dumps({"out": str(out), "smoke": args.smoke, "minutes": args.minutes}), flush=True)
    return 0 if run(rehearsal(out) if args.smoke else stages(out), out, args.minutes, args.retry) else 1


if __name__ == "__main__":
    raise SystemExit(main())
