"""How much memory methods take beside the model: peak resident set of `leap search` on a random model of 1 GiB and more.

    python bench/bench_memory.py                  # every method that runs the MoE layers itself, and what it needs
    python bench/bench_memory.py --items 64 --methods naee hc-smoe

Layer-wise methods run one MoE layer at a time: inputs of all layers lie on disk, and what is in memory beside the model is
one layer's. Each command runs in a process of its own; the kernel says what that process held at most (ru_maxrss; a child
inherits its parent's, so the model is made in another process). The first row, «load», only imports transformers and loads
the same model in the same dtype, and says as well what it holds once that is done: what a method holds while it works shows
only beyond loading's own peak. One row per method in bench/results/memory.jsonl; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import say, table
from leap_serve.files import append_jsonl, read_jsonl

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from bench_batch import make_model

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
TASK = "toy-gsm"
FROM_PROFILE = ("moe-pruner", "intra")
METHODS = ("load", "magnitude", "lexi", "naee", "naee-progressive", "hc-smoe", "moe-i2", "profile", *FROM_PROFILE)
LOAD = """
import re, sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
print("resident", re.search(r"VmRSS:\\s+(\\d+)", open("/proc/self/status").read())[1])
"""


def commands(method: str, model: Path, home: Path, args: argparse.Namespace) -> list[str]:
    """What a method's process runs."""
    if method == "load":
        return [sys.executable, "-c", LOAD, str(model)]
    leap = [sys.executable, "-m", "leap_serve.cli"]
    if method == "profile":
        return [*leap, "profile", str(model), "--task", TASK, "--limit", str(args.items), "--engine", "torch", "--dtype",
                "float32", "--channels", "-o", str(home / "profile")]  # fmt: skip
    source = home / "profile" if method in FROM_PROFILE else model
    flags = ["--items", str(args.items), "--task", TASK, "--dtype", "float32", "--model", str(model)]
    if method == "lexi":
        flags += ["--draws", "2"]
    return [
        *leap,
        "search",
        str(source),
        "--method",
        method,
        "--budget",
        "0.5",
        *flags,
        "-o",
        str(home / f"{method}.json"),
    ]


def peak(command: Sequence[str]) -> tuple[int, float, str]:
    """Run a command; the bytes that it held at most, its seconds, and what it printed."""
    began = time.monotonic()
    with tempfile.TemporaryFile() as log:
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=[
            (os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)
        ])  # fmt: skip
        _, status, used = os.wait4(pid, 0)
        log.seek(0)
        printed = log.read().decode(errors="replace")
        if status:
            raise SystemExit(f"{' '.join(command)}: status {status}\n{printed[-2000:]}")
    return used.ru_maxrss * 1024, time.monotonic() - began, printed


def made(folder: Path, args: argparse.Namespace) -> Path:
    """The random model, with leap-tiny's tokenizer; made by a process of its own."""
    maker = get_context("spawn").Process(target=make, args=(folder, args))
    maker.start()
    maker.join()
    if maker.exitcode:
        raise SystemExit(f"the model was not made: exit status {maker.exitcode}")
    return folder


def make(folder: Path, args: argparse.Namespace) -> None:
    """Write the model."""
    model = make_model(folder, args.hidden, args.intermediate, args.experts, args.layers, dtype="float32")
    for file in resolve_model("leap-tiny").glob("tokenizer*"):
        shutil.copy(file, model)


def measure(args: argparse.Namespace, missing: Sequence[str]) -> None:
    """Run the methods that have no row."""
    with tempfile.TemporaryDirectory(dir=args.work) as home:
        model = made(Path(home) / "model", args)
        size = Checkpoint.open(model).weight_bytes
        if any(method in FROM_PROFILE for method in missing) and "profile" not in missing:
            peak(commands("profile", model, Path(home), args))
        for method in missing:
            held, seconds, printed = peak(commands(method, model, Path(home), args))
            row = {"bench": "memory", "method": method, "peak_bytes": held, "model_bytes": size, "seconds": round(seconds, 1),
                   "items": args.items, "layers": args.layers, "experts": args.experts, "hidden": args.hidden,
                   "intermediate": args.intermediate, "dtype": "float32"}  # fmt: skip
            if method == "load":
                row["resident_bytes"] = 1024 * int(printed.split("resident ")[1])
            append_jsonl(args.results, stamped(row))
            say(f"{method}: {held / 2**30:.2f} GiB at most, model {size / 2**30:.2f} GiB, {seconds:.0f} s")


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """A line per method."""
    loaded = {row["model_bytes"]: row["peak_bytes"] for row in rows if row["method"] == "load"}
    table(
        "peak resident set, GiB",
        ["method", "items", "model", "peak", "beside loading it", "s"],
        [[row["method"], row["items"], f"{row['model_bytes'] / 2**30:.2f}", f"{row['peak_bytes'] / 2**30:.2f}",
          f"{(row['peak_bytes'] - loaded[row['model_bytes']]) / 2**30:.2f}" if row["model_bytes"] in loaded else "–",
          f"{row['seconds']:.0f}"] for row in rows],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=384)
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--items", type=int, default=8, help="calibration items")
    parser.add_argument("--smoke", action="store_true", help="a model of a few MiB, for a test")
    parser.add_argument("--work", type=Path, help="folder for the model (default: the system's temporary one)")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.smoke:
        args.hidden, args.intermediate, args.experts, args.layers, args.items = 64, 32, 8, 2, 2
    key = ("method", "items", "layers", "experts", "hidden", "intermediate")
    done = {tuple(row[name] for name in key) for row in read_jsonl(args.results)}
    shape = (args.items, args.layers, args.experts, args.hidden, args.intermediate)
    if missing := [method for method in args.methods if (method, *shape) not in done]:
        measure(args, missing)
    summarise(read_jsonl(args.results))


if __name__ == "__main__":
    main()
