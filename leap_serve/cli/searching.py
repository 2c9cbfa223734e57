"""Searches with a running engine: one budget or several, latency in the reward, and look-ahead (methods.md §2, §4)."""

from __future__ import annotations

import argparse
import json
import math
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar, say
from leap_serve.cli.engines import LazyEngine, scoring_dtype
from leap_serve.cli.layerwise import check_form
from leap_serve.cli.search_view import search_view, tensorboard_writer
from leap_serve.encoding import items_sha256
from leap_serve.errors import UsageError
from leap_serve.files import read_json, write_bytes, write_json
from leap_serve.measure import ratio, summary
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import TASKS, load_task

if TYPE_CHECKING:
    from leap_serve.engine import Engine
    from leap_training.pruning_agent import AgentConfig
    from leap_training.pruning_space import Evaluator, Latency, Ledger, PruningSpace, Reward
    from leap_training.saliency import Scores

SETTINGS = ("batch", "learning_rate", "ppo_epochs", "patience", "reward", "shaping")
"""Flags that are fields of the agent's settings; left out, they are the agent's own defaults."""
CALIBRATED = 16
"""Plans that the latency model is made from, a quarter of which only judge it."""
ROUNDS = 12
"""Rounds of the workload, interleaved, by which chosen plans and the full model are measured at the end."""
LOOKAHEAD_ITEMS = 128
"""Validation items that tuned plans are scored on; none of them is among those of the search."""


@dataclass(frozen=True, slots=True)
class Found:
    """A plan for one budget, what is known about it, and all that its search evaluated."""

    plan: Plan
    figures: dict[str, Any]
    ledger: Ledger
    prior: Scores
    state: Path


@dataclass(frozen=True, slots=True)
class Search:
    """One command: its flags, and what all its budgets share."""

    args: argparse.Namespace
    profile: Profile
    items: Sequence[Item]
    spaces: Mapping[str, PruningSpace]
    reward: Reward
    config: AgentConfig

    @classmethod
    def of(
        cls, args: argparse.Namespace, source: Profile | Checkpoint, sizes: Mapping[str, Mapping[str, Any]]
    ) -> Search:
        """Read the flags; refuses, before any model is loaded, what cannot be searched."""
        from leap_training.controls import check_method
        from leap_training.pruning_agent import AgentConfig
        from leap_training.pruning_space import PruningSpace, Reward
        from leap_training.saliency import Routing
        from leap_training.splits import search_items

        profile = _check(args, source)
        shared = {
            "allocation": args.allocation, "top_k": args.top_k, "temperature": args.temperature, "may_stop": args.stop,
        }  # fmt: skip
        spaces = {label: PruningSpace.of(Routing.of(profile), **size, **shared) for label, size in sizes.items()}
        for space in spaces.values():
            check_method(args.method, space)
        given = {name: getattr(args, name) for name in SETTINGS if getattr(args, name) is not None}
        # Validation only: the test split is never looked at, and the profile has seen the training split.
        items = search_items(load_task(args.task), args.items, args.seed)
        if args.lookahead and not _held_out(args):
            what = f"needs validation items that the search does not see, and it sees all {len(items)} that are there"
            raise UsageError("--lookahead", what, "lower --items")
        reward = Reward(args.alpha, args.size_coef, args.latency_coef)
        return cls(args, profile, items, spaces, reward, AgentConfig(episodes=args.episodes, seed=args.seed, **given))

    @property
    def model(self) -> str:
        """The full model."""
        return str(self.args.model or self.profile.made_by.get("model") or self.profile.base.id)

    def run(self) -> dict[str, Found]:
        """Search every budget, in the order given and each warm-started by the one before; label → what was found."""
        source = Checkpoint.open(resolve_model(self.model))
        for space in self.spaces.values():
            check_form(source, space, *([] if space.uniform else ["counts"]))
        with ExitStack() as stack:
            home = self.args.state or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            engine = stack.enter_context(LazyEngine(self.args.engine, self.model, scoring_dtype(self.args.dtype)))
            latency = self._calibrated(engine, home / "latency.json") if self.reward.latency_coef else None
            found: dict[str, Found] = {}
            warm = self.args.warm
            for label, space in self.spaces.items():
                folder = home if len(self.spaces) == 1 else home / label
                evaluate = self._evaluator(engine(), folder, stack)
                found[label] = self._search(evaluate, label, space, latency, folder, warm)
                warm = folder / "policy.safetensors"
            if self.args.save_policy is not None:
                write_bytes(self.args.save_policy, warm.read_bytes())
            if self.args.lookahead:
                # A GPU may not hold the engine and a second model that is tuned.
                engine.close()
                found = {label: self._look_ahead(label, one, latency) for label, one in found.items()}
            if latency is not None or self.args.measure:
                self._measure(engine(), found)
            return found

    def _evaluator(self, engine: Engine, folder: Path, stack: ExitStack) -> Evaluator:
        """The engine's losses; kept in the folder, except the agent's, whose state holds them."""
        from leap_serve.evaluation.journal import Journal
        from leap_training.pruning_space import engine_evaluator
        from leap_training.search_state import remembered

        evaluate = engine_evaluator(engine, self.items)
        if self.args.method == "leap":
            return evaluate
        identity = [
            self.profile.base.sha256,
            items_sha256(self.items),
            self.args.engine,
            scoring_dtype(self.args.dtype),
        ]
        return remembered(evaluate, stack.enter_context(Journal(folder / "evaluations.jsonl")), " ".join(identity))

    def _search(
        self, evaluate: Evaluator, label: str, space: PruningSpace, latency: Latency | None, folder: Path,
        warm: Path | None,
    ) -> Found:  # fmt: skip
        """Search one budget by the losses of its plans."""
        from leap_training.controls import SEARCHES, Given, Material
        from leap_training.pruning_agent import search
        from leap_training.pruning_space import Ledger

        args = self.args
        ledger = Ledger(evaluate, space, self.reward, latency)
        name, prior = self._ranking(ledger, folder)
        record = {
            "task": args.task, "seed": args.seed, "profile_data_sha256": self.profile.data_sha256, "notices": [],
            "prior_method": name, "model": self.model, "engine": args.engine,
        }  # fmt: skip
        with search_view(f"search {args.task} {label}", args.episodes, self._events(label)) as view:

            def show(spent: float, metrics: Mapping[str, float] | None = None) -> None:
                _, reward, loss = ledger.best()
                view.show(int(spent), reward, loss, metrics)

            if args.method == "leap":
                # The folder says which search it was; the whole path is on the command line, or is temporary.
                record |= {"warm_start": warm.resolve().parent.name} if warm else {}
                plan = search(
                    self.profile, prior, ledger, self.config, state=folder, data_sha256=items_sha256(self.items),
                    losses_of=self._losses_of(), warm=warm, save_policy=folder / "policy.safetensors",
                    report=lambda metrics: show(ledger.evaluations, metrics), **record,
                ).plan  # fmt: skip
            else:
                material = Material(resolve_model(self.model), self.items, folder, self._losses_of())
                cost = SEARCHES[args.method](ledger, Given(prior, args.episodes, args.seed, show, material))
                if cost is not None:
                    record["cost"] = {"forward_items": cost.forward_items, "backward_items": cost.backward_items}
                chosen, reward, loss = ledger.best()
                plan = space.plan(
                    chosen, method=args.method, reward=asdict(self.reward), search_loss=loss, search_reward=reward,
                    evaluations=ledger.evaluations, search_data_sha256=items_sha256(self.items),
                    improvements=ledger.improvements(cost.marks if cost is not None else ()), **record,
                )  # fmt: skip
        start = ledger.losses.get(space.best_of(prior).tobytes())
        figures: dict[str, Any] = {"loss": ledger.best()[2], "evaluations": ledger.evaluations}
        if start is not None:  # random-search does not look at a ranking that was named
            figures = {"prior": name, "prior_loss": start, **figures}
        return Found(plan, figures, ledger, prior, folder)

    def _losses_of(self) -> dict[str, Any]:
        """What decides the losses and rewards of plans beside the model, the items and the reward's weights."""
        found = {"engine": self.args.engine, "dtype": scoring_dtype(self.args.dtype)}
        return {**found, "workload": asdict(self.args.workload)} if self.reward.latency_coef else found

    def _ranking(self, ledger: Ledger, folder: Path) -> tuple[str, Scores]:
        """The ranking to start at; the best one is found once and remembered, so that resuming costs nothing."""
        from leap_training.pruning_agent import best_ranking
        from leap_training.saliency import scores

        if self.args.prior != "best":
            return self.args.prior, scores(self.profile, self.args.prior)
        path, space = folder / "prior.json", ledger.space
        identity = {
            "model": self.profile.base.sha256, "profile_data": self.profile.data_sha256,
            "search_data": items_sha256(self.items), "budget": space.budget, "top_k": list(space.top_k),
            "allocation": self.args.allocation, "temperature": list(space.temperatures), "reward": asdict(self.reward),
            "losses_of": self._losses_of(),
        }  # fmt: skip
        known = read_json(path) if path.exists() else None
        if isinstance(known, dict) and known.get("of") == json.loads(json.dumps(identity)):
            subsets = [space.best_of(scores(self.profile, name)) for name in known["rankings"]]
            ledger.restore(subsets, known["losses"], known["rewards"])
            return known["prior"], scores(self.profile, known["prior"])
        name, prior = best_ranking(self.profile, ledger)
        rankings = _distinct(self.profile, space)
        keys = [space.best_of(scores(self.profile, one)).tobytes() for one in rankings]
        losses, rewards = [ledger.losses[key] for key in keys], [ledger.rewards[key] for key in keys]
        write_json(path, {"of": identity, "prior": name, "rankings": rankings, "losses": losses, "rewards": rewards})
        return name, prior

    def _look_ahead(self, label: str, found: Found, latency: Latency | None) -> Found:
        """Choose by the loss after a few steps of tuning: among the finalists, and with episodes by training on it."""
        from leap_training.finetune import FinetuneConfig
        from leap_training.lookahead import LookAhead, finalists, second_stage
        from leap_training.pruning_space import Ledger

        args, task, space = self.args, load_task(self.args.task), found.ledger.space
        config = FinetuneConfig(steps=args.lookahead, seed=args.seed)
        held_out = _held_out(args)
        look = LookAhead(self.model, task.items("train", config.items, args.seed), held_out, config)
        ledger = Ledger(look, space, self.reward, latency)
        chosen = finalists(found.ledger, args.finalists)
        with progress_bar(f"look ahead {label}") as bar:
            for number, subset in enumerate(chosen, 1):
                ledger([subset])
                bar(number, len(chosen))
        if args.lookahead_episodes:
            limit = len(chosen) + args.lookahead_episodes
            with search_view(f"look ahead {label}", limit, self._events(f"{label}-lookahead")) as view:
                second_stage(
                    self.profile, found.prior, ledger, replace(self.config, episodes=limit), found.state,
                    lambda metrics: view.show(ledger.evaluations, *ledger.best()[1:], metrics),
                )  # fmt: skip
        best, reward, after = ledger.best()
        before = found.ledger.losses.get(best.tobytes())
        note = {
            "steps": args.lookahead, "finalists": len(chosen), "evaluations": ledger.evaluations, "reward": reward,
            "loss_untuned": look.untuned(space.plan(best)), "loss_tuned": after, "search_loss": before,
            "held_out_sha256": items_sha256(held_out),
        }  # fmt: skip
        plan = replace(
            space.plan(best), scores=found.plan.scores, made_by={**found.plan.made_by, "lookahead": note}
        )  # fmt: skip
        return replace(found, plan=plan, figures={**found.figures, "lookahead": note})

    def _calibrated(self, engine: LazyEngine, path: Path) -> Latency:
        """A model of Latency/Latency_full on this workload: measured once, so that a resumed search keeps its rewards."""
        from leap_training.latency import LatencyModel, calibrate, sample_plans

        known = LatencyModel.load(path) if path.exists() else None
        if known and (known.base_sha256, known.workload) == (self.profile.base.sha256, self.args.workload):
            return known
        plans = sample_plans(next(iter(self.spaces.values())), CALIBRATED, self.args.seed)
        with progress_bar("calibrate latency") as bar:
            model = calibrate(engine(), plans, self.args.workload, progress=bar)
        model.save(path)
        say(
            f"latency model: off by {100 * model.mape[model.form]:.1f} % on {model.held_out} plans it was not fitted to"
        )
        return model

    def _measure(self, engine: Engine, found: Mapping[str, Found]) -> None:
        """Measure every plan and the full model, interleaved, and note TPOT and its ratio with an interval."""
        from leap_training.latency import compare

        with progress_bar("measure TPOT") as bar:
            plans = [one.plan for one in found.values()]
            full, *pruned = compare(engine, [None, *plans], self.args.workload, ROUNDS, bar)
        for one, own in zip(found.values(), pruned, strict=True):
            one.figures.update(
                tpot_ms=summary(own).median, full_tpot_ms=summary(full).median, tpot_over_full=ratio(own, full).to_json()
            )  # fmt: skip

    def _events(self, label: str) -> Path | None:
        """TensorBoard's folder for one budget's scalars."""
        return self.args.tensorboard and self.args.tensorboard / label


def _held_out(args: argparse.Namespace) -> list[Item]:
    """The validation items that tuned plans are scored on: those after the search's own."""
    from leap_training.splits import validation_part

    return validation_part(load_task(args.task), "search", args.items + LOOKAHEAD_ITEMS, args.seed)[args.items :]


def _distinct(profile: Profile, space: PruningSpace) -> list[str]:
    """The observed criteria whose own plans differ, each plan under its first name, as a ledger meets them."""
    from leap_training.saliency import OBSERVED, scores

    plans: dict[bytes, str] = {}
    for name in OBSERVED:
        plans.setdefault(space.best_of(scores(profile, name)).tobytes(), name)
    return list(plans.values())


def _check(args: argparse.Namespace, source: Profile | Checkpoint) -> Profile:
    """Refuse flags that cannot be carried out."""
    from leap_training.saliency import OBSERVED

    where = f"--method {args.method}"
    if not isinstance(source, Profile):
        raise UsageError(where, "needs a profile, not a model", "make one with leap profile")
    if args.task is None:
        raise UsageError(where, "needs --task", f"choose one of {', '.join(TASKS)}")
    if source.groups > 1:
        raise UsageError(where, f"cannot keep {source.groups} routing groups equal", "choose a one-shot --method")
    if args.episodes < 1 or args.items < 1:
        raise UsageError("--episodes, --items", f"are {args.episodes} and {args.items}", "give 1 or more")
    weights = (args.alpha, args.size_coef, args.latency_coef)
    if not all(map(math.isfinite, weights)):
        raise UsageError("--alpha, --beta, --lambda", f"are {', '.join(map(str, weights))}", "give finite numbers")
    if args.prior == "best" and args.episodes < len(OBSERVED):
        raise UsageError(
            "--prior best", f"tries {len(OBSERVED)} rankings, and --episodes allows {args.episodes} plans",
            "raise --episodes, or name a ranking",
        )  # fmt: skip
    if args.lookahead < 0 or args.lookahead_episodes < 0 or args.finalists < 1:
        raise UsageError("--lookahead, --lookahead-episodes, --finalists", "are below 0, 0 or 1", "give more")
    if args.lookahead_episodes and not args.lookahead:
        raise UsageError("--lookahead-episodes", "needs --lookahead", "give the steps to look ahead")
    if args.method != "leap" and len(args.temperature) > 1:
        raise UsageError("--temperature", f"--method {args.method} does not search it", "give one value")
    if args.tensorboard is not None:
        tensorboard_writer()
    return source
