"""Every method of `leap search` on one footing: the same budget, tasks, test items and, where it is asked for, tuning.

    python bench/bench_methods.py                              # plans as they were found, three tasks, 8 of 64
    python bench/bench_methods.py --tuning                     # and after the same short tuning, which rows name
    python bench/bench_methods.py --model bench/models/llama4-tiny --tuning --methods full-model reap leap --experts 32 16 8 4

Each plan is made by `leap search --method` itself, run in this process with its default settings; profiles of 256
training items by `leap profile`, with --channels where the model has them. It is cut, and the cut scored on test items in the engine that serves.
Tuning is leap_training.finetune's, 400 steps on 1,000 items, the same for all; tsep tunes while it prunes, and the
model that it leaves is a row of its own. Merged, uneven and narrowed cuts are tuned as they are. Methods with a form of their own take the nearest to the budget: intra keeps
that share of every expert's channels, lexi halves the active experts; shares of FLOPs and weights stand in each row.
A method that refuses a model leaves a row with its reason. One row per (model, task, experts, method, seed, tuning) in
bench/results/methods.jsonl; a row that is there, or whose twin is in search_methods.jsonl, lookahead.jsonl or
tune.jsonl, is not made again (those of methods that draw nothing are: a single row needs the interval over its items). --work keeps plans and the state of searches, so that a bench that was killed goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.channel_sums import check_channels
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli import main as leap
from leap_serve.cli.console import say, table
from leap_serve.cut.write import cut
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.errors import LeapError
from leap_serve.evaluation.evaluate import evaluate
from leap_serve.files import append_jsonl, read_json, read_jsonl, write_json
from leap_serve.flops import parameters
from leap_serve.plan import LayerPlan, Plan
from leap_serve.search_flags import reads
from leap_serve.tasks.registry import load_task
from leap_training.finetune import FinetuneConfig, finetune

RESULTS = Path(__file__).parent / "results" / "methods.jsonl"
TASKS = ("toy-gsm", "toy-code", "toy-xsum")
ONE_SHOT = ("frequency", "gate-mass", "ean", "ean-mean", "ean-weighted", "reap", "magnitude")
FULL, OWN = "full-model", "its own"
TWIN = ("model", "task", "experts", "method", "seed")
DATA_FREE = ("magnitude", "random")
UNSEEDED = (FULL, *ONE_SHOT, "easy-ep", "moe-pruner", "intra")
"""Methods whose plan does not depend on the seed; the seed of their one row is 0."""
RESUMED = ("naee", "naee-progressive", "moe-i2", "hc-smoe", "lexi", "leap", "tsep", "eep", "rco")
"""Methods that keep a state while they search."""
METHODS = (
    FULL, *ONE_SHOT, "random", "easy-ep", "moe-pruner", "naee", "naee-progressive", "moe-i2", "hc-smoe", "intra", "lexi",
    "leap", "tsep", "eep", "random-search", "greedy", "evolution", "rco",
)  # fmt: skip
"""Cheap ones first."""


@dataclass(frozen=True, slots=True)
class Cell:
    """What a row is of. ``tuning``: "none", a short description of finetune's, or "its own" of tsep."""

    model: str
    task: str
    experts: int
    method: str
    seed: int
    tuning: str

    @classmethod
    def of(cls, row: dict[str, Any]) -> Cell:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


@dataclass(frozen=True, slots=True)
class Size:
    """What every cell takes. ``search``: flags of leap search, given to the methods that read them."""

    profiled: int = 256
    tests: int = 256
    tuning: FinetuneConfig = field(default_factory=FinetuneConfig)
    search: Mapping[str, int] = field(default_factory=dict)
    tsep: tuple[str, ...] = ()

    @property
    def tuned(self) -> str:
        return f"{self.tuning.steps} steps, {self.tuning.items:,} items"


SMOKE = Size(
    4, 4, FinetuneConfig(items=8, steps=2, batch=4), {"items": 2, "episodes": 32},
    ("--steps", "2", "--train-items", "8"),
)  # fmt: skip


def planned(args: argparse.Namespace, size: Size) -> list[Cell]:
    """The cells that the flags ask for: seeds outermost, untuned before tuned, so that an interrupted bench has whole columns."""
    cells = []
    for seed, tuned, method, experts, task in itertools.product(
        args.seeds, (False, True) if args.tuning else (False,), args.methods, args.experts, args.task
    ):
        cell = Cell(args.model, task, experts, method, 0 if method in UNSEEDED and not tuned else seed, "none")
        if method == FULL:
            cells += [] if tuned else [replace(cell, experts=Checkpoint.open(resolve_model(args.model)).num_experts)]
        elif not tuned:
            cells += [cell, *([replace(cell, tuning=OWN)] if method == "tsep" else [])]
        else:
            cells.append(replace(cell, tuning=size.tuned))
    return list(dict.fromkeys(cells))


def known(results: Path, size: Size) -> set[Cell]:
    """Cells that need no run: rows that are there, and their twins in the rows of other benches."""
    done = {Cell.of(row) for row in read_jsonl(results)}
    for row in read_jsonl(results.parent / "search_methods.jsonl"):
        if at_one_count(row) and row["method"] not in UNSEEDED:
            done.add(Cell(row["model"], row["task"], row["experts"], row["method"], row["seed"], "none"))
    for row in read_jsonl(results.parent / "lookahead.jsonl"):
        done.add(Cell(row["model"], row["task"], row["experts"], row["method"], row["seed"], size.tuned))
    for row in read_jsonl(results.parent / "tune.jsonl"):
        if row["method"] == FULL:
            done.add(Cell(row["model"], row["task"], row["experts"], FULL, row["seed"], "none"))
    return done


def at_one_count(row: Mapping[str, Any]) -> bool:
    """Whether a row of search_methods.jsonl is what a search by itself gives: equal counts, from a cold start."""
    return row["allocation"] == "uniform" and not row["warm"]


class Bench:
    """A model, and where its profiles and plans are kept."""

    def __init__(self, model: str, size: Size, work: Path, results: Path) -> None:
        self.size, self.model = size, model
        self.searched = [row for row in read_jsonl(results.parent / "search_methods.jsonl") if at_one_count(row)]
        self.folder = resolve_model(model)
        self.source = Checkpoint.open(self.folder)
        # By content: a model that is trained again has profiles and plans of its own.
        self.work = work / self.source.identity().sha256[:12]

    def measure(self, cell: Cell) -> dict[str, Any]:
        """One cell's figures, or why there are none."""
        row: dict[str, Any] = {"bench": "methods", **asdict(cell), "test_items": self.size.tests}
        if cell.method == FULL:
            return row | self.score(self.folder, cell.task) | {"flops_share": 1.0, "weights_share": 1.0}
        with tempfile.TemporaryDirectory() as work:
            try:
                plan, cost = self.plan(cell)
                row |= self.facts(plan) | cost
                folder = self.cut(cell, plan, Path(work))
            except LeapError as error:
                return row | {"refused": f"{error.what}; {error.remedy}"}
            return row | self.score(folder, cell.task)

    def facts(self, plan: Plan) -> dict[str, Any]:
        """What a plan is and what it leaves of the model, from headers."""
        own, full = parameters(self.source, plan), parameters(self.source)
        return {
            "plan": plan.fingerprint, "retained": plan.counts, "notices": list(plan.made_by.get("notices", [])),
            "named": plan.made_by.get("method"), "flops_share": own.matmul / full.matmul,
            "weights_share": own.total / full.total,
        }  # fmt: skip

    def plan(self, cell: Cell) -> tuple[Plan, dict[str, Any]]:
        """A cell's plan, found once, and its seconds by the clock and of this process's cores; of the last run if resumed."""
        if (twin := self.twin(cell)) is not None:
            return twin
        home = self.home(cell)
        if not (home / "cost.json").exists():
            source = self.folder if cell.method in DATA_FREE else self.profile(cell.task)
            state = ("--state", home / "state") if cell.method in RESUMED else ()
            resumed, began, used = (home / "state").exists(), time.monotonic(), time.process_time()
            run("search", source, *self.flags(cell), *state, "--force", "-o", home / "plan.json")
            cost = {"plan_seconds": time.monotonic() - began, "plan_core_seconds": time.process_time() - used}
            write_json(
                home / "cost.json", {name: round(seconds, 1) for name, seconds in cost.items()} | {"resumed": resumed}
            )
        return Plan.load(home / "plan.json"), read_json(home / "cost.json")

    def twin(self, cell: Cell) -> tuple[Plan, dict[str, Any]] | None:
        """The plan that search_methods.py scored under the same names: a tuned row is then of the plan that its untuned twin is of."""
        seed = 0 if cell.method in UNSEEDED else cell.seed
        for row in self.searched:
            if (self.model, cell.task, cell.experts, cell.method, seed) == tuple(row[name] for name in TWIN):
                layers = {
                    index: LayerPlan(tuple(ids), min(self.source.top_k, len(ids)))
                    for index, ids in zip(self.source.moe_layers, row["retained"], strict=True)
                }
                plan = Plan(self.source.identity(), self.source.num_experts, layers)
                # Of a model that was trained again since, or at another temperature, it is another plan.
                if plan.fingerprint == row["fingerprint"]:
                    return plan, {"plan_of": "search_methods.jsonl"}
        return None

    def home(self, cell: Cell) -> Path:
        seed = 0 if cell.method in UNSEEDED else cell.seed
        return self.work / f"{cell.task}-{cell.experts}-{cell.method}-{seed}"

    def profile(self, task: str) -> Path:
        """A task's profile, the same for all methods; with sums of channels where the model's form has them."""
        out = self.work / f"profile-{task}"
        if not out.exists():
            try:
                check_channels(self.source)
                channels = ("--channels",)
            except LeapError:
                channels = ()
            run("profile", self.folder, "--task", task, "--limit", self.size.profiled, "--dtype", "float32", *channels, "-o", out)  # fmt: skip
        return out

    def flags(self, cell: Cell) -> list[Any]:
        """Flags of leap search."""
        budget: tuple[Any, ...] = ("--experts", cell.experts)
        if cell.method == "intra":
            budget = ("--budget", cell.experts / self.source.num_experts)
        elif cell.method == "lexi":
            budget = ("--budget", 0.5)
        flags = ["--method", cell.method, *budget, "--seed", cell.seed]
        if cell.method == "tsep":
            flags += ["--tuned", self.home(cell) / "tuned", *self.size.tsep]
        wanted = {"task": cell.task, "model": self.folder, **self.size.search}
        given = {flag: value for flag, value in wanted.items() if reads(cell.method, flag)}
        return [*flags, *(word for flag, value in given.items() for word in (f"--{flag}", value))]

    def cut(self, cell: Cell, plan: Plan, work: Path) -> Path:
        """The checkpoint that a row scores."""
        if cell.tuning == OWN:
            return self.home(cell) / "tuned"
        cut(self.folder, plan, work / "cut")
        if cell.tuning == "none":
            return work / "cut"
        finetune(work / "cut", cell.task, work / "tuned", replace(self.size.tuning, seed=cell.seed))
        return work / "tuned"

    def score(self, folder: Path, name: str) -> dict[str, Any]:
        """Score and loss on test items, in the engine that serves."""
        engine = VllmEngine(folder, dtype="float32", kv_cache_gib=0.25)
        try:
            task = load_task(name)
            found = evaluate(engine, task, task.items("test", self.size.tests))
            spread = found.interval
            return {
                "score": found.score, "loss": found.loss, "metric": found.metric,
                "interval": [spread.low, spread.high],
            }  # fmt: skip
        finally:
            engine.close()


def run(*argv: object) -> None:
    """Run `leap …` in this process; LeapError with the reason that it printed where it refuses."""
    printed = io.StringIO()
    with quiet(printed):
        status = leap([str(one) for one in argv])
    if status == 130:
        raise KeyboardInterrupt
    if status:
        raise LeapError(f"leap {argv[0]}", printed.getvalue().strip().splitlines()[-1], f"exit status {status}")


@contextlib.contextmanager
def quiet(errors: io.StringIO) -> Iterator[None]:
    """Keep a command's tables to itself, and what it says of errors in ``errors``."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
        yield


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """A line per method, budget and tuning."""
    lines: dict[tuple[Any, ...], dict[str, list[str]]] = {}
    for row in rows:
        cells = lines.setdefault((row["method"], row["model"], row["experts"], row["tuning"]), {})
        cells.setdefault(row["task"], []).append("refused" if "refused" in row else f"{100 * row['score']:.1f}")
    table(
        "score on test items, %, of every seed",
        ["method", "model", "experts", "tuning", *TASKS],
        [[*key, *(" ".join(found.get(task, ["–"])) for task in TASKS)] for key, found in lines.items()],
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="leap-tiny")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--experts", type=int, nargs="+", default=[8])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--tuning", action="store_true", help="tuned cuts, too")
    parser.add_argument("--smoke", action="store_true", help="small enough for a test")
    parser.add_argument("--work", type=Path, default=Path("runs/methods"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    size = SMOKE if args.smoke else Size()
    bench, done = Bench(args.model, size, args.work, args.results), known(args.results, size)
    missing = [cell for cell in planned(args, size) if cell not in done]
    for number, cell in enumerate(missing, 1):
        row = bench.measure(cell)
        append_jsonl(args.results, stamped(row))
        found = row.get("refused") or f"{100 * row['score']:.1f} %, loss {row['loss']:.3f}"
        what = f"{cell.task} {cell.experts} {cell.method} seed {cell.seed}, tuning {cell.tuning}"
        say(f"{number}/{len(missing)} {what}: {found}")
        sys.stdout.flush()
    summarise(read_jsonl(args.results))


if __name__ == "__main__":
    main()
