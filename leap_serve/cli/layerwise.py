"""Searches that run the MoE layers themselves, without a serving engine: NAEE, MoE-I², HC-SMoE, LExI (methods.md §2, §3)."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import noted_bar, progress_bar
from leap_serve.cli.engines import scoring_dtype
from leap_serve.cut.rules import beyond_stock, check_served, check_untuned
from leap_serve.encoding import items_sha256
from leap_serve.engine import Progress
from leap_serve.engines.subsets import check_plans
from leap_serve.errors import LeapError, UsageError
from leap_serve.flops import flops_per_token
from leap_serve.plan import BaseModel, LayerPlan, Plan
from leap_serve.profile import Profile
from leap_serve.tasks.registry import TASKS, load_task

if TYPE_CHECKING:
    from leap_training.methods.blocks import BlockModel
    from leap_training.pruning_space import PruningSpace
    from leap_training.saliency import Routing

Sizes = Mapping[str, Mapping[str, Any]]
Found = dict[str, tuple[Plan, dict[str, Any]]]
"""By what a budget's plan is called: the plan, and its figures."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that only these methods have."""
    group = parser.add_argument_group(
        "layer by layer",
        "naee, moe-i2, hc-smoe: --items of --task's training split; --state resumes, and holds the layers' inputs meanwhile "
        "(else the temporary folder does: TMPDIR). lexi: sizes are of active experts",
    )
    group.add_argument("--draws", type=int, default=16, help="lexi: draws of noise per layer (N_iter, default 16)")
    group.add_argument("--solver", default="exact", choices=("exact", "evolution"), help="lexi: exact, or the paper's")
    group.add_argument("--skip", action="store_true", help="naee: skip a token's weak experts when the plan is served")
    group.add_argument("--rank", type=int, help="moe-i2: truncate the kept experts' matrices to this rank on average")
    group.add_argument("--on", type=Path, metavar="PLAN", help="lexi: choose among this plan's experts only")


def layerwise(args: argparse.Namespace, source: Profile | Checkpoint, sizes: Sizes) -> Found:
    """Search every budget; refuses, before the model is loaded, what cannot be searched."""
    _check(args)
    checkpoint, routing = model_behind(args, source)
    with ExitStack() as stack:
        home = args.state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for folder in (home, *(home / label for label in sizes)):
            # However the search ends: one that goes on from its state writes them anew.
            stack.callback(_discard, folder / "inputs")
        job = _Job(args, checkpoint, routing, home)
        run = {"lexi": job.lexi, "moe-i2": job.moe_i2, "hc-smoe": job.hc_smoe}.get(args.method, job.naee)
        return run(sizes)


def _discard(inputs: Path) -> None:
    """Remove the layers' inputs, if there are any: what does it brings transformers, which no refusal waits for."""
    if inputs.exists():
        from leap_training.methods.blocks import discard_inputs

        discard_inputs(inputs)


def model_behind(args: argparse.Namespace, source: Profile | Checkpoint) -> tuple[Checkpoint, Routing]:
    """The model that a search needs beside its source, and how it routes; UsageError where a profile is of another."""
    from leap_training.saliency import Routing

    given = args.model or (isinstance(source, Profile) and (source.made_by.get("model") or source.base.id))
    checkpoint = Checkpoint.open(resolve_model(str(given))) if given else source
    assert isinstance(checkpoint, Checkpoint)
    if isinstance(source, Checkpoint) and checkpoint.folder.resolve() != source.folder.resolve():
        raise UsageError("--model", f"is {checkpoint.folder}, and the source is {source.folder}", "leave --model out")
    check_untuned(checkpoint)
    routing = Routing.of(checkpoint)
    if isinstance(source, Profile) and source.base.sha256 != routing.base.sha256:
        raise UsageError(args.source, f"is not a profile of {checkpoint.folder}", "give --model, or the right profile")
    return checkpoint, routing


def check_form(checkpoint: Checkpoint, space: PruningSpace, *forms: str, remedy: str | None = None) -> None:
    """Raise UnsupportedError where no engine would serve the plans of a space, which have these forms (rules.OURS)."""
    check_served(checkpoint, [*forms, *(["τ"] if any(tau != 1.0 for tau in space.temperatures) else [])], remedy)


def base_of(path: Path, checkpoint: Checkpoint, identity: BaseModel) -> Plan:
    """Read the plan of --on; raises LeapError that names the file where it is no choice of this model's experts."""
    base = Plan.load(path)
    layers = base.layers.values()
    does = {
        "merges": any(layer.merge is not None for layer in layers),
        "skips": any(layer.skip is not None for layer in layers),
        "narrows": any(layer.channels for layer in layers),
        "truncates the matrices of": any(layer.ranks for layer in layers),
        "zeroes weights of": base.zeroed is not None,
    }
    if found := [verb for verb, whether in does.items() if whether]:
        raise UsageError(path, f"{' and '.join(found)} experts", "give a plan that only chooses experts")
    try:
        check_plans(checkpoint, identity, [base])
    except LeapError as error:
        raise type(error)(path if error.where == "plan 0" else error.where, error.what, error.remedy) from None
    return base


def other_base(on: Path | None) -> str | None:
    """What there is to do about the form of a plan that --on gave, whose flags are not the command's; None without one."""
    return None if on is None else f"give another plan than {on}"


@dataclass(frozen=True, slots=True)
class _Job:
    """One command, its model, and the folder of its state."""

    args: argparse.Namespace
    checkpoint: Checkpoint
    routing: Routing
    home: Path

    def naee(self, sizes: Sizes) -> Found:
        """NAEE, layer-wise or progressive."""
        from leap_training.methods.blocks import LayerResults
        from leap_training.methods.naee import check_space, naee
        from leap_training.pruning_space import PruningSpace

        args = self.args
        shared = {"allocation": args.allocation, "top_k": args.top_k, "temperature": args.temperature}
        spaces = {label: PruningSpace.of(self.routing, **size, **shared) for label, size in sizes.items()}
        for space in spaces.values():
            check_space(space, self.checkpoint.family, args.skip)
            check_form(self.checkpoint, space, *(["skip"] if args.skip else []))
        items = load_task(args.task).items("train", args.items, args.seed)
        found: Found = {}
        model = self._model()
        ids = model.encode(items)
        for label, space in spaces.items():
            identity = self._identity(model) | {
                "data": items_sha256(items), "experts": space.cap, "top_k": list(space.top_k), "τ": space.temperature
            }  # fmt: skip
            folder = self.home if len(spaces) == 1 else self.home / label
            results = LayerResults(folder / "layers.json", identity)
            with _bars(f"{args.method} {label}") as (bar, capturing):
                plan = naee(
                    model, ids, space, folder / "inputs", results, args.method == "naee-progressive", bar,
                    skip=args.skip, capturing=capturing, allocation=args.allocation, task=args.task, items=len(items),
                    tokens=sum(map(len, ids)), seed=args.seed, data_sha256=items_sha256(items), dtype=model.dtype,
                )  # fmt: skip
            keys = ("exact", "reconstruction", "dynamic_skipping")
            found[label] = plan, {key: plan.made_by[key] for key in keys} | self._flops(plan)
        return found

    def _flops(self, plan: Plan) -> dict[str, Any]:
        """FLOPs per token, and with skipping what they are on average on the calibration items."""
        figures = {
            "flops_per_token": flops_per_token(self.checkpoint, plan),
            "full_flops_per_token": flops_per_token(self.checkpoint),
        }
        if any(layer.skip is not None for layer in plan.layers.values()):
            active = {int(index): n for index, n in plan.made_by["dynamic_skipping"]["active_experts"].items()}
            figures["mean_flops_per_token"] = flops_per_token(self.checkpoint, plan, active)
        return figures

    def moe_i2(self, sizes: Sizes) -> Found:
        """MoE-I²: counts from importance, a genetic search per layer, and real blocks."""
        from leap_training.methods.blocks import LayerResults
        from leap_training.methods.moe_i2 import MoeI2Config, check_rank, comes_even, moe_i2
        from leap_training.methods.naee import check_temperatures
        from leap_training.pruning_space import PruningSpace

        args = self.args
        config = MoeI2Config(rank=args.rank, seed=args.seed)
        config.check()
        if args.rank is not None:
            check_rank(self.checkpoint)
        shared = {"allocation": "global", "top_k": args.top_k, "temperature": args.temperature}
        spaces = {label: PruningSpace.of(self.routing, **size, **shared) for label, size in sizes.items()}
        for space in spaces.values():
            check_temperatures(self.checkpoint.family, space.temperatures)
            check_form(self.checkpoint, space)
            if not comes_even(space):
                check_form(self.checkpoint, space, "counts", remedy="choose another --method")
        items = load_task(args.task).items("train", args.items, args.seed)
        model = self._model()
        ids = model.encode(items)
        found: Found = {}
        for label, space in spaces.items():
            identity = self._identity(model) | {
                "data": items_sha256(items), "budget": space.budget, "top_k": list(space.top_k),
                "τ": space.temperature, "seed": args.seed,
            }  # fmt: skip
            folder = self.home if len(spaces) == 1 else self.home / label
            results = LayerResults(folder / "layers.json", identity)
            with _bars(f"moe-i2 {label}") as (bar, capturing):
                plan = moe_i2(
                    model, ids, space, self.home / "inputs", results, config, bar, capturing, task=args.task, items=len(items),
                    tokens=sum(map(len, ids)), seed=args.seed, data_sha256=items_sha256(items), dtype=model.dtype,
                )  # fmt: skip
            keys = ("pruned", "layer_importance", "reconstruction")
            found[label] = plan, {key: plan.made_by[key] for key in keys} | self._flops(plan)
        return found

    def lexi(self, sizes: Sizes) -> Found:
        """LExI, alone or among the experts of another plan; one measurement serves every budget."""
        from leap_training.methods.blocks import LayerResults
        from leap_training.methods.lexi import LexiConfig, active_budget, check_top_k, comes_even, lexi
        from leap_training.methods.naee import check_temperatures

        args = self.args
        config = LexiConfig(draws=args.draws, solver=args.solver, seed=args.seed)
        config.check()
        base = self._base()
        check_top_k(base)
        temperatures = [layer.temperature for layer in base.layers.values()]
        check_temperatures(self.checkpoint.family, temperatures, args.on)
        totals = {label: active_budget(base, config.k_min, **size) for label, size in sizes.items()}
        kept = [form for form in beyond_stock(base) if form != "top_k"]
        check_served(self.checkpoint, kept, other_base(args.on))
        if not all(comes_even(base, total, config.k_min) for total in totals.values()):
            check_served(self.checkpoint, ["top_k"], "choose another --method, or a smaller --top-k with it")
        model = self._model()
        identity = self._identity(model) | {
            "base": base.fingerprint, "draws": config.draws, "tokens": config.tokens, "seed": config.seed
        }  # fmt: skip
        results = LayerResults(self.home / "layers.json", identity)
        found: Found = {}
        for label, total in totals.items():
            with progress_bar(f"lexi {label}") as bar:
                plan = lexi(model, base, total, config, results, bar, on=args.on and str(args.on), dtype=model.dtype)
            found[label] = plan, {
                "active_experts": total, "deviation": plan.made_by["deviation"],
                "share": total / sum(layer.top_k for layer in base.layers.values()), **self._flops(plan),
            }  # fmt: skip
        return found

    def hc_smoe(self, sizes: Sizes) -> Found:
        """HC-SMoE: clusters of experts, merged."""
        from leap_training.methods.blocks import LayerResults
        from leap_training.methods.hc_smoe import check_merge, hc_smoe
        from leap_training.methods.naee import check_temperatures
        from leap_training.pruning_space import PruningSpace

        args = self.args
        shared = {"allocation": args.allocation, "top_k": args.top_k, "temperature": args.temperature}
        spaces = {label: PruningSpace.of(self.routing, **size, **shared) for label, size in sizes.items()}
        check_merge(self.checkpoint, args.method)
        for space in spaces.values():
            check_temperatures(self.checkpoint.family, space.temperatures)
            check_form(self.checkpoint, space, "merge")
        items = load_task(args.task).items("train", args.items, args.seed)
        model = self._model()
        ids = model.encode(items)
        found: Found = {}
        for label, space in spaces.items():
            identity = self._identity(model) | {"data": items_sha256(items), "experts": space.cap}
            folder = self.home if len(spaces) == 1 else self.home / label
            results = LayerResults(folder / "layers.json", identity)
            with _bars(f"hc-smoe {label}") as (bar, capturing):
                plan = hc_smoe(
                    model, ids, space, self.home / "inputs", results, bar, capturing, task=args.task, items=len(items),
                    tokens=sum(map(len, ids)), seed=args.seed, data_sha256=items_sha256(items), dtype=model.dtype,
                )  # fmt: skip
            found[label] = plan, {"clusters": plan.made_by["clusters"]} | self._flops(plan)
        return found

    def _base(self) -> Plan:
        """The plan whose experts LExI chooses among; without --on, all of them."""
        if self.args.on is not None:
            return base_of(self.args.on, self.checkpoint, self.routing.base)
        every, tau = tuple(range(self.routing.num_experts)), self.args.temperature[0]
        layers = {index: LayerPlan(every, k, tau) for index, k in self.routing.top_k.items()}
        return Plan(self.routing.base, self.routing.num_experts, layers)

    def _model(self) -> BlockModel:
        from leap_training.methods.blocks import BlockModel

        return BlockModel(self.checkpoint, scoring_dtype(self.args.dtype))

    def _identity(self, model: BlockModel) -> dict[str, Any]:
        return {"method": self.args.method, "model": self.routing.base.sha256, "dtype": model.dtype}


@contextmanager
def _bars(label: str) -> Iterator[tuple[Progress, Progress]]:
    """Yield a bar's two callbacks: of the search's own steps, and of the pass before them that writes layers' inputs."""
    with noted_bar(label) as bar:
        yield (lambda done, total: bar(done, total, "")), (lambda done, total: bar(done, total, "inputs, items"))


def _check(args: argparse.Namespace) -> None:
    """Refuse flags that mean nothing to the method."""
    where = f"--method {args.method}"
    if len(args.temperature) > 1:
        raise UsageError("--temperature", f"{where} does not search it", "give one value")
    if args.on is not None and args.temperature != (1.0,):
        raise UsageError("--temperature", "--on brings its own τ", "leave it out")
    if args.method != "lexi" and args.task is None:
        raise UsageError(where, "needs --task", f"choose one of {', '.join(TASKS)}")
    if args.items < 1:
        raise UsageError("--items", f"is {args.items}", "give 1 or more")
