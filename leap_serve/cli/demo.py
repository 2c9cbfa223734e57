"""``leap demo``: profile → search → cut → tune → eval and bench → serve, on the bundled small model, with real parts only."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import noted_bar, progress_bar, say, table
from leap_serve.cli.engines import scoring_dtype
from leap_serve.cli.search_view import search_view
from leap_serve.errors import LeapError, UsageError
from leap_serve.files import new_folder, write_json
from leap_serve.flops import flops_per_token
from leap_serve.provenance import hardware, made_by, versions
from leap_serve.report import write_report
from leap_serve.tasks.registry import TASKS, load_task

if TYPE_CHECKING:
    from leap_serve.engine import Engine
    from leap_serve.evaluation.evaluate import Evaluation
    from leap_serve.plan import Plan
    from leap_serve.profile import Profile

Seen = dict[str, dict[str, "Evaluation"]]
"""Name of a row → task → what its model scored there."""
MODEL = "leap-tiny"
KEPT = (16, 8)
RANKED = "reap-16"
"""What the agent is compared with: one ranking of the experts, at the larger size."""
SEARCH_ITEMS = 32
LEAST = 16
"""Episodes of one batch, which hold the rankings that a search begins with."""
LABELS, HELD_OUT = 512, 64
"""Training items that tuning may see, in two rounds, and validation items of each of its two parts."""
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
    parser.add_argument("--episodes", type=int, default=150, help="plans that the agent tries per search (default 150)")
    parser.add_argument("--steps", type=int, default=80, help="steps of each tuning run, an even number (default 80)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the whole line; the result appears under ``--out`` whole, or not at all."""
    _check(args)
    began = time.monotonic()
    with new_folder(args.out, args.force) as work:
        seen = _prune(work, args.episodes, args.limit)
        pruned = [name for name in seen if name != "full"]
        seen |= _tune(work, args.steps, args.limit)
        folders = {"full": resolve_model(MODEL), **{name: work / SERVED / name for name in seen if name != "full"}}
        timed = ["full", *(_tuned(kept) for kept in KEPT)]
        speeds = _time({name: folders[name] for name in timed}, args.rounds)
        result = {
            name: {**_by_kind(found), **speeds.get(name, {"tpot_ms": {}}), **_size_of(folders[name])}
            for name, found in seen.items()
        }
        best = max(set(seen) - {"full", *pruned}, key=lambda name: (result[name]["scores"][SERVED], name))
        answer = _ask(folders[best])
        outcome = {
            "model": MODEL, "models": result, "served": f"{SERVED}/{best}", "question": QUESTION, "answer": answer,
            "items_per_task": args.limit, "seconds": round(time.monotonic() - began, 1), "versions": versions(),
            "hardware": hardware(), "made_by": made_by(),
        }  # fmt: skip
        write_json(work / "demo.json", outcome)
    write_report([args.out], args.out / "report.html")
    _show(result, args)
    _say_how_to_go_on(args.out, best, answer)
    return outcome


def _check(args: argparse.Namespace) -> None:
    if args.limit < 1 or args.rounds < 1:
        raise UsageError("--limit, --rounds", f"are {args.limit} and {args.rounds}", "give 1 or more")
    if args.episodes < LEAST:
        raise UsageError("--episodes", f"is {args.episodes}", f"give {LEAST} or more")
    if args.steps < 2 or args.steps % 2:
        raise UsageError("--steps", f"is {args.steps}", "give an even number, 2 or more")


def _tuned(kept: int) -> str:
    return f"leap-{kept}-tuned"


def _prune(work: Path, episodes: int, limit: int) -> Seen:
    """Per task: profile, choose the experts, cut; everything is scored in the one engine that runs, plans applied to it."""
    from leap_serve.cut.write import cut
    from leap_serve.engines.vllm_engine import VllmEngine

    seen: Seen = {name: {} for name in ("full", RANKED, *(f"leap-{kept}" for kept in KEPT))}
    engine = VllmEngine(MODEL, dtype=scoring_dtype(None))
    try:
        for task in TASKS:
            with progress_bar(f"profile {MODEL} on {task}") as bar:
                profile = engine.profile(load_task(task).items("train", PROFILE_ITEMS), bar)
            profile.save(work / task / "profile")
            plans = {RANKED: _rank(profile)}
            plans |= {f"leap-{kept}": _search(engine, profile, task, kept, episodes) for kept in KEPT}
            seen["full"][task] = _score(engine, "full", task, limit)
            for name, plan in plans.items():
                plan.save(work / task / f"{name}.json")
                cut(resolve_model(MODEL), plan, work / task / name)
                engine.apply(plan)
                seen[name][task] = _score(engine, name, task, limit)
                engine.restore()
    finally:
        engine.close()
    return seen


def _rank(profile: Profile) -> Plan:
    """Keep what REAP ranks highest."""
    from leap_training.saliency import Routing, allocate, scores

    method, _, kept = RANKED.partition("-")
    return allocate(scores(profile, method), Routing.of(profile), experts=int(kept), method=method)


def _search(engine: Engine, profile: Profile, task: str, kept: int, episodes: int) -> Plan:
    """Let the agent search, on validation items, with the engine's scores."""
    from leap_training.pruning_agent import AgentConfig, best_ranking, search
    from leap_training.pruning_space import Ledger, PruningSpace, engine_evaluator
    from leap_training.saliency import Routing
    from leap_training.splits import validation_part

    items = validation_part(load_task(task), "search", SEARCH_ITEMS)
    ledger = Ledger(engine_evaluator(engine, items), PruningSpace.of(Routing.of(profile), experts=kept))
    with search_view(f"search {task}, {kept} of 64", episodes) as view:
        return search(
            profile, best_ranking(profile, ledger)[1], ledger, AgentConfig(episodes=episodes),
            report=lambda metrics: view.show(ledger.evaluations, *ledger.best()[1:], metrics), task=task,
        ).plan  # fmt: skip


def _tune(work: Path, steps: int, limit: int) -> Seen:
    """Tune the agent's cuts: routing agent and adapters on actively chosen items, beside a copy of the weights; score."""
    from leap_serve.cli.tune import tune
    from leap_serve.engines.vllm_engine import VllmEngine
    from leap_training.active_learning import Acquisition
    from leap_training.splits import validation_part
    from leap_training.tune import Tuner
    from leap_training.tune_config import TuneConfig, TuneData
    from leap_training.tune_result import write_tuned

    # Items are chosen by the paper's eq. 15-17, which decode nothing: here every minute counts.
    config = TuneConfig(
        rounds=2, labels=LABELS // 2, steps=steps, lr_warmup=10, router_warmup=4, router_every=8, patience=0,
        acquisition=Acquisition(),
    )  # fmt: skip
    seen: Seen = {_tuned(kept): {} for kept in KEPT}
    for name in TASKS:
        task = load_task(name)
        parts = (validation_part(task, part, HELD_OUT) for part in ("stopping", "router"))
        data = TuneData(task.items("train", 2 * LABELS), task.items("test"), *parts)
        for kept in KEPT:
            source, out = work / name / f"leap-{kept}", work / name / _tuned(kept)
            with noted_bar(f"tune {name}, {kept} of 64") as bar:
                tuner = Tuner(source, data, config)
                report = tune(tuner, bar, task=name, model=str(source))
            shutil.copytree(source, out)
            write_tuned(tuner, out, report)
            del tuner
            engine = VllmEngine(out, dtype=scoring_dtype(None))
            try:
                seen[_tuned(kept)][name] = _score(engine, _tuned(kept), name, limit)
            finally:
                engine.close()
    return seen


def _score(engine: Engine, name: str, task_name: str, limit: int) -> Evaluation:
    """Score what the engine holds on unseen items of a task."""
    from leap_serve.evaluation.evaluate import evaluate

    task = load_task(task_name)
    with progress_bar(f"eval {name} on {task_name}") as bar:
        return evaluate(engine, task, task.items("test", limit), bar)


def _by_kind(found: Mapping[str, Evaluation]) -> dict[str, dict[str, Any]]:
    return {
        "scores": {task: one.score for task, one in found.items()},
        "losses": {task: one.loss for task, one in found.items()},
        "metrics": {task: one.metric for task, one in found.items()},
    }


def _time(folders: Mapping[str, Path], rounds: int) -> dict[str, dict[str, Any]]:
    """Time decoding of all models in one interleaved run."""
    from leap_serve.bench.contenders import Contender, measure_rounds, opened
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
    return {
        "weights_bytes": checkpoint.weight_bytes, "retained": counts, "flops_per_token": flops_per_token(checkpoint),
    }  # fmt: skip


def _ask(folder: Path) -> str:
    """Start the real server, ask one question over HTTP, stop it; raises LeapError where it does not answer."""
    import httpx

    from leap_serve.server.launch import Server

    with Server(folder) as server:
        messages = [{"role": "user", "content": QUESTION}]
        body = {"model": server.name, "messages": messages, "max_tokens": 48, "temperature": 0}
        reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
        if reply.status_code != 200:
            raise LeapError(server.url, f"answered {reply.status_code}: {reply.text[:200]}", "see leap env")
        answer: str = reply.json()["choices"][0]["message"]["content"]
        return answer


def _show(result: Mapping[str, Mapping[str, Any]], args: argparse.Namespace) -> None:
    table(
        f"{MODEL}: full, with {' and '.join(map(str, KEPT))} of its 64 experts, and tuned; {args.limit} unseen items per task",
        ["model", *(f"{task} %" for task in TASKS), *(f"{task} loss" for task in TASKS)],
        [
            [name, *(f"{100 * model['scores'][task]:.1f}" for task in TASKS),
             *(f"{model['losses'][task]:.3f}" for task in TASKS)]
            for name, model in result.items()
        ],
    )  # fmt: skip
    table(
        f"sizes and times of those for {SERVED}",
        ["model", *(f"TPOT ms, batch {b}" for b in BATCHES), f"tok/s, batch {BATCHES[-1]}", "weights MiB"],
        [
            [name, *(f"{model['tpot_ms'][str(batch)]:.2f}" for batch in BATCHES), f"{model['tok_s']:.0f}",
             f"{model['weights_bytes'] / 2**20:.1f}"]
            for name, model in result.items() if model["tpot_ms"]
        ],
    )  # fmt: skip
    say(
        "Each pruned row is one checkpoint per task, made for that task and scored on it. reap ranks experts once; leap is\n"
        f"the agent, which tried {args.episodes} plans per task and size in the running engine; tuned is that cut after\n"
        f"{args.steps} steps on {LABELS} items, chosen from {2 * LABELS}."
    )


def _say_how_to_go_on(out: Path, best: str, answer: str) -> None:
    folder = out / SERVED / best
    messages = [{"role": "user", "content": QUESTION}]
    say(f"\n{folder} was served over HTTP and asked: {QUESTION}\nIt answered: {' '.join(answer.split())}")
    say(
        f"\nSee it in a browser: {out / 'report.html'}\n"
        f"Serve it yourself:  leap serve {folder}\n"
        f"Talk to it:         curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\\n"
        f"                      -d '{json.dumps({'model': folder.name, 'messages': messages, 'max_tokens': 48})}'\n"
        f"See what it holds:  leap inspect {folder}"
    )
    plans = " ".join(
        f"--specialist {task.removeprefix('toy-')}={out / task / f'leap-{KEPT[0]}.json'}" for task in TASKS
    )
    say(
        f"\nOr serve every task from one full model, its experts shared, and ask them side by side:\n"
        f"  leap serve {MODEL} {plans}\n"
        f'  leap compare http://127.0.0.1:8000 --models {",".join(task.removeprefix("toy-") for task in TASKS)} --prompt "{QUESTION}"'
    )
