"""Look-ahead: what a plan is worth after a little tuning (methods.md §4).

The plan that is best before tuning need not be best after it. So a full model is held in memory once, narrowed to
one plan after the other, tuned for a few steps exactly as :mod:`leap_training.finetune` tunes, scored on held-out
items, and widened again. Every plan sees the same batches in the same order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from leap_serve.architectures import Family
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.engines.subsets import check_plans
from leap_serve.engines.torch_subsets import Shrunk, moe_blocks
from leap_serve.errors import UsageError
from leap_serve.files import read_json
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.tasks.base import Item
from leap_training.batches import Batch, collate, weighted_loss
from leap_training.finetune import FinetuneConfig, in_order, take_steps
from leap_training.pruning_agent import Agent, AgentConfig
from leap_training.pruning_space import Chosen, Ledger
from leap_training.saliency import Scores
from leap_training.search_state import StateFolder, below, fingerprint

SCORED = 64
"""Held-out items per forward pass."""


class LookAhead:
    """An evaluator of plans: mean held-out loss per answer token, in nats, after ``config.steps`` steps of tuning.

    Experts and routers are tuned, in float32, with AdamW and a rate that falls to 0 at the last step. 0 steps
    score the plan as it is.

    Args:
        model: the full model that the plans speak of: a folder, a bundled name or a model id.
        train: items to tune on, of the task's training split.
        held_out: items to score on, disjoint from ``train`` and from every test set.
        config: steps, batch, rate, weight decay, and the seed of the order of the items.
        progress: called after every plan with (plans done, plans asked).
    """

    def __init__(
        self,
        model: str | Path,
        train: Sequence[Item],
        held_out: Sequence[Item],
        config: FinetuneConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if config.steps < 0 or (config.steps and not train) or not held_out:
            raise UsageError(
                "--lookahead", f"{config.steps} steps on {len(train)} items, scored on {len(held_out)}", "give some"
            )  # fmt: skip
        folder = resolve_model(str(model))
        self.checkpoint = Checkpoint.open(folder)
        self.identity, self.config, self.progress = self.checkpoint.identity(), config, progress
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(self.device)
        self.model.requires_grad_(False)
        self.batches = [self._collate(tokenizer, items) for items in in_order(train, config)]
        self.held_out = [
            self._collate(tokenizer, held_out[at : at + SCORED]) for at in range(0, len(held_out), SCORED)
        ]  # fmt: skip

    def __call__(self, plans: Sequence[Plan]) -> list[float]:
        """Tune and score each plan, from the same start; the model is the full one again afterwards."""
        check_plans(self.checkpoint, self.identity, plans)
        losses = []
        for plan in plans:
            with narrowed(self.model, self.checkpoint.family, plan) as tuned:
                self.tune(tuned)
                losses.append(self._score())
            if self.progress is not None:
                self.progress(len(losses), len(plans))
        return losses

    def untuned(self, plan: Plan) -> float:
        """Score a plan on the same held-out items without tuning."""
        check_plans(self.checkpoint, self.identity, [plan])
        with narrowed(self.model, self.checkpoint.family, plan):
            return self._score()

    def _collate(self, tokenizer: Any, items: Sequence[Item]) -> Batch:
        return collate(tokenizer, items, prompt_weight=0.0).to(self.device)

    def tune(self, tuned: Sequence[torch.nn.Parameter]) -> list[float]:
        """Tune the parameters that :func:`narrowed` yielded; returns the training loss before every step, in nats."""
        return take_steps(self.model, tuned, self.batches, self.config)

    def _score(self) -> float:
        """Mean loss per answer token over all held-out items together."""
        total, tokens = 0.0, 0.0
        with torch.inference_mode():
            for batch in self.held_out:
                count = float(batch.weights[:, 1:].sum())
                total += float(weighted_loss(self._logits(batch), batch)) * count
                tokens += count
        return total / tokens

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits


@contextmanager
def narrowed(model: torch.nn.Module, family: Family, plan: Plan) -> Iterator[list[torch.nn.Parameter]]:
    """Hold only a plan's experts in a transformers model, and yield its experts' and routers' weights to be tuned.

    Afterwards the model holds its own tensors again, untouched by what was done to those.
    """
    routers = [getattr(block, family.router) for block in moe_blocks(model, family).values()]
    own = [(parameter, parameter.data) for router in routers for parameter in router.parameters()]
    shrunk = Shrunk(model, family, plan)
    experts = [p for block in moe_blocks(model, family).values() for p in block.experts.parameters()]
    tuned = [*experts, *(parameter for parameter, _ in own)]
    try:
        for parameter, data in own:
            parameter.data = data.clone()
        for parameter in tuned:
            parameter.requires_grad_(True)
        yield tuned
    finally:
        for parameter in tuned:
            parameter.requires_grad_(False)
            parameter.grad = None
        for parameter, data in own:
            parameter.data = data
        shrunk.restore()


def finalists(ledger: Ledger, count: int, overlap: float = 0.7) -> list[Chosen]:
    """The best legal plans that a search evaluated, best first, no two of which are more alike than ``overlap``.

    A search ends among near-copies of one plan, which tune alike: at a Jaccard index of 0.9 eight finalists on
    leap-tiny differed by 0.014 nats after 20 steps. Fewer than ``count`` are returned where there are no more.
    """
    chosen: list[Chosen] = []
    for key in sorted(ledger.rewards, key=lambda one: -ledger.rewards[one]):
        subset = ledger.subset(key)
        if ledger.space.legal(subset) and all(jaccard(subset, other) <= overlap for other in chosen):
            chosen.append(subset)
        if len(chosen) == count:
            break
    return chosen


def jaccard(one: Chosen, other: Chosen) -> float:
    """Shared experts over all that either retains, in [0, 1]."""
    return float(np.logical_and(one, other).sum() / np.logical_or(one, other).sum())


def second_stage(
    profile: Profile,
    prior: Scores,
    ledger: Ledger,
    config: AgentConfig,
    state: Path,
    report: Callable[[dict[str, float]], None] | None = None,
) -> None:
    """Train the policy of a finished search further, on a ledger whose losses are a look-ahead's.

    Args:
        profile, prior: those of the first search.
        ledger: may know finalists already; filled in place, until it holds ``config.episodes`` plans.
        config: of this stage.
        state: folder of the first search; its subfolder ``lookahead`` takes this stage's state, and is continued.
        report: called with the metrics of every update.
    """
    agent = Agent(profile, prior, ledger, config)
    header = read_json(state / "search.json")
    tensors = load_file(state / header["tensors"])
    agent.policy.load_state_dict(below(tensors, "policy."))
    known = "".join(hashlib.sha256(key).hexdigest() for key in ledger.losses)
    disk = StateFolder(state / "lookahead", fingerprint(agent, profile, f"{header['sha256']} {known}"))
    disk.resume(agent)
    while not agent.finished:
        metrics = agent.step()
        disk.save(agent)
        if report is not None:
            report(metrics)
