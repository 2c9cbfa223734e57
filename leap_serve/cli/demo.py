"""``leap demo``: profile → plan → cut → eval and bench → serve, on the bundled small model, with real parts only."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.errors import LeapError
from leap_serve.files import new_folder, write_json
from leap_serve.provenance import hardware, made_by, versions
from leap_serve.tasks.registry import TASKS, load_task

MODEL = "leap-tiny"
METHODS = ("reap", "frequency")
KEPT = (32, 16)
BATCHES = (1, 8)
PROFILE_ITEMS = 128
QUESTION = "Anna has 23 apples and buys 45 more. How many apples does Anna have now?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/demo"), help="folder of what the demo makes")
    parser.add_argument("--force", action="store_true", help="replace --out if it is not empty")
    parser.add_argument("--limit", type=int, default=100, help="unseen items per task to score (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the latency benchmark (default 5)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole line; the result appears under ``--out`` whole, or not at all."""
    began = time.monotonic()
    with new_folder(args.out, args.force) as work:
        models = _prune(work)
        folders = {"full": str(resolve_model(MODEL)), **{name: str(work / name) for name in models}}
        scores = _score(folders, args.limit)
        speeds = _time(folders, args.rounds)
        result = {
            name: {
                "scores": {task: figures["score"] for task, figures in scores[name].items()},
                "losses": {task: figures["loss"] for task, figures in scores[name].items()},
                **speeds[name],
                **_size_of(Path(folder)),
            }
            for name, folder in folders.items()
        }
        best = f"{METHODS[0]}-{KEPT[0]}"
        answer = _ask(work / best)
        outcome = {
            "model": MODEL,
            "models": result,
            "question": QUESTION,
            "answer": answer,
            "items_per_task": args.limit,
            "seconds": round(time.monotonic() - began, 1),
            "versions": versions(),
            "hardware": hardware(),
            "made_by": made_by(),
        }
        write_json(work / "demo.json", outcome)
    _show(result, args.limit)
    say(f"\nIt served {best} over HTTP and asked: {QUESTION}\nIt answered: {answer.strip()}")
    say(
        "\nWhat one-shot pruning loses here, tuning has to repair: below about half of the experts no ranking of\n"
        "experts keeps this model's skills, since it was trained to use all of them."
    )
    say(
        f"\nServe it yourself:      leap serve {args.out / best}\n"
        "talk to it:             curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f'                          -d \'{{"model": "{best}", "messages": [{{"role": "user", "content": "{QUESTION}"}}]}}\'\n'
        f"what it retains:        leap inspect {args.out / best}"
    )
    return outcome


def _prune(work: Path) -> list[str]:
    """Profile the model on every task's training split, plan and cut; return the names of the cuts."""
    from leap_serve.cut import cut
    from leap_serve.vllm_engine import VllmEngine
    from leap_training.saliency import Routing, allocate, scores

    items = [item for name in TASKS for item in load_task(name).items("train", PROFILE_ITEMS)]
    engine = VllmEngine(MODEL)
    try:
        with progress_bar(f"profile {MODEL}") as bar:
            profile = engine.profile(items, bar)
    finally:
        engine.close()
    profile.save(work / "profile")
    names = []
    for method in METHODS:
        for kept in KEPT:
            name = f"{method}-{kept}"
            plan = allocate(scores(profile, method), Routing.of(profile), experts=kept, method=method)
            plan.save(work / f"{name}.json")
            cut(resolve_model(MODEL), plan, work / name)
            names.append(name)
    return names


def _score(folders: dict[str, str], limit: int) -> dict[str, dict[str, dict[str, float]]]:
    """Score every model on unseen items of every task, in the engine that serves."""
    from leap_serve.evaluate import evaluate
    from leap_serve.vllm_engine import VllmEngine

    out: dict[str, dict[str, dict[str, float]]] = {}
    for name, folder in folders.items():
        engine = VllmEngine(folder)
        try:
            out[name] = {}
            for task_name in TASKS:
                task = load_task(task_name)
                with progress_bar(f"eval {name} on {task_name}") as bar:
                    outcome = evaluate(engine, task, task.items("test", limit), bar)
                out[name][task_name] = {"score": outcome.score, "loss": outcome.loss}
        finally:
            engine.close()
    return out


def _time(folders: dict[str, str], rounds: int) -> dict[str, dict[str, Any]]:
    """Time decoding of all models in one interleaved run."""
    from leap_serve.bench import Contender, measure_rounds, opened
    from leap_serve.measure import summary
    from leap_serve.workload import Workload

    out: dict[str, dict[str, Any]] = {name: {"tpot_ms": {}} for name in folders}
    with opened([Contender(name, folder) for name, folder in folders.items()]) as workers:
        for batch in BATCHES:
            workload = Workload("demo", input_tokens=32, output_tokens=32, batch=batch)
            with progress_bar(f"bench batch {batch}") as bar:
                samples = measure_rounds(workers, workload, rounds, warmup=1, progress=bar)
            for name, own in zip(folders, samples, strict=True):
                out[name]["tpot_ms"][str(batch)] = summary([sample.tpot_ms for sample in own]).median
                out[name]["tok_s"] = summary([sample.output_tok_s for sample in own]).median
    return out


def _size_of(folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.open(folder)
    counts = checkpoint.plan.counts if checkpoint.plan else [checkpoint.num_experts] * len(checkpoint.moe_layers)
    return {"weights_bytes": checkpoint.weight_bytes, "retained": counts}


def _ask(folder: Path) -> str:
    """Start the real server, ask one question over HTTP, stop it; raises LeapError where it does not answer."""
    import httpx

    from leap_serve.launch import Server

    with Server(folder) as server:
        body = {
            "model": server.name,
            "messages": [{"role": "user", "content": QUESTION}],
            "max_tokens": 48,
            "temperature": 0,
        }
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        if reply.status_code != 200:
            raise LeapError(server.url, f"answered {reply.status_code}: {reply.text[:200]}", "see leap env")
        answer: str = reply.json()["choices"][0]["message"]["content"]
        return answer


def _show(result: dict[str, dict[str, Any]], limit: int) -> None:
    def row(name: str, model: dict[str, Any]) -> Sequence[object]:
        counts = sorted(set(model["retained"]))
        return [
            name, " – ".join(map(str, counts)), *(f"{100 * model['scores'][task]:.1f}" for task in TASKS),
            *(f"{model['tpot_ms'][str(batch)]:.2f}" for batch in BATCHES), f"{model['tok_s']:.0f}",
            f"{model['weights_bytes'] / 2**20:.1f}",
        ]  # fmt: skip

    header = [
        "model",
        "experts",
        *(f"{task} %" for task in TASKS),
        *(f"TPOT b{batch} ms" for batch in BATCHES),
        f"tok/s b{BATCHES[-1]}",
        "weights MiB",
    ]
    table(f"{MODEL}, {limit} unseen items per task", header, [row(name, model) for name, model in result.items()])
