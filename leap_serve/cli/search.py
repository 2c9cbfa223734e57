"""``leap search prof/ --method M --budget B -o plan.json``: choose the experts to retain."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli import channelwise, layerwise, taskwise
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cut.write import check_destination
from leap_serve.errors import UsageError
from leap_serve.files import check_place, new_folder, write_json
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.provenance import made_by
from leap_serve.search_flags import ONE_SHOT, READERS, SEARCHES, reads
from leap_serve.tasks.registry import TASKS
from leap_serve.workload import Workload

OBSERVED = ("frequency", "gate-mass", "ean", "ean-mean", "ean-weighted", "reap")
FRONT = "pareto.json"
GRID = (0.5, 0.707, 1.0, 1.414, 2.0)
"""What ``--temperature search`` chooses from, for each layer."""
COLUMNS = {
    "loss": ("loss", "{:.4f}"), "last_loss": ("loss in training", "{:.4f}"), "tpot_ms": ("TPOT ms", "{:.4f}"),
    "active_experts": ("active experts", "{}"), "deviation": ("deviation", "{:.4f}"),
    "parameters": ("parameters", "{:,}"), "flops_per_token": ("FLOPs per token", "{:,}"),
    "mean_flops_per_token": ("with skipping", "{:,}"),
}  # fmt: skip
"""Figures that several budgets' plans are shown with, where their method has them: heading and format."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    from leap_training.methods.registry import CHANNELWISE, LAYERWISE, TASKWISE

    searched = ("leap", *SEARCHES)
    parser.add_argument(
        "source",
        help=f"a profile folder, or the model itself: {', '.join(('random', *LAYERWISE, *TASKWISE))} take either, "
        "magnitude the model only",
    )
    parser.add_argument(
        "--method", required=True, choices=(*ONE_SHOT, *CHANNELWISE, *LAYERWISE, *TASKWISE, *searched),
        help="see leap methods",
    )  # fmt: skip
    size = parser.add_mutually_exclusive_group(required=True)
    size.add_argument(
        "--budget", type=float, nargs="+",
        help="fraction to keep of the routed experts, e.g. 0.125; intra: of every expert's channels; "
        "lexi: of the active experts",
    )  # fmt: skip
    size.add_argument("--experts", type=int, nargs="+", help="experts to keep per layer (with global: on average)")
    parser.add_argument("--allocation", default="uniform", choices=("uniform", "global"))
    parser.add_argument("--guard-super-experts", action="store_true", help="keep experts with outlying activations")
    parser.add_argument("--top-k", type=int, help="experts per token of the plan (default: the model's)")
    parser.add_argument(
        "--temperature", type=temperatures, default="1",
        help="router temperature of the plan (default 1); leap: «search», or values to choose from, e.g. 0.5,1,2",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of whatever is drawn")
    _add_searching(parser, searched)
    layerwise.add_arguments(parser)
    channelwise.add_arguments(parser)
    taskwise.add_arguments(parser)
    parser.add_argument(
        "-o", "--out", type=Path, required=True,
        help="the plan to write, e.g. plan.json; with several budgets a folder of plan-BUDGET.json and pareto.json",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace --out if it exists")


def _add_searching(parser: argparse.ArgumentParser, searched: tuple[str, ...]) -> None:
    """Add the flags of searches with an engine."""
    search = parser.add_argument_group(
        "searching", f"for {', '.join(searched)}: plans are scored by the engine on validation items of the task"
    )
    search.add_argument(
        "--task", help=f"{', '.join(TASKS)}, or a published task; also of naee, moe-i2, hc-smoe, tsep, eep"
    )
    search.add_argument("--episodes", type=int, default=500, help="plans to evaluate (default 500)")
    search.add_argument(
        "--items", type=int, default=32,
        help="validation items per evaluation (default 32); naee, moe-i2, hc-smoe: items of the training split",
    )  # fmt: skip
    search.add_argument("--prior", default="best", choices=("best", *OBSERVED), help="ranking to start at")
    search.add_argument("--model", help="the full model (default: the one that was profiled)")
    search.add_argument("--engine", default="vllm", choices=("vllm", "torch"))
    search.add_argument("--dtype", help="auto, float32, bfloat16 or float16 (default: float32 on a CPU, else auto)")
    search.add_argument("--tensorboard", type=Path, help="folder for TensorBoard's scalars")
    reward = parser.add_argument_group("reward", "R = α·1/(1 + loss) − β·(share retained) − λ·TPOT/TPOT_full")
    reward.add_argument("--alpha", type=float, default=1.0, help="weight of quality (default 1)")
    reward.add_argument("--beta", dest="size_coef", type=float, default=0.0, help="weight of size (default 0)")
    reward.add_argument("--lambda", dest="latency_coef", type=float, default=0.0, help="weight of latency (default 0)")
    reward.add_argument(
        "--workload", type=workload, default="16,16,32", help="batch, input and output tokens that λ speaks of"
    )
    reward.add_argument(
        "--reward", choices=("terminal", "dense"), help="leap: R of finished plans (default), or of every step"
    )
    reward.add_argument("--shaping", type=float, help="leap: weight of potential-based shaping by the ranking")
    reward.add_argument("--measure", action="store_true", help="measure the chosen plans' TPOT (always with λ)")
    agent = parser.add_argument_group("agent", "for leap")
    agent.add_argument("--stop", action="store_true", help="let plans keep fewer than the budget (global only)")
    agent.add_argument("--batch", type=int, help="episodes per update")
    agent.add_argument("--learning-rate", type=float, help="of the policy's shared weights")
    agent.add_argument("--ppo-epochs", type=int, help="passes over the episodes of an update")
    agent.add_argument("--patience", type=int, help="stop after so many updates without a better plan")
    agent.add_argument("--state", type=Path, help="folder to save to as the search goes, and to continue from")
    agent.add_argument("--warm", type=Path, help="policy of an earlier search to start with")
    agent.add_argument("--save-policy", type=Path, help="where to write the policy's shared weights")
    ahead = parser.add_argument_group("look-ahead", "the plan that is best before tuning need not be best after it")
    ahead.add_argument("--lookahead", type=int, default=0, metavar="N", help="judge finalists after N tuning steps")
    ahead.add_argument("--finalists", type=int, default=8, help="distinct plans to tune (default 8)")
    ahead.add_argument("--lookahead-episodes", type=int, default=0, help="leap: go on searching by that loss")


def temperatures(text: str) -> tuple[float, ...]:
    """Parse one temperature, several with commas, or «search»."""
    try:
        return GRID if text == "search" else tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is neither numbers, e.g. 1 or 0.5,1,2, nor search") from None


def workload(text: str) -> Workload:
    """Parse batch,input,output."""
    try:
        batch, given, made = (int(part) for part in text.split(","))
        return Workload("search", given, made, batch)
    except (ValueError, UsageError):
        raise argparse.ArgumentTypeError(f"{text!r} is not batch,input,output, e.g. 16,16,32") from None


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Choose, write the plans and show them."""
    from leap_training.methods.registry import CHANNELWISE, LAYERWISE, TASKWISE

    check_read(args)
    if args.method == "moe-i2":
        args.allocation = "global"  # its layers' counts follow from their importance
    sizes = _sizes(args)
    _check_out(args, len(sizes))
    source = _source(args.source)
    _check_task(args, source)
    plans: dict[str, tuple[Plan, dict[str, Any]]]
    if args.method in ONE_SHOT:
        plans = {label: (_one_shot(args, source, size), {}) for label, size in sizes.items()}
    elif args.method in CHANNELWISE:
        plans = channelwise.channelwise(args, source, sizes)
    elif args.method in TASKWISE:
        plans = taskwise.taskwise(args, source, sizes)
    elif args.method in LAYERWISE:
        plans = layerwise.layerwise(args, source, sizes)
    else:
        from leap_serve.cli.searching import Search

        plans = {label: (one.plan, one.figures) for label, one in Search.of(args, source, sizes).run().items()}
    if len(plans) == 1:
        (found,) = plans.values()
        return _single(args, *found)
    return _front(args, plans)


def _single(args: argparse.Namespace, plan: Plan, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Write and show one plan."""
    plan.save(args.out)
    table(
        f"{args.method}, {args.allocation}: {sum(plan.counts)} of {plan.num_experts * len(plan.layers)} experts"
        f" → {args.out}",
        ["layer", "experts kept", "top_k"],
        [[index, len(layer.retained), layer.top_k] for index, layer in plan.layers.items()],
    )
    if "prior" in figures:
        say(
            f"{figures['evaluations']} plans evaluated, from {figures['prior']}: "
            f"loss {figures['prior_loss']:.4f} → {figures['loss']:.4f}"
        )
    if "pruned_loss" in figures:
        say(
            f"{figures['evaluations']} candidates evaluated: loss {figures['pruned_loss']:.4f} pruned → "
            f"{figures['loss']:.4f} in the end"
        )
    if "last_loss" in figures:
        say(f"loss in training {figures['first_loss']:.4f} → {figures['last_loss']:.4f}")
    if "deviation" in figures:
        say(f"{figures['active_experts']} active experts over all layers, deviation {figures['deviation']:.4f}")
    if "parameters" in figures:
        say(f"{figures['parameters']:,} parameters, of the full model {figures['full_parameters']:,}")
    if "flops_per_token" in figures:
        skipping = f", with skipping {figures['mean_flops_per_token']:,}" if "mean_flops_per_token" in figures else ""
        say(f"FLOPs per token {figures['flops_per_token']:,}{skipping}, of the full model "
            f"{figures['full_flops_per_token']:,}")  # fmt: skip
    if ahead := figures.get("lookahead"):
        say(
            f"{ahead['evaluations']} plans tuned for {ahead['steps']} steps: the best one's loss on other items "
            f"{ahead['loss_untuned']:.4f} → {ahead['loss_tuned']:.4f}"
        )
    if "tpot_ms" in figures:
        say(f"TPOT {figures['tpot_ms']:.2f} ms, of the full model {figures['full_tpot_ms']:.2f} ms")
    notices = list(plan.made_by.get("notices", []))
    for notice in notices:
        say(f"note: {notice}")
    return {
        "out": str(args.out), "method": args.method, "allocation": args.allocation, "retained": plan.counts,
        "top_k": [layer.top_k for layer in plan.layers.values()], "num_experts": plan.num_experts,
        "fingerprint": plan.fingerprint, "notices": notices, **figures,
    }  # fmt: skip


def _front(args: argparse.Namespace, plans: Mapping[str, tuple[Plan, dict[str, Any]]]) -> dict[str, Any]:
    """Write one plan per budget and pareto.json, all or nothing, and show what each costs."""
    rows = [
        {
            "budget": label, "plan": f"plan-{label}.json", "retained": sum(plan.counts), "counts": plan.counts,
            "share": sum(plan.counts) / (plan.num_experts * len(plan.layers)), "fingerprint": plan.fingerprint,
            "top_k": [layer.top_k for layer in plan.layers.values()], "notices": list(plan.made_by.get("notices", [])),
            **figures,
        }
        for label, (plan, figures) in plans.items()
    ]  # fmt: skip
    for row in rows if "loss" in rows[0] else ():
        row["dominated"] = any(_dominates(other, row) for other in rows)
    front = {"method": args.method, "allocation": args.allocation, "task": args.task, "plans": rows}
    with new_folder(args.out, args.force) as work:
        for label, (plan, _) in plans.items():
            plan.save(work / f"plan-{label}.json")
        write_json(work / FRONT, {**front, "made_by": made_by(seed=args.seed)})
    shown = [key for key in COLUMNS if key in rows[0]]
    table(
        f"{args.method}, {args.allocation} → {args.out}",
        ["budget", "experts kept", *(COLUMNS[key][0] for key in shown), "plan"],
        [[row["budget"], row["retained"], *(COLUMNS[key][1].format(row[key]) for key in shown), row["plan"]]
         for row in rows],
    )  # fmt: skip
    for notice in dict.fromkeys(notice for row in rows for notice in row["notices"]):
        say(f"note ({', '.join(row['plan'] for row in rows if notice in row['notices'])}): {notice}")
    return {"out": str(args.out), **front}


def _dominates(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether a plan is nowhere worse than another and somewhere better: in size, loss and, where measured, TPOT."""
    keys = [key for key in ("retained", "loss", "tpot_ms") if key in one]
    return all(one[key] <= other[key] for key in keys) and any(one[key] < other[key] for key in keys)


def _sizes(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The budgets, by what their plans are called."""
    given: list[tuple[str, dict[str, Any]]] = [(f"{value:g}", {"budget": value}) for value in args.budget or ()]
    given += [(str(value), {"experts": value}) for value in args.experts or ()]
    if len(dict(given)) < len(given):
        raise UsageError("--budget, --experts", "name a size twice", "give each once")
    return dict(given)


def check_read(args: argparse.Namespace) -> None:
    """Refuse a flag that the method would ignore; one that is given its default asks for nothing."""
    parser = argparse.ArgumentParser(add_help=False)
    add_arguments(parser)
    defaults = parser.parse_args(["-", "--method", args.method, "--experts", "1", "-o", "-"])
    names = {action.dest: action.option_strings[-1] for action in parser._actions if action.option_strings}
    for flag in READERS:
        # A profile's own task is looked at once the profile is open.
        if flag != "task" and not reads(args.method, flag) and getattr(args, flag) != getattr(defaults, flag):
            raise UsageError(names[flag], f"means nothing to {args.method}", "leave it out")
    if args.seed < 0:
        raise UsageError("--seed", f"is {args.seed}", "give 0 or more")


def _check_task(args: argparse.Namespace, source: Profile | Checkpoint) -> None:
    """Refuse a task that the method would ignore; the profile's own one asks for nothing."""
    own = source.made_by.get("task") if isinstance(source, Profile) else None
    if args.task is None or reads(args.method, "task") or args.task == own:
        return
    profiled = f", and the profile is of {own}" if own else ""
    raise UsageError("--task", f"means nothing to {args.method}{profiled}", "leave it out")


def _check_out(args: argparse.Namespace, budgets: int) -> None:
    """Refuse, before any work, places that cannot be written."""
    for flag, folder in (("--out", args.out.absolute().parent), ("--state", args.state), ("--tuned", args.tuned)):
        if folder is not None:
            check_place(flag, folder)
    if budgets == 1 and args.out.is_dir():
        raise UsageError(args.out, "is a folder", "give the name of a file, e.g. plan.json")
    if args.out.exists() and not args.force and (budgets == 1 or args.out.is_file() or any(args.out.iterdir())):
        raise UsageError(args.out, "exists", "choose another --out, or pass --force to replace it")
    if args.save_policy is not None:
        check_place("--save-policy", args.save_policy.absolute().parent)
        if args.save_policy.is_dir():
            raise UsageError("--save-policy", f"{args.save_policy} is a folder", "give the name of a file")
    _keep_sources(args, budgets)


def _keep_sources(args: argparse.Namespace, budgets: int) -> None:
    """Refuse to replace what the search reads, or the state that it leaves."""
    sources, out = [Path(given) for given in (args.source, args.model) if given], args.out.resolve()
    if budgets > 1:
        for given in sources:
            check_destination(given, args.out)
        if args.state is not None:
            state = args.state.resolve()
            if state == out or out in state.parents:
                raise UsageError("--state", f"{args.state} lies in --out {args.out}", "choose another --state")
    elif args.out.exists():
        of_profile = {"profile.json", "profile.safetensors"}
        for given in sources:
            if out.parent == given.resolve() and (out.name in of_profile or (given / "config.json").exists()):
                raise UsageError(args.out, f"belongs to {given}, which the search reads", "choose another --out")
        if args.on is not None and out == args.on.resolve():
            raise UsageError(args.out, "is the plan of --on", "choose another --out")


def _one_shot(args: argparse.Namespace, source: Profile | Checkpoint, size: dict[str, Any]) -> Plan:
    """Score and allocate."""
    from leap_training.methods.easy_ep import easy_ep
    from leap_training.saliency import Routing, allocate, scores, super_experts

    if len(args.temperature) > 1:
        raise UsageError("--temperature", f"--method {args.method} does not search it", "give one value")
    protect = None
    if args.guard_super_experts:
        if not isinstance(source, Profile):
            raise UsageError("--guard-super-experts", "needs a profile, not a model", "give a profile folder")
        protect = super_experts(source)
    if args.method == "easy-ep":
        if not isinstance(source, Profile):
            raise UsageError("--method easy-ep", "needs a profile, not a model", "make one with leap profile")
        found = easy_ep(source)
    elif args.method == "magnitude":
        with progress_bar("magnitude, matrices") as bar:
            found = scores(source, args.method, progress=bar)
    else:
        found = scores(source, args.method, args.seed)
    data: dict[str, Any] = {"data_sha256": source.data_sha256} if isinstance(source, Profile) else {}
    return allocate(
        found, Routing.of(source), **size,
        allocation=args.allocation, top_k=args.top_k, temperature=args.temperature[0], protect=protect,
        method=args.method, seed=args.seed, **data,
        super_experts={str(layer): sorted(ids) for layer, ids in (protect or {}).items()},
    )  # fmt: skip


def _source(given: str) -> Profile | Checkpoint:
    """Open a profile folder or a model."""
    if (Path(given) / "profile.json").exists() or (Path(given) / "profile.safetensors").exists():
        return Profile.load(Path(given))
    return Checkpoint.open(resolve_model(given))
