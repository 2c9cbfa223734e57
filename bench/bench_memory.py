"""How much memory methods take beside the model: peak resident set of `leap search` on a random model of 1 GiB and more.

    python bench/bench_memory.py                  # every method that runs the MoE layers itself, and what it needs
    python bench/bench_memory.py --items 64 --methods naee hc-smoe

Layer-wise methods run one MoE layer at a time: inputs of all layers lie on disk, and what is in memory beside the model is
one layer's. The model is deep and its layers wide, so that the inputs of all layers together, which each row states, would
show if they were held. Each command runs in a process of its own. What it holds is its anonymous memory (RssAnon), asked for
50 times a second: pages of mapped files, the checkpoint's and the inputs', are the kernel's to take back. The first row,
«load», only imports transformers, loads the same model in the same dtype, and says what it holds once that is done; rows
state besides what the kernel counted at most, file pages and all (ru_maxrss; a child inherits its parent's, so the model is
made in another process). One row per method in bench/results/memory.jsonl; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import os
import re
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
from leap_serve.encoding import encode_items
from leap_serve.files import append_jsonl, read_jsonl
from leap_serve.search_flags import reads
from leap_serve.tasks.registry import load_task

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from bench_batch import make_model

RESULTS = Path(__file__).parent / "results" / "memory.jsonl"
TASK = "toy-gsm"
FROM_PROFILE = ("moe-pruner", "intra")
METHODS = ("load", "magnitude", "lexi", "naee", "naee-progressive", "hc-smoe", "moe-i2", "profile", *FROM_PROFILE)
LOAD = """
import re, sys, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32")
print("anonymous", re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1])
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
    given = {"task": TASK, "model": str(model), "items": str(args.items), "dtype": "float32", "draws": "2"}
    flags = [word for flag, value in given.items() if reads(method, flag) for word in (f"--{flag}", value)]
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


def peak(command: Sequence[str]) -> tuple[int, int, float, str]:
    """Run a command; the bytes that it had resident at most, those of them anonymous, its seconds, and what it printed."""
    began, held, ended = time.monotonic(), 0, 0
    with tempfile.TemporaryFile() as log:
        pid = os.posix_spawn(command[0], command, os.environ, file_actions=[
            (os.POSIX_SPAWN_DUP2, log.fileno(), 1), (os.POSIX_SPAWN_DUP2, log.fileno(), 2)
        ])  # fmt: skip
        while not ended:
            time.sleep(0.02)
            held = max(held, anonymous(pid))
            ended, status, used = os.wait4(pid, os.WNOHANG)
        log.seek(0)
        printed = log.read().decode(errors="replace")
        if status:
            raise SystemExit(f"{' '.join(command)}: status {status}\n{printed[-2000:]}")
    return used.ru_maxrss * 1024, held, time.monotonic() - began, printed


def anonymous(pid: int) -> int:
    """Bytes of anonymous memory that a child has now; 0 once it has ended."""
    found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    return 1024 * int(found[1]) if found else 0


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
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory(dir=args.work) as home:
        tokenizer = AutoTokenizer.from_pretrained(resolve_model("leap-tiny"))
        coded = encode_items(tokenizer, load_task(TASK).items("train", args.items))
        tokens = sum(len(one.prompt) + len(one.answer) for one in coded)
        model = made(Path(home) / "model", args)
        size = Checkpoint.open(model).weight_bytes
        if any(method in FROM_PROFILE for method in missing) and "profile" not in missing:
            peak(commands("profile", model, Path(home), args))
        for method in missing:
            most, held, seconds, printed = peak(commands(method, model, Path(home), args))
            if method == "load":
                held = 1024 * int(printed.split("anonymous ")[1])
            row = {"bench": "memory", "method": method, "anonymous_bytes": held, "peak_bytes": most, "model_bytes": size,
                   "tokens": tokens, "inputs_bytes": 4 * tokens * args.hidden * args.layers, "seconds": round(seconds, 1),
                   "items": args.items, "layers": args.layers, "experts": args.experts, "hidden": args.hidden,
                   "intermediate": args.intermediate, "dtype": "float32"}  # fmt: skip
            append_jsonl(args.results, stamped(row))
            say(f"{method}: {held / 2**30:.2f} GiB, model {size / 2**30:.2f} GiB, {seconds:.0f} s")


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """A line per method."""
    loaded = {row["model_bytes"]: row["anonymous_bytes"] for row in rows if row["method"] == "load"}
    table(
        "anonymous memory at most, GiB",
        ["method", "items", "model", "inputs of all layers", "held", "beyond the loaded model", "s"],
        [[row["method"], row["items"], gib(row["model_bytes"]), gib(row["inputs_bytes"]), gib(row["anonymous_bytes"]),
          gib(row["anonymous_bytes"] - loaded[row["model_bytes"]]) if row["model_bytes"] in loaded else "–",
          f"{row['seconds']:.0f}"] for row in rows],
    )  # fmt: skip


def gib(number: float) -> str:
    return f"{number / 2**30:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--intermediate", type=int, default=192)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--layers", type=int, default=64)
    parser.add_argument("--items", type=int, default=64, help="calibration items")
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
