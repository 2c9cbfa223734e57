"""``leap search prof/ --method M --budget B -o plan.json``: choose the experts to retain."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import noted_bar, say, table
from leap_serve.cli.engines import open_engine
from leap_serve.encoding import items_sha256
from leap_serve.errors import UsageError
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import TASKS, load_task

OBSERVED = ("frequency", "gate-mass", "ean", "ean-mean", "ean-weighted", "reap")
ONE_SHOT = (*OBSERVED, "magnitude", "random")
SEARCHED = ("leap", "random-search", "greedy", "evolution")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("source", help="a profile folder; for magnitude and random also the model itself")
    parser.add_argument("--method", required=True, choices=(*ONE_SHOT, *SEARCHED))
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument("--budget", type=float, help="fraction of the routed experts to keep, e.g. 0.125")
    size.add_argument("--experts", type=int, help="experts to keep per layer (with global: on average)")
    parser.add_argument("--allocation", default="uniform", choices=("uniform", "global"))
    parser.add_argument("--guard-super-experts", action="store_true", help="keep experts with outlying activations")
    parser.add_argument("--top-k", type=int, help="experts per token of the plan (default: the model's)")
    parser.add_argument("--temperature", type=float, default=1.0, help="router temperature of the plan (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn")
    search = parser.add_argument_group(
        "searching", f"for {', '.join(SEARCHED)}: plans are scored by the engine on validation items of the task"
    )
    search.add_argument("--task", help=f"one of {', '.join(TASKS)}")
    search.add_argument("--episodes", type=int, default=500, help="plans to evaluate (default 500)")
    search.add_argument("--items", type=int, default=32, help="validation items per evaluation (default 32)")
    search.add_argument("--prior", default="best", choices=("best", *OBSERVED), help="ranking to start at")
    search.add_argument("--model", help="the full model (default: the one that was profiled)")
    search.add_argument("--engine", default="vllm", choices=("vllm", "torch"))
    search.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16")
    search.add_argument("--state", type=Path, help="leap: folder to save after every update, and to continue from")
    search.add_argument("--warm", type=Path, help="leap: policy of an earlier search to start with")
    search.add_argument("--save-policy", type=Path, help="leap: where to write the policy's shared weights")
    parser.add_argument("-o", "--out", type=Path, required=True, help="the plan to write, e.g. plan.json")
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Choose, write the plan and show its counts."""
    if args.out.is_dir():
        raise UsageError(args.out, "is a folder", "give the name of a file, e.g. plan.json")
    if args.out.exists() and not args.force:
        raise UsageError(args.out, "exists", "choose another --out, or pass --force to replace it")
    source = _source(args.source)
    plan, more = _searched(args, source) if args.method in SEARCHED else (_one_shot(args, source), {})
    plan.save(args.out)
    table(
        f"{args.method}, {args.allocation}: {sum(plan.counts)} of {plan.num_experts * len(plan.layers)} experts"
        f" → {args.out}",
        ["layer", "experts kept", "top_k"],
        [[index, len(layer.retained), layer.top_k] for index, layer in plan.layers.items()],
    )
    if more:
        say(
            f"{more['evaluations']} plans evaluated, from {more['prior']}: "
            f"loss {more['prior_loss']:.4f} → {more['loss']:.4f}"
        )
    notices = list(plan.made_by.get("notices", []))
    for notice in notices:
        say(f"note: {notice}")
    return {
        "out": str(args.out), "method": args.method, "allocation": args.allocation, "retained": plan.counts,
        "top_k": [layer.top_k for layer in plan.layers.values()], "num_experts": plan.num_experts,
        "fingerprint": plan.fingerprint, "notices": notices, **more,
    }  # fmt: skip


def _one_shot(args: argparse.Namespace, source: Profile | Checkpoint) -> Plan:
    """Score and allocate."""
    from leap_training.saliency import Routing, allocate, scores, super_experts

    protect = None
    if args.guard_super_experts:
        if not isinstance(source, Profile):
            raise UsageError("--guard-super-experts", "needs a profile, not a model", "give a profile folder")
        protect = super_experts(source)
    data = {"data_sha256": source.data_sha256} if isinstance(source, Profile) else {}
    return allocate(
        scores(source, args.method, args.seed), Routing.of(source), experts=args.experts, budget=args.budget,
        allocation=args.allocation, top_k=args.top_k, temperature=args.temperature, protect=protect,
        method=args.method, seed=args.seed, **data,
        super_experts={str(layer): sorted(ids) for layer, ids in (protect or {}).items()},
    )  # fmt: skip


def _searched(args: argparse.Namespace, profile: Profile | Checkpoint) -> tuple[Plan, dict[str, Any]]:
    """Search with the engine; returns the plan and what the search found out."""
    from leap_training.controls import SEARCHES
    from leap_training.pruning_agent import AgentConfig, best_ranking, search
    from leap_training.pruning_space import Ledger, PruningSpace, engine_evaluator
    from leap_training.saliency import Routing, scores

    items = _check_search(args, profile)
    assert isinstance(profile, Profile)
    space = PruningSpace.of(
        Routing.of(profile), experts=args.experts, budget=args.budget, allocation=args.allocation, top_k=args.top_k,
        temperature=args.temperature,
    )  # fmt: skip
    engine = open_engine(args.engine, args.model or profile.made_by.get("model") or profile.base.id, args.dtype)
    record = {"task": args.task, "seed": args.seed, "profile_data_sha256": profile.data_sha256, "notices": []}
    try:
        ledger = Ledger(engine_evaluator(engine, items), space)
        name = args.prior
        if name == "best":
            name, prior = best_ranking(profile, ledger)
        else:
            prior = scores(profile, name)
        with noted_bar(f"search {args.task}") as bar:

            def show(_: object = None) -> None:
                bar(ledger.evaluations, args.episodes, f"best reward {ledger.curve[-1]:.4f}")

            if args.method == "leap":
                plan = search(
                    profile, prior, ledger, AgentConfig(episodes=args.episodes, seed=args.seed), state=args.state,
                    data_sha256=items_sha256(items), warm=args.warm, save_policy=args.save_policy, report=show,
                    prior_method=name, **record,
                ).plan  # fmt: skip
            else:
                SEARCHES[args.method](ledger, prior, args.episodes, args.seed, show)
                plan = space.plan(ledger.best()[0], method=args.method, prior_method=name, **record)
    finally:
        engine.close()
    start = ledger.losses.get(space.best_of(prior).tobytes(), math.nan)
    more = {"prior": name, "prior_loss": start, "loss": ledger.best()[2], "evaluations": ledger.evaluations}
    return plan, more


def _check_search(args: argparse.Namespace, source: Profile | Checkpoint) -> list[Item]:
    """Refuse, before any work, what cannot be searched; returns the items that plans are scored on."""
    if not isinstance(source, Profile):
        raise UsageError(f"--method {args.method}", "needs a profile, not a model", "make one with leap profile")
    if args.task is None:
        raise UsageError(f"--method {args.method}", "needs --task", f"choose one of {', '.join(TASKS)}")
    if args.guard_super_experts:
        raise UsageError("--guard-super-experts", "is for one-shot methods", "leave it out")
    if args.episodes < 1 or args.items < 1:
        raise UsageError("--episodes, --items", f"are {args.episodes} and {args.items}", "give 1 or more")
    if args.method != "leap" and (args.state or args.warm or args.save_policy):
        raise UsageError("--state, --warm, --save-policy", f"mean nothing to {args.method}", "leave them out")
    # Validation only: the test split is never looked at, and the profile has seen the training split.
    return load_task(args.task).items("validation", args.items, args.seed)


def _source(given: str) -> Profile | Checkpoint:
    """Open a profile folder or a model."""
    if (Path(given) / "profile.json").exists() or (Path(given) / "profile.safetensors").exists():
        return Profile.load(Path(given))
    return Checkpoint.open(resolve_model(given))
