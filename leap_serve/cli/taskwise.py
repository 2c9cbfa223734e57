"""Searches on the task itself, in transformers: TSEP trains while it prunes, EEP evolves merges (methods.md §2)."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import Checkpoint
from leap_serve.cli.console import progress_bar
from leap_serve.cli.engines import scoring_dtype
from leap_serve.cli.layerwise import check_form, model_behind
from leap_serve.encoding import items_sha256
from leap_serve.errors import UsageError
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.tasks.registry import TASKS, load_task

if TYPE_CHECKING:
    from leap_training.pruning_space import PruningSpace

Sizes = Mapping[str, Mapping[str, Any]]
Found = dict[str, tuple[Plan, dict[str, Any]]]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only these methods have."""
    group = parser.add_argument_group(
        "on the task", "tsep: trains; eep: --episodes evaluations of --items; --state resumes"
    )
    group.add_argument("--steps", type=int, help="tsep: steps of tuning (default: those of the published comparisons)")
    group.add_argument("--train-items", type=int, help="tsep: items of the training split (default as --steps')")
    group.add_argument("--tuned", type=Path, metavar="FOLDER", help="tsep: where to write the cut of the tuned model")


def taskwise(args: argparse.Namespace, source: Profile | Checkpoint, sizes: Sizes) -> Found:
    """Search every size; refuses, before the model is loaded, what cannot be searched."""
    from leap_training.pruning_space import PruningSpace

    _check(args, len(sizes))
    checkpoint, routing = model_behind(args, source)
    shared = {"allocation": args.allocation, "top_k": args.top_k, "temperature": args.temperature}
    spaces = {label: PruningSpace.of(routing, **size, **shared) for label, size in sizes.items()}
    found: Found = {}
    with ExitStack() as stack:
        home = args.state or Path(stack.enter_context(TemporaryDirectory()))
        for label, space in spaces.items():
            folder = home if len(spaces) == 1 else home / label
            found[label] = (_tsep if args.method == "tsep" else _eep)(args, checkpoint, space, folder, label)
    return found


def _tsep(
    args: argparse.Namespace, checkpoint: Checkpoint, space: PruningSpace, folder: Path, label: str
) -> tuple[Plan, dict[str, Any]]:
    from leap_training.finetune import ITEMS, STEPS, FinetuneConfig
    from leap_training.methods.blocks import BlockModel
    from leap_training.methods.tsep import Tsep, TsepConfig, check_space
    from leap_training.whole import check_writable

    tuning = FinetuneConfig(items=args.train_items or ITEMS, steps=args.steps or STEPS, seed=args.seed)
    config = TsepConfig(tuning)
    config.check()
    check_space(space)
    check_form(checkpoint, space)
    if args.tuned is not None:
        check_writable(checkpoint, args.tuned, args.force, "leave --tuned out", "--tuned")
    items = load_task(args.task).items("train", tuning.items, args.seed)
    identity = {
        "method": "tsep", "model": space.routing.base.sha256, "data": items_sha256(items), "experts": space.cap,
        "top_k": list(space.top_k), "τ": space.temperature, "steps": tuning.steps, "seed": tuning.seed,
    }  # fmt: skip
    run = Tsep(BlockModel(checkpoint, "float32"), space, items, config, args.state and folder, identity)
    with progress_bar(f"tsep {label}") as bar:
        plan = run.run(bar, task=args.task, data_sha256=items_sha256(items))
    if args.tuned is not None:
        run.save_tuned(args.tuned, plan, args.force)
    keys = ("windows", "first_loss", "last_loss")
    return plan, {"tuned": args.tuned and str(args.tuned)} | {key: plan.made_by[key] for key in keys}


def _eep(
    args: argparse.Namespace, checkpoint: Checkpoint, space: PruningSpace, folder: Path, label: str
) -> tuple[Plan, dict[str, Any]]:
    from leap_training.methods.blocks import BlockModel
    from leap_training.methods.eep import Eep, EepConfig, TaskLoss, check_space, plan_of, renormalises
    from leap_training.methods.hc_smoe import check_merge
    from leap_training.methods.merged import check_maps
    from leap_training.splits import search_items

    config = EepConfig(args.episodes, seed=args.seed)
    config.check()
    check_space(space)
    check_maps(checkpoint.family)
    check_merge(checkpoint, args.method)
    check_form(checkpoint, space, "merge")
    items = search_items(load_task(args.task), args.items, args.seed)
    model = BlockModel(checkpoint, scoring_dtype(args.dtype))
    identity = {
        "method": "eep", "model": space.routing.base.sha256, "data": items_sha256(items), "experts": space.cap,
        "top_k": list(space.top_k), "evaluations": config.evaluations, "seed": config.seed, "dtype": model.dtype,
    }  # fmt: skip
    search = Eep(TaskLoss(model, items, space), space, config, args.state and folder, identity)
    with progress_bar(f"eep {label}") as bar:
        best = search.run(bar)
    plan = plan_of(
        best, space, renormalises(model), task=args.task, items=len(items), seed=args.seed,
        search_data_sha256=items_sha256(items), search_loss=best.loss, pruned_loss=search.pruned_loss,
        evaluations=search.evaluations, dtype=model.dtype,
    )  # fmt: skip
    figures = {"loss": best.loss, "pruned_loss": search.pruned_loss, "evaluations": search.evaluations}
    return plan, figures | {"merged": plan.made_by["merged"]}


def _check(args: argparse.Namespace, sizes: int) -> None:
    """Refuse flags that mean nothing to the method."""
    where = f"--method {args.method}"
    if args.task is None:
        raise UsageError(where, "needs --task", f"choose one of {', '.join(TASKS)}")
    if args.allocation != "uniform":
        raise UsageError("--allocation", f"{args.method} retains equally many in every layer", "choose uniform")
    if len(args.temperature) > 1:
        raise UsageError("--temperature", f"{where} does not search it", "give one value")
    if args.tuned is not None and sizes > 1:
        raise UsageError("--tuned", "is for one budget", "give one --budget")
    given = (args.items, args.episodes, args.steps, args.train_items)
    if any(number is not None and number < 1 for number in given):
        raise UsageError("--items, --episodes, --steps, --train-items", "are below 1", "give 1 or more")
