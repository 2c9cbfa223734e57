"""What tuning repairs, with what labels, and which of its parts do it: leap-tiny's three tasks at 16, 8 and 4 of 64.

    python bench/bench_tune.py --what scores       # the whole pipeline at 16, 8 and 4 of 64, three tasks
    python bench/bench_tune.py --what baselines    # rivals under the same labels and steps, hard task, 8 of 64
    python bench/bench_tune.py --what tight        # the same rivals at 4 of 64, where they have more to repair
    python bench/bench_tune.py --what parts        # each part left out
    python bench/bench_tune.py --what router       # the router by PPO alone, and as it was
    python bench/bench_tune.py --what few          # the same rivals with a thousand labels
    python bench/bench_tune.py --what labels       # 320 to 8,000 labels: random batches, eq. 15-17, doubt of the answer
    python bench/bench_tune.py --summary

Every run takes 400 expert steps of 32 items, labelled in 10 rounds, at most 10,240 of them (the paper's 10 × 1,024;
those in 5 rounds, since each scores most of the pool): fixed before the first run. "leap" chooses them by the paper's
eq. 15-17, "answer-doubt" as `leap tune` does unless it is told otherwise, "teacher" as `leap tune --teacher`
does. It starts from plans that bench/search_methods.py found (rows there; a seed's run takes that seed's plan), tunes, writes the checkpoint as `leap
tune` does, and scores it on 1,024 test items in the vLLM engine, where the full model is scored, too.
One row per (task, experts, method, labels, seed) in bench/results/tune.jsonl; a row that is there is not made again.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import say, table
from leap_serve.cut.write import cut
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.evaluation.evaluate import evaluate
from leap_serve.files import append_jsonl, read_jsonl
from leap_serve.plan import LayerPlan, Plan
from leap_serve.statistics import bootstrap
from leap_serve.tasks.registry import load_task
from leap_training.active_learning import BY_ANSWER, Acquisition
from leap_training.splits import validation_part
from leap_training.tune import Tuner
from leap_training.tune_config import TuneConfig, TuneData
from leap_training.tune_result import keep_router, report_of, write_plain, write_tuned

RESULTS = Path(__file__).parent / "results" / "tune.jsonl"
PLANS = Path(__file__).parent / "results" / "search_methods.jsonl"
MODEL, TASKS, HARD = "leap-tiny", ("toy-gsm", "toy-code", "toy-xsum"), ("toy-gsm", 8)
TIGHT = ("toy-gsm", 4)
RIVALS = ("vanilla", "full", "kd", "kd-experts", "no-active-learning")
ROUNDS, ROUNDS_OF_MOST = 10, 5
RANDOM = Acquisition(strategy="random")
OWN = TuneConfig(patience=0, acquisition=Acquisition())
RIVAL = replace(OWN, experts="full", rl_router=False, acquisition=RANDOM)
METHODS = {
    "leap": OWN,
    "answer-doubt": replace(OWN, acquisition=BY_ANSWER),
    "teacher": replace(OWN, acquisition=BY_ANSWER, distill="logits", teacher=MODEL),
    "no-active-learning": replace(OWN, acquisition=RANDOM),
    "no-rl-router": replace(OWN, rl_router=False),
    "no-supervised-router": replace(OWN, supervised_router=False),
    "no-router": replace(OWN, rl_router=False, supervised_router=False),
    "no-lora": replace(OWN, experts="none"),
    "no-agent": OWN,  # REAP's plan
    "vanilla": RIVAL,  # frequency's plan
    "full": RIVAL,
    "kd": replace(RIVAL, distill="logits", teacher=MODEL),
    "kd-experts": replace(RIVAL, distill="experts", teacher=MODEL),
}
CHOICES = ("answer-doubt", "no-active-learning", "leap")
PLAN_OF = {"vanilla": "frequency", "no-agent": "reap"}
FEW, LEVELS = 1000, (320, 640, 1000, 2000, 4000, 8000)
"""Labels: of the rivals' second comparison, and of each way to choose besides all that a run may have."""


@dataclass(frozen=True, slots=True)
class Size:
    """What every run takes: steps, labels at most, items to choose them from, and items of each held-out part."""

    steps: int = 400
    labels: int = 10_240
    pool: int = 12_288
    held_out: int = 256
    tests: int = 1024


SMOKE = Size(10, 40, 60, 4, 4)


@dataclass(frozen=True, slots=True)
class Run:
    """What a row is of; ``method`` "untuned" is the cut itself, with "full-model" nothing was cut."""

    task: str
    experts: int
    method: str
    labels: int
    seed: int

    @classmethod
    def of(cls, row: dict[str, Any]) -> Run:
        return cls(**{name: row[name] for name in cls.__dataclass_fields__})


def planned(
    what: Sequence[str], seeds: Sequence[int], experts: Sequence[int], tasks: Sequence[str], most: int
) -> list[Run]:  # fmt: skip
    """The runs of the questions asked, seeds outermost; ``most`` labels unless they are the question."""
    runs = []
    for seed in seeds:
        if "scores" in what:
            for budget, task in itertools.product(experts, tasks):
                runs += [Run(task, 64, "full-model", 0, 0), Run(task, budget, "untuned", 0, seed)]
                runs.append(Run(task, budget, "leap", most, seed))
        if "tight" in what:
            runs += [Run(*TIGHT, method, most, seed) for method in ("leap", *RIVALS, "answer-doubt", "teacher")]
        for question, methods in (
            ("baselines", RIVALS),
            ("parts", ("no-rl-router", "no-active-learning", "no-lora", "no-agent")),
            ("router", ("no-supervised-router", "no-router")),
        ):
            runs += [Run(*HARD, method, most, seed) for method in methods if question in what]
        if "few" in what:
            runs += [
                Run(*HARD, method, FEW, seed) for method in (*CHOICES, "teacher", "vanilla", "full", "kd", "kd-experts")
            ]
        if "labels" in what:
            runs += [Run(*HARD, method, level, seed) for level, method in itertools.product((*LEVELS, most), CHOICES)]
    return list(dict.fromkeys(runs))


def plan_of(run: Run, rows: Sequence[dict[str, Any]]) -> Plan:
    """The plan that a search left in the results, for a seed's run that seed's."""
    method = PLAN_OF.get(run.method, "leap")
    found = [
        row for row in rows
        if (row["task"], row["experts"], row["method"], row["allocation"], row["warm"])
        == (run.task, run.experts, method, "uniform", "") and row["seed"] == (run.seed if method == "leap" else 0)
    ]  # fmt: skip
    if not found:
        raise SystemExit(
            f"{PLANS}: no plan of {method} for {run.task} at {run.experts}, seed {run.seed}; first "
            f"python bench/search_methods.py --method {method} --experts {run.experts}"
        )
    source = Checkpoint.open(resolve_model(MODEL))
    retained = zip(source.moe_layers, found[0]["retained"], strict=True)
    layers = {layer: LayerPlan(tuple(ids), source.top_k) for layer, ids in retained}
    return Plan(source.identity(), source.num_experts, layers, made_by={"method": method, "seed": run.seed})


def score(folder: Path, task_name: str, tests: int) -> dict[str, Any]:
    """Score and loss on test items, in the engine that serves."""
    engine = VllmEngine(str(folder), dtype="float32", kv_cache_gib=0.5)
    try:
        task = load_task(task_name)
        outcome = evaluate(engine, task, task.items("test", tests))
        spread = bootstrap(outcome.per_item)
        return {"score": outcome.score, "loss": outcome.loss, "metric": outcome.metric, "test_items": tests,
                "interval": [spread.low, spread.high]}  # fmt: skip
    finally:
        engine.close()


def tune(folder: Path, run: Run, config: TuneConfig, size: Size, out: Path) -> dict[str, Any]:
    """Tune a cut into ``out``; what tune.json says."""
    task = load_task(run.task)
    parts = (validation_part(task, part, size.held_out, run.seed) for part in ("stopping", "router"))
    data = TuneData(task.items("train", size.pool, run.seed), task.items("test", None, run.seed), *parts)
    if config.teacher:
        config = replace(config, teacher=str(resolve_model(config.teacher)))
    tuner = Tuner(folder, data, config)
    tuner.run()
    whole = config.experts == "full"
    router = keep_router(tuner) if config.rl_router or (config.supervised_router and not whole) else None
    report = report_of(tuner, router, task=run.task)
    if whole:
        write_plain(tuner, folder, out, report, False)
    else:
        shutil.copytree(folder, out)
        write_tuned(tuner, out, report)
    return report


def settings(run: Run, size: Size) -> TuneConfig:
    """The method's settings, with the labels asked for dealt over its rounds."""
    rounds = ROUNDS_OF_MOST if run.labels == size.labels else ROUNDS
    return replace(METHODS[run.method], rounds=rounds, labels=run.labels // rounds, steps=size.steps, seed=run.seed)


def measure(run: Run, rows: Sequence[dict[str, Any]], size: Size, work: Path) -> dict[str, Any]:
    """One run's figures."""
    began = time.monotonic()
    more: dict[str, Any] = {}
    if run.method == "full-model":
        folder = resolve_model(MODEL)
    else:
        folder, plan = work / "cut", plan_of(run, rows)
        cut(resolve_model(MODEL), plan, folder)
        more["plan"] = plan.fingerprint
        if run.method != "untuned":
            config = settings(run, size)
            report = tune(folder, run, config, size, work / "tuned")
            folder = work / "tuned"
            more |= {
                "steps": config.steps, "rounds": config.rounds, "router": report["router"],
                "curve": [{k: row[k] for k in ("labels", "validation_loss", "validation_exact")} for row in report["curve"]],
                "tune_seconds": round(time.monotonic() - began, 1),
            }  # fmt: skip
    return {
        "bench": "tune", "model": MODEL, "task": run.task, "experts": run.experts, "method": run.method,
        "labels": run.labels, "seed": run.seed, **score(folder, run.task, size.tests), **more,
    }  # fmt: skip


def summarise(rows: Sequence[dict[str, Any]]) -> None:
    """Print a line per task, budget, method and labels."""
    full = {row["task"]: row["score"] for row in rows if row["method"] == "full-model"}
    groups: dict[tuple[Any, ...], list[float]] = {}
    for row in rows:
        groups.setdefault((row["task"], row["experts"], row["method"], row["labels"]), []).append(row["score"])
    table(
        "Score on test items in vLLM, and its share of the full model's",
        ["task", "experts", "method", "labels", "seeds", "score %", "of full %"],
        [
            [*key, len(found), " ".join(f"{100 * x:.1f}" for x in found),
             f"{100 * sum(found) / len(found) / full[key[0]]:.1f}" if key[0] in full else "–"]
            for key, found in sorted(groups.items())
        ],
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    questions = ("scores", "baselines", "parts", "few", "labels", "router", "tight")
    parser.add_argument("--what", nargs="+", choices=questions, default=questions)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 8, 4])
    parser.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="small enough for a test")
    parser.add_argument("--summary", action="store_true", help="measure nothing, print the table")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    size, done = SMOKE if args.smoke else Size(), {Run.of(row) for row in read_jsonl(args.results)}
    missing = [run for run in planned(args.what, args.seeds, args.experts, args.task, size.labels) if run not in done]
    for number, run in enumerate([] if args.summary else missing, 1):
        with tempfile.TemporaryDirectory() as work:
            row = measure(run, read_jsonl(PLANS), size, Path(work))
        append_jsonl(args.results, stamped(row))
        say(f"{number}/{len(missing)} {run.task} {run.experts} {run.method} {run.labels} labels, seed {run.seed}: "
            f"score {100 * row['score']:.1f} %, loss {row['loss']:.3f}")  # fmt: skip
    summarise(read_jsonl(args.results))


if __name__ == "__main__":
    main()
