"""Is leap-tiny what it should be? Full score on 500 unseen items, and how hard a task stays when pruned.

    python bench/bench_tiny.py

For each task: the full model's score in vLLM; then, from a profile of that task alone, 8 of 64 experts by
frequency, scored before and after plain fine-tuning of all retained experts and routers (1,000 items, the
number of steps fixed in leap_training.finetune). One row per task in bench/results/leap_tiny.jsonl.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import resolve_model
from leap_serve.cli.console import progress_bar, table
from leap_serve.cut.write import cut
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.evaluation.evaluate import evaluate
from leap_serve.files import append_jsonl
from leap_serve.tasks.registry import TASKS, load_task
from leap_training.finetune import FinetuneConfig, finetune
from leap_training.saliency import Routing, allocate, scores

RESULTS = Path(__file__).parent / "results" / "leap_tiny.jsonl"


def score(model: Path, tasks: list[str], items: int) -> dict[str, dict[str, float]]:
    engine = VllmEngine(model)
    try:
        out = {}
        for name in tasks:
            task = load_task(name)
            outcome = evaluate(engine, task, task.items("test", items))
            out[name] = {"score": outcome.score, "loss": outcome.loss}
        return out
    finally:
        engine.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="leap-tiny")
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--task", action="append", choices=list(TASKS), help="default: all")
    args = parser.parse_args()
    model, tasks, config = resolve_model(args.model), args.task or list(TASKS), FinetuneConfig()
    full = score(model, tasks, args.items)
    rows: list[dict[str, Any]] = []
    for name in tasks:
        with tempfile.TemporaryDirectory() as folder:
            engine = VllmEngine(model)
            try:
                profile = engine.profile(load_task(name).items("train", 256))
            finally:
                engine.close()
            pruned, tuned = Path(folder, "pruned"), Path(folder, "tuned")
            ranking = scores(profile, "frequency")
            plan = allocate(ranking, Routing.of(profile), experts=args.experts, method="frequency")
            cut(model, plan, pruned)
            before = score(pruned, [name], args.items)[name]
            with progress_bar(f"fine-tune {name}") as bar:
                finetune(pruned, name, tuned, config, bar)
            after = score(tuned, [name], args.items)[name]
        row = {
            "bench": "leap-tiny", "model": args.model, "task": name, "items": args.items, "full": full[name],
            "method": "frequency", "experts": args.experts, "before_tuning": before, "after_tuning": after,
            "tuning": {"items": config.items, "steps": config.steps, "batch": config.batch, "lr": config.lr},
        }  # fmt: skip
        append_jsonl(RESULTS, stamped(row))
        rows.append(row)
    table(
        f"{args.model}: full, and {args.experts} experts by frequency before and after {config.steps} steps",
        ["task", "full %", "before %", "after %", "after / full %"],
        [
            [r["task"], *(f"{100 * r[k]['score']:.1f}" for k in ("full", "before_tuning", "after_tuning")),
             f"{100 * r['after_tuning']['score'] / max(r['full']['score'], 1e-9):.1f}"]
            for r in rows
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
