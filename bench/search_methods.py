"""Which search finds the better experts: held-out loss and task score against the number of plan evaluations.

    python bench/search_methods.py                          # every method, three tasks, 8 and 16 of 64, three seeds
    python bench/search_methods.py --method evolution --experts 8 --task toy-gsm --seeds 1
    python bench/search_methods.py --meta                   # the agent warm from two other tasks, and from 16 of 64
    python bench/search_methods.py --allocation             # global against uniform at the same total
    python bench/search_methods.py --summary                # only the tables, from the rows that are there

All in one vLLM engine (leap-tiny whole, float32), one search after the other, each with a ledger of its own. Every
search starts from the profile of 256 training items and scores plans on the same 32 validation items; a seed decides
what the method draws. Finding the best of the six observed rankings, which all but random-search start at, costs six
of the evaluations. Losses called held-out and scores are of 128 test items, which nothing is chosen by: the best plan so far after 25, 50, … evaluations. rco
spends its evaluations on training passes (8 items forward: a quarter of an evaluation; backward passes come on top). The «loss» that
evo-counts-esp searches by is 1 − ESP.
One row per (task, experts, allocation, method, seed, warm) in bench/results/search_methods.jsonl; a row that is
there is not measured again. Intervals are 95 % t-intervals of the mean over seeds.
"""

from __future__ import annotations

import argparse
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli.console import say, table
from leap_serve.engine import mean_loss
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.evaluation.evaluate import evaluate
from leap_serve.files import append_jsonl, read_jsonl
from leap_serve.profile import Profile
from leap_serve.statistics import mean_of_few
from leap_serve.tasks.registry import load_task
from leap_training.controls import SEARCHES, Given, Material, esp_evaluator
from leap_training.pruning_agent import AgentConfig, best_ranking, search
from leap_training.pruning_space import Ledger, PruningSpace, engine_evaluator
from leap_training.saliency import OBSERVED, Routing, Scores, scores

RESULTS = Path(__file__).parent / "results" / "search_methods.jsonl"
POLICIES = Path("runs/search-methods")
TASKS = ("toy-gsm", "toy-code", "toy-xsum")
ONE_SHOT = (*OBSERVED, "magnitude")
METHODS = (*ONE_SHOT, *SEARCHES, "evo-counts-esp", "leap")
COUNTED = ("evo-counts", "evo-counts-esp")
"""Methods that choose how many experts each layer keeps, and are run at the same total."""
SOURCE = 16
"""Experts a layer keeps where the policy comes from that --meta carries to another budget."""
POINTS = (25, 50, 100, 166, 250, 500)
SCORED = (50, 166)
"""Where the task score is taken as well; at the end it always is."""
PROFILED = 256


@dataclass(frozen=True, slots=True)
class Run:
    """What a row is of. ``warm``: "" for a cold start, "tasks" from the two others, "budget" from 16 of 64."""

    task: str
    experts: int
    allocation: str
    method: str
    seed: int
    evaluations: int
    items: int
    held_out: int
    warm: str = ""

    @classmethod
    def of(cls, row: dict[str, Any]) -> Run:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


def planned(args: argparse.Namespace) -> list[Run]:
    """The runs that the flags ask for, seeds outermost, so that an interrupted bench has whole comparisons."""
    runs: list[Run] = []
    plain = args.method or not (args.meta or args.allocation)
    for seed, experts, task in itertools.product(range(args.seeds), args.experts, args.task):
        at = Run(task, experts, "uniform", "leap", seed, args.evaluations, args.items, args.held_out)
        for method in (args.method or METHODS) if plain else ():
            if method not in ONE_SHOT:
                runs.append(replace(at, method=method, allocation="global" if method in COUNTED else "uniform"))
            elif seed == 0:
                runs.append(replace(at, method=method, evaluations=0))
        if args.meta:
            runs += [at, replace(at, warm="tasks"), *([replace(at, warm="budget")] if experts != SOURCE else [])]
        if args.allocation:
            runs += [replace(at, method=m, allocation=a) for m in ("leap", "evolution") for a in ("uniform", "global")]
    return list(dict.fromkeys(runs))


class Bench:
    """The engine, and of each task the profile and the items."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.engine = VllmEngine(args.model, dtype="float32", kv_cache_gib=0.5)
        self.profiles: dict[str, Profile] = {}

    def profile(self, task: str) -> Profile:
        """The task's profile, the same for all methods."""
        if task not in self.profiles:
            items = load_task(task).items("train", self.args.profiled)
            self.profiles[task] = self.engine.profile(items)
        return self.profiles[task]

    def ledger(self, run: Run) -> tuple[Ledger, Material]:
        """A ledger that knows nothing yet, and what it evaluates on."""
        space = PruningSpace.of(
            Routing.of(self.profile(run.task)), experts=run.experts, allocation=run.allocation
        )  # fmt: skip
        items = load_task(run.task).items("validation", run.items)
        judged = esp_evaluator if run.method == "evo-counts-esp" else engine_evaluator
        return Ledger(judged(self.engine, items), space), Material(self.engine.checkpoint.folder, items)

    def measure(self, run: Run) -> dict[str, Any]:
        """Search, then look at test items."""
        ledger, material = self.ledger(run)
        more: dict[str, Any] = {}
        marks: Sequence[float] = ()
        began = time.perf_counter()
        if run.method in ONE_SHOT:
            ledger([ledger.space.best_of(self.one_shot(run))])
        elif run.method == "leap":
            more["prior"] = self.agent(run, ledger)
        else:
            prior: Scores = {}
            if run.method != "random-search":
                more["prior"], prior = best_ranking(self.profile(run.task), ledger)
            cost = SEARCHES[run.method.removesuffix("-esp")](
                ledger, Given(prior, run.evaluations, run.seed, material=material)
            )
            if cost is not None:
                marks = cost.marks
                more |= {"forward_items": cost.forward_items, "backward_items": cost.backward_items}
        more["search_seconds"] = time.perf_counter() - began
        return {**asdict(run), **more, **self.held_out(run, ledger, marks)}

    def one_shot(self, run: Run) -> Scores:
        """Saliency of a one-shot criterion."""
        if run.method == "magnitude":
            return scores(Checkpoint.open(self.engine.checkpoint.folder), "magnitude")
        return scores(self.profile(run.task), run.method)

    def agent(self, run: Run, ledger: Ledger) -> str:
        """Run the agent and leave its policy; returns the ranking it started at."""
        profile = self.profile(run.task)
        name, prior = best_ranking(profile, ledger)
        config = AgentConfig(episodes=run.evaluations, seed=run.seed)
        warm = self.teacher(run)
        search(profile, prior, ledger, config, warm=warm, save_policy=self.policy(run))
        return name

    def policy(self, run: Run, chain: str = "") -> Path:
        """Where the policy of a run is kept."""
        name = f"{run.task}-{run.experts}-{run.allocation}-{run.evaluations}-{run.items}-{run.seed}{run.warm}{chain}"
        return self.args.policies / f"{name}.safetensors"

    def teacher(self, run: Run) -> Path | None:
        """The policy that a run starts with; trained now where it is not there."""
        if not run.warm:
            return None
        if run.warm == "budget":
            return self.trained(replace(run, experts=SOURCE, warm=""), None)
        first, second = (replace(run, task=task, warm="") for task in TASKS if task != run.task)
        return self.trained(second, self.trained(first, None), chain=f"-after-{first.task}")

    def trained(self, run: Run, warm: Path | None, chain: str = "") -> Path:
        """The policy of a search of its own."""
        path = self.policy(run, chain)
        if not path.exists():
            ledger, _ = self.ledger(run)
            profile = self.profile(run.task)
            prior = best_ranking(profile, ledger)[1]
            config = AgentConfig(episodes=run.evaluations, seed=run.seed)
            search(profile, prior, ledger, config, warm=warm, save_policy=path)
        return path

    def held_out(self, run: Run, ledger: Ledger, marks: Sequence[float]) -> dict[str, Any]:
        """Losses and task scores of the best plans so far on test items; ``marks`` says what each plan counts as."""
        task = load_task(run.task)
        items = task.items("test", run.held_out)
        final, end = ledger.best()[0].tobytes(), max(run.evaluations, 1)
        at = {n: best_after(ledger, n, marks) for n in POINTS if n < run.evaluations} | {end: final}
        plans = {key: ledger.space.plan(ledger.subset(key)) for key in at.values() if key is not None}
        losses = dict(zip(plans, map(mean_loss, self.engine.score_plans(list(plans.values()), items)), strict=True))
        scores: dict[bytes, float] = {}
        for key in {at[n]: n for n in (*SCORED, end) if at.get(n) is not None}:
            assert key is not None
            self.engine.apply(plans[key])
            try:
                scores[key] = evaluate(self.engine, task, items).score
            finally:
                self.engine.restore()
        return {
            "points": {
                str(n): {"search_loss": ledger.losses[key], "held_out_loss": losses[key]}
                | ({"score": scores[key]} if key in scores else {})
                for n, key in at.items() if key is not None
            },
            "search_loss": ledger.losses[final], "held_out_loss": losses[final],
            "score": scores[final], "metric": task.metric, "plans_evaluated": ledger.evaluations,
            "improvements": [[round(n, 2), reward, loss] for n, reward, loss in ledger.improvements(marks)],
            "fingerprint": plans[final].fingerprint,
            "retained": [list(layer.retained) for layer in plans[final].layers.values()],
        }  # fmt: skip


def best_after(ledger: Ledger, evaluations: float, marks: Sequence[float]) -> bytes | None:
    """The key of the best plan that may be returned after so many evaluations; None where there is none yet."""
    known = sum((marks[place] if marks else place + 1) <= evaluations for place in range(ledger.evaluations))
    curve = ledger.curve[:known]
    found = bool(curve) and math.isfinite(curve[-1])
    return list(ledger.losses)[curve.index(curve[-1])] if found else None


def shown(values: Sequence[float], digits: int = 3) -> str:
    """Median, interval and number."""
    if not values:
        return "–"
    spread = mean_of_few(values)
    span = f" [{spread.low:.{digits}f}, {spread.high:.{digits}f}]" if spread.n > 1 else ""
    return f"{statistics.median(values):.{digits}f}{span}"


def name_of(run: Run) -> str:
    """A line's label."""
    return f"{run.method}{' from ' + run.warm if run.warm else ''}{' global' if run.allocation == 'global' else ''}"


def grouped(rows: Iterable[dict[str, Any]], key: Callable[[Run], Any]) -> dict[Any, list[dict[str, Any]]]:
    """Rows by a property of their runs, in order."""
    out: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        out.setdefault(key(Run.of(row)), []).append(row)
    return out


def summarise(rows: list[dict[str, Any]]) -> None:
    """Print the tables."""
    for (task, experts), here in sorted(grouped(rows, lambda run: (run.task, run.experts)).items()):
        by_method = grouped(here, name_of)
        points = sorted({int(n) for row in here for n in row["points"] if int(n) > 1})
        reap = statistics.median([row["held_out_loss"] for row in by_method.get("reap", [])] or [math.nan])
        lines = []
        for name, found in sorted(by_method.items(), key=lambda pair: statistics.median(held(pair[1]))):
            middle = [at(found, n, "search_loss") for n in points]
            lines.append([
                name, len(found), *(f"{statistics.median(x):.3f}" if x else "–" for x in middle), shown(held(found)),
                f"{statistics.median(held(found)) / reap:.2f}", shown([100 * row["score"] for row in found], 1),
                jaccard(found), spread(found),
                f"{statistics.median(row['search_seconds'] for row in found):.0f}",
            ])  # fmt: skip
        table(
            f"{task}, {experts} experts a layer: search loss by evaluations, and the final plan on test items",
            ["method", "seeds", *map(str, points), "held-out loss", "/ REAP", "score %", "Jaccard", "spread", "s"],
            lines,
        )
        table(
            f"{task}, {experts} experts a layer, on test items: loss, and score in %, of the best plan so far",
            ["method", *(f"loss at {n}" for n in points), *(f"score at {n}" for n in (*SCORED, points[-1]))],
            [
                [name, *(shown(at(found, n, "held_out_loss"), 2) for n in points),
                 *(shown([100 * x for x in at(found, n, "score")], 1) for n in (*SCORED, points[-1]))]
                for name, found in sorted(by_method.items()) if found[0]["method"] not in ONE_SHOT
            ],
        )  # fmt: skip
    thirds(rows)
    meta(rows)


def at(rows: Iterable[dict[str, Any]], n: int, what: str) -> list[float]:
    """A loss or score after n evaluations, of every row that has it."""
    return [row["points"][str(n)][what] for row in rows if what in row["points"].get(str(n), {})]


def held(rows: Iterable[dict[str, Any]]) -> list[float]:
    """Held-out losses of the final plans."""
    return [row["held_out_loss"] for row in rows]


def jaccard(rows: Sequence[dict[str, Any]]) -> str:
    """Mean overlap of two seeds' final plans: retained by both over retained by either, all layers together."""
    plans = [{(layer, e) for layer, ids in enumerate(row["retained"]) for e in ids} for row in rows]
    pairs = [len(a & b) / len(a | b) for a, b in itertools.combinations(plans, 2)]
    return f"{statistics.fmean(pairs):.2f}" if pairs else "–"


def spread(rows: Sequence[dict[str, Any]]) -> str:
    """Largest less smallest held-out loss over seeds."""
    return f"{max(held(rows)) - min(held(rows)):.3f}" if len(rows) > 1 else "–"


def thirds(rows: list[dict[str, Any]]) -> None:
    """Print the agent after a third of the evaluations less a control after all of them, seed by seed."""
    lines = []
    for (task, experts), here in sorted(grouped(rows, lambda run: (run.task, run.experts)).items()):
        by = {name: {row["seed"]: row for row in found} for name, found in grouped(here, name_of).items()}
        for control in ("evolution", "random-search", "greedy", "rco"):
            seeds = sorted(by.get("leap", {}).keys() & by.get(control, {}).keys())
            ours = [by["leap"][seed] for seed in seeds]
            theirs = [by[control][seed] for seed in seeds]
            cells = []
            for n, what in itertools.product((166, max(row["evaluations"] for row in ours) if ours else 0),
                                             ("search_loss", "held_out_loss")):  # fmt: skip
                pairs = zip(at(ours, n, what), (row[what] for row in theirs), strict=False)
                cells.append(shown([a - b for a, b in pairs]))
            if seeds:
                lines.append([task, experts, control, len(seeds), *cells])
    if lines:
        table(
            "The agent less a control that has spent everything (negative: the agent is better)",
            ["task", "experts", "control", "seeds", "at 166, search", "at 166, held out", "at the end, search",
             "at the end, held out"],
            lines,
        )  # fmt: skip


def meta(rows: list[dict[str, Any]]) -> None:
    """Print how many evaluations a warm agent needs to reach the cold one's final reward."""
    lines = []
    leap = [row for row in rows if row["method"] == "leap"]
    cold = {(r.task, r.experts, r.allocation, r.seed): row for row in leap if not (r := Run.of(row)).warm}
    for (task, experts, warm), found in sorted(grouped(leap, lambda r: (r.task, r.experts, r.warm)).items()):
        shares, never = [], 0
        for row in found if warm else []:
            base = cold.get((task, experts, row["allocation"], row["seed"]))
            if base is None:
                continue
            needed, goal, _ = base["improvements"][-1]
            reached = [n for n, reward, _ in row["improvements"] if reward >= goal]
            shares += [reached[0] / needed] if reached else []
            never += not reached
        if shares or never:
            lines.append([task, experts, warm, len(shares) + never, shown(shares, 2), never])
    if lines:
        table(
            "Evaluations a warm agent needs to reach the cold one's final reward, over those the cold one needed",
            ["task", "experts", "warm from", "seeds", "share", "never reached"],
            lines,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="leap-tiny")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all; may be repeated")
    parser.add_argument("--task", action="append", choices=TASKS, help="default: all; may be repeated")
    parser.add_argument("--experts", action="append", type=int, help="a layer keeps (default: 8 and 16)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--evaluations", type=int, default=500)
    parser.add_argument("--items", type=int, default=32, help="validation items per evaluation")
    parser.add_argument("--held-out", type=int, default=128, help="test items")
    parser.add_argument("--profiled", type=int, default=PROFILED, help="training items profiled")
    parser.add_argument("--meta", action="store_true", help="the agent cold, and warm from other tasks and budgets")
    parser.add_argument("--allocation", action="store_true", help="global against uniform")
    parser.add_argument("--summary", action="store_true", help="measure nothing, print the tables")
    parser.add_argument("--smoke", action="store_true", help="small enough for a test")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--policies", type=Path, default=POLICIES)
    args = parser.parse_args()
    args.task, args.experts = args.task or list(TASKS), args.experts or [8, 16]
    if args.smoke:
        args.task, args.experts, args.seeds, args.evaluations = ["toy-gsm"], [8], 2, 26
        args.items, args.held_out, args.profiled = 4, 4, 8
    done = {Run.of(row) for row in read_jsonl(args.results)}
    missing = [] if args.summary else [run for run in planned(args) if run not in done]
    if missing:
        bench = Bench(args)
        for number, run in enumerate(missing, 1):
            row = bench.measure(run)
            append_jsonl(args.results, stamped({"bench": "search-methods", "model": args.model, **row}))
            say(
                f"{number}/{len(missing)} {run.task} {run.experts} {name_of(run)} seed {run.seed}: held-out loss "
                f"{row['held_out_loss']:.3f}, score {100 * row['score']:.1f} %, {row['search_seconds']:.0f} s"
            )
        bench.engine.close()
    summarise(read_jsonl(args.results))


if __name__ == "__main__":
    main()
