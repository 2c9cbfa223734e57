"""``leap demo``: profile → search → cut → eval and bench → serve, on the bundled small model, with real parts only."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cli.engines import scoring_dtype
from leap_serve.cli.search_view import search_view
from leap_serve.errors import LeapError, UsageError
from leap_serve.files import new_folder, write_json
from leap_serve.provenance import hardware, made_by, versions
from leap_serve.tasks.registry import TASKS, load_task

if TYPE_CHECKING:
    from leap_serve.engine import Engine
    from leap_serve.plan import Plan
    from leap_serve.profile import Profile

MODEL = "leap-tiny"
METHODS = ("reap", "leap")
KEPT = 16
SEARCH_ITEMS = 32
LEAST = 16
"""Episodes of one batch, which hold the rankings that a search begins with."""
BATCHES = (1, 8)
PROFILE_ITEMS = 256
SERVED = "toy-gsm"
QUESTION = "Anna has 23 apples and buys 45 more. How many apples does Anna have now?"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("-o", "--out", type=Path, default=Path("runs/demo"), help="folder of what the demo makes")
    parser.add_argument("--force", action="store_true", help="replace --out if it is not empty")
    parser.add_argument("--limit", type=int, default=100, help="unseen items per task to score (default 100)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of the latency benchmark (default 5)")
    parser.add_argument("--episodes", type=int, default=300, help="plans that the agent tries per task (default 300)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole line; the result appears under ``--out`` whole, or not at all."""
    if args.limit < 1 or args.rounds < 1:
        raise UsageError("--limit, --rounds", f"are {args.limit} and {args.rounds}", "give 1 or more")
    if args.episodes < LEAST:
        raise UsageError("--episodes", f"is {args.episodes}", f"give {LEAST} or more")
    began = time.monotonic()
    with new_folder(args.out, args.force) as work:
        names = _prune(work, args.episodes)
        specialists = {"full": {task: resolve_model(MODEL) for task in TASKS}}
        specialists |= {name: {task: work / task / name for task in TASKS} for name in names}
        scores = {name: _score(name, folders, args.limit) for name, folders in specialists.items()}
        speeds = _time({name: folders[SERVED] for name, folders in specialists.items()}, args.rounds)
        result = {
            name: {
                "scores": {task: score for task, (score, _) in scores[name].items()},
                "losses": {task: loss for task, (_, loss) in scores[name].items()},
                **speeds[name],
                **_size_of(folders[SERVED]),
            }
            for name, folders in specialists.items()
        }
        best = Path(SERVED, max(names, key=lambda name: (result[name]["scores"][SERVED], name)))
        answer = _ask(work / best)
        outcome = {
            "model": MODEL,
            "models": result,
            "served": str(best),
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
    say(
        "Each pruned row is one checkpoint per task, cut for that task and scored on it; sizes and times are\n"
        f"those of the {SERVED} one. reap ranks experts once; leap is the agent, which tried {args.episodes} plans per task\n"
        "in the running engine. Nothing was tuned: leap tune repairs what is still missing."
    )
    folder = args.out / best
    say(f"\n{best} was served over HTTP and asked: {QUESTION}\nIt answered: {' '.join(answer.split())}")
    say(
        f"\nServe it yourself:  leap serve {folder}\n"
        f"Talk to it:         curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"                      -d '{json.dumps({'model': folder.name, 'messages': _messages(), 'max_tokens': 48})}'\n"
        f"See what it holds:  leap inspect {folder}"
    )
    return outcome


def _prune(work: Path, episodes: int) -> list[str]:
    """Profile the model on every task's training split, and cut one specialist per task and method."""
    from leap_serve.cut import cut
    from leap_serve.vllm_engine import VllmEngine

    engine = VllmEngine(MODEL, dtype=scoring_dtype(None))
    try:
        for task in TASKS:
            with progress_bar(f"profile {MODEL} on {task}") as bar:
                profile = engine.profile(load_task(task).items("train", PROFILE_ITEMS), bar)
            profile.save(work / task / "profile")
            for method in METHODS:
                plan = _search(engine, profile, task, episodes) if method == "leap" else _rank(profile, method)
                plan.save(work / task / f"{method}-{KEPT}.json")
                cut(resolve_model(MODEL), plan, work / task / f"{method}-{KEPT}")
    finally:
        engine.close()
    return [f"{method}-{KEPT}" for method in METHODS]


def _rank(profile: Profile, method: str) -> Plan:
    """Keep what a criterion ranks highest."""
    from leap_training.saliency import Routing, allocate, scores

    return allocate(scores(profile, method), Routing.of(profile), experts=KEPT, method=method)


def _search(engine: Engine, profile: Profile, task: str, episodes: int) -> Plan:
    """Let the agent search, on validation items, with the engine's scores."""
    from leap_training.pruning_agent import AgentConfig, best_ranking, search
    from leap_training.pruning_space import Ledger, PruningSpace, engine_evaluator
    from leap_training.saliency import Routing
    from leap_training.splits import validation_part

    items = validation_part(load_task(task), "search", SEARCH_ITEMS)
    ledger = Ledger(engine_evaluator(engine, items), PruningSpace.of(Routing.of(profile), experts=KEPT))
    with search_view(f"search {task}", episodes) as view:
        return search(
            profile, best_ranking(profile, ledger)[1], ledger, AgentConfig(episodes=episodes),
            report=lambda metrics: view.show(ledger.evaluations, *ledger.best()[1:], metrics), task=task,
        ).plan  # fmt: skip


def _score(name: str, folders: Mapping[str, Path], limit: int) -> dict[str, tuple[float, float]]:
    """Score each task's checkpoint on unseen items of that task; returns (score, loss) by task."""
    from leap_serve.evaluate import evaluate
    from leap_serve.vllm_engine import VllmEngine

    out: dict[str, tuple[float, float]] = {}
    loaded: VllmEngine | None = None
    try:
        for task_name, folder in folders.items():
            if loaded is None or loaded.model != folder:
                if loaded is not None:
                    loaded.close()
                loaded = VllmEngine(folder)
            task = load_task(task_name)
            with progress_bar(f"eval {name} on {task_name}") as bar:
                outcome = evaluate(loaded, task, task.items("test", limit), bar)
            out[task_name] = (outcome.score, outcome.loss)
    finally:
        if loaded is not None:
            loaded.close()
    return out


def _time(folders: Mapping[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Time decoding of all models in one interleaved run."""
    from leap_serve.bench import Contender, measure_rounds, opened
    from leap_serve.measure import summary
    from leap_serve.workload import Workload

    out: dict[str, dict[str, Any]] = {name: {"tpot_ms": {}} for name in folders}
    with opened([Contender(name, str(folder)) for name, folder in folders.items()]) as workers:
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


def _messages() -> list[dict[str, str]]:
    return [{"role": "user", "content": QUESTION}]


def _show(result: Mapping[str, Mapping[str, Any]], limit: int) -> None:
    header = [
        "model",
        *(f"{task} %" for task in TASKS),
        *(f"TPOT ms, batch {b}" for b in BATCHES),
        f"tok/s, batch {BATCHES[-1]}",
        "weights MiB",
    ]
    rows = [
        [
            name, *(f"{100 * model['scores'][task]:.1f}" for task in TASKS),
            *(f"{model['tpot_ms'][str(batch)]:.2f}" for batch in BATCHES), f"{model['tok_s']:.0f}",
            f"{model['weights_bytes'] / 2**20:.1f}",
        ]
        for name, model in result.items()
    ]  # fmt: skip
    table(f"{MODEL}: full and with {KEPT} of its 64 experts, {limit} unseen items per task", header, rows)
