"""Experts chosen by gradients (RCO-style, methods.md §2): learned scores α, Gumbel noise, a hard budget, KL to the full model.

The direct learned rival of the pruning agent. Each step draws a subset, the best of α + noise within the exact
budget; runs the model with every router restricted to it; and sends the gradient of KL(full ‖ restricted) to α,
straight through the hard choice, as if the mask were σ((α + noise − λ)/T) with λ such that the mask sums to the
budget. Dropped experts that a router would have chosen are computed as well, at weight zero, so that the gradient
knows what adding them would do.

L MoE layers, E experts, T tokens, K experts per token, V vocabulary. Softmax routers (renormalised or not,
GPT-OSS's included) and sigmoid routers with a correction bias; not Llama-4, whose weight multiplies an expert's
input, so that a dropped expert has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from leap_serve.architectures import Family
from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import UnsupportedError
from leap_serve.tasks.base import Item
from leap_training.batches import collate
from leap_training.pruning_space import Chosen, Ledger, PruningSpace
from leap_training.saliency import Scores

LARGEST = 20.0
"""Of a dropped expert's logit above the best retained one; e²⁰ is as good as certain, and finite."""


@dataclass(frozen=True, slots=True)
class RcoConfig:
    """Settings.

    Args:
        batch: items per step; a step's forward pass counts batch/items of an evaluation, its backward pass nothing.
        learning_rate: Adam's, on α.
        spread: standard deviation of α at the start, where it is the ranking; in units of the noise's scale.
        noise: scale of the Gumbel noise, falling linearly to zero.
        temperature: T of the relaxed mask.
        check: evaluations' worth of training between two evaluations of the noiseless plan.
    """

    batch: int = 8
    learning_rate: float = 0.3
    spread: float = 1.0
    noise: float = 1.0
    temperature: float = 1.0
    check: int = 25


@dataclass(frozen=True, slots=True)
class Cost:
    """What the search spent.

    Args:
        forward_items, backward_items: items passed through the model in training, the full model's pass included.
        marks: evaluations' worth (plans evaluated + forward_items/items) spent when each plan was evaluated.
    """

    forward_items: int
    backward_items: int
    marks: tuple[float, ...]


def rco(
    model: Path,
    ledger: Ledger,
    scores: Scores,
    items: Sequence[Item],
    evaluations: int,
    seed: int,
    report: Callable[[Ledger], None] | None = None,
    config: RcoConfig = RcoConfig(),
) -> Cost:
    """Train α, evaluating the plan it stands for now and then; the ledger's best is the find.

    Args:
        model: folder of the full checkpoint; loaded in float32 by transformers, and freed at the end.
        ledger: holds the space and evaluates plans.
        scores: the ranking to start at.
        items: to learn from; each pass over all of them counts as one evaluation.
        evaluations: to spend, in all. Backward passes (about two forward passes' work each) come on top.
        seed: of noise and batches.
        report: called after every plan evaluated.

    Raises UnsupportedError for routers that have no useful gradient.
    """
    student = Student(model, items, ledger.space, config)
    random = torch.Generator().manual_seed(seed)
    alpha = start(scores, ledger.space, config.spread).requires_grad_()
    optimizer = torch.optim.Adam([alpha], config.learning_rate)
    marks = [float(n) for n in range(1, ledger.evaluations + 1)]
    # The full model's own pass.
    forward, backward, order = len(items), 0, torch.zeros(0, dtype=torch.long)

    def spent() -> float:
        return ledger.evaluations + forward / len(items)

    def evaluate(chosen: Chosen) -> None:
        if ledger([chosen], evaluations)[0] is not None and ledger.evaluations > len(marks):
            marks.append(spent())
        if report is not None:
            report(ledger)

    begun, batch = spent(), min(config.batch, len(items))
    evaluate(ledger.space.best_of(scores))
    following = begun + config.check
    # What is left pays for a step and for the last plan.
    while spent() + batch / len(items) + 1 <= evaluations:
        if len(order) < batch:
            order = torch.randperm(len(items), generator=random)
        share, order = order[:batch], order[batch:]
        left = 1 - (spent() - begun) / max(1e-9, evaluations - begun)
        noise = -torch.empty_like(alpha).exponential_(generator=random).log() * config.noise * left
        loss = student.divergence(share.tolist(), straight_through(alpha + noise, ledger.space, config.temperature))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        forward, backward = forward + len(share), backward + len(share)
        if spent() >= following:
            evaluate(hardest(alpha.detach(), ledger.space).numpy())
            following = spent() + config.check
    evaluate(hardest(alpha.detach(), ledger.space).numpy())
    return Cost(forward, backward, tuple(marks))


def start(scores: Scores, space: PruningSpace, spread: float) -> torch.Tensor:
    """Return α [L, E] in the order of the ranking: standardised logarithms of each expert's share of its layer."""
    found = np.stack([np.asarray(scores[layer], np.float64) for layer in space.layers])
    share = np.log(np.maximum(found / np.maximum(found.sum(1, keepdims=True), 1e-300), 1e-6))
    return torch.from_numpy(spread * (share - share.mean()) / max(float(share.std()), 1e-9)).float()


def hardest(values: torch.Tensor, space: PruningSpace) -> torch.Tensor:
    """Return the subset [L, E] of the highest values [L, E] that spends the budget and fills every layer's floor."""
    if space.uniform:
        return torch.zeros_like(values).scatter_(1, values.topk(space.cap, 1).indices, 1.0).bool()
    first = values.clone()
    for row, floor in enumerate(space.top_k):
        first[row, values[row].topk(floor).indices] = torch.inf
    return (
        torch.zeros(values.numel()).scatter_(0, first.flatten().topk(space.budget).indices, 1.0).bool().view_as(values)
    )


def straight_through(values: torch.Tensor, space: PruningSpace, temperature: float) -> torch.Tensor:
    """Return a mask [L, E] whose values are the hard subset's, and whose gradient is the relaxed mask's."""
    rows = values if space.uniform else values.view(1, -1)
    soft = relaxed(rows, space.cap if space.uniform else space.budget, temperature).view_as(values)
    return hardest(values.detach(), space).float() + soft - soft.detach()


def relaxed(values: torch.Tensor, budget: int, temperature: float) -> torch.Tensor:
    """Return σ((v − λ)/T) of rows [R, N], each with the λ for which it sums to the budget; exact gradients, λ's too."""
    scaled = values / temperature
    with torch.no_grad():
        low, high = scaled.amin(1, keepdim=True) - 30, scaled.amax(1, keepdim=True) + 30
        for _ in range(60):
            middle = (low + high) / 2
            over = (scaled - middle).sigmoid().sum(1, keepdim=True) > budget
            low, high = torch.where(over, middle, low), torch.where(over, high, middle)
        mask = (scaled - high).sigmoid()
        slope = (mask * (1 - mask)).sum(1, keepdim=True).clamp_min(1e-6)
    # One step of Newton's method moves λ by nothing, and gives it its derivative.
    shift = high + ((scaled - high).sigmoid().sum(1, keepdim=True) - budget) / slope
    return (scaled - shift).sigmoid()


class GatedRouter:
    """A forward hook on one router; ``mask`` [E] must hold 0 or 1, and may carry a gradient."""

    def __init__(self, family: Family, top_k: int, temperature: float) -> None:
        self.family, self.top_k, self.temperature = family, top_k, temperature
        self.mask: torch.Tensor | None = None

    def __call__(self, router: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Replace (logits [T, E], weights [T, K], ids [T, K]) by the masked router's, dropped rivals at weight zero."""
        if self.mask is None:
            return output
        z, hard = output[0].float() / self.temperature, self.mask.detach() > 0.5
        biased = self.family.router_kind == "sigmoid-bias"
        # Of softmax routers e^z over the best retained one's: its normaliser cancels below.
        best = z.masked_fill(~hard, -torch.inf).amax(-1, keepdim=True)
        affinity = z.sigmoid() if biased else (z - best).clamp_max(LARGEST).exp()
        choice = (affinity + router.e_score_correction_bias if biased else z).detach()
        kept = choice.masked_fill(~hard, -torch.inf).topk(self.top_k, -1).indices
        rivals = choice.topk(router.top_k, -1).indices
        gated = self.mask * affinity
        # Rivals that are retained are among the kept already.
        weights = torch.cat([gated.gather(1, kept), gated.gather(1, rivals).masked_fill(hard[rivals], 0.0)], -1)
        if self.family.sums_to_one(router):
            weights = weights / weights.sum(-1, keepdim=True)
        elif not biased:
            weights = weights / gated.sum(-1, keepdim=True)
        weights = weights * getattr(router, "routed_scaling_factor", 1.0)
        return output[0], weights.to(output[1].dtype), torch.cat([kept, rivals], -1)


@contextmanager
def gated_routers(model: torch.nn.Module, family: Family, space: PruningSpace) -> Iterator[list[GatedRouter]]:
    """Hook every router of a transformers model, in the order of the layers; the hooks are off again at the end."""
    gates: list[GatedRouter] = []
    handles = []
    try:
        for block in model.modules():
            if hasattr(block, "experts") and hasattr(block, family.router):
                gates.append(GatedRouter(family, space.top_k[len(gates)], space.temperature))
                handles.append(getattr(block, family.router).register_forward_hook(gates[-1]))
        if len(gates) != len(space.layers):
            raise UnsupportedError(
                "--method rco",
                f"finds {len(gates)} routers, the profile {len(space.layers)}",
                "choose another --method",
            )
        yield gates
    finally:
        for handle in handles:
            handle.remove()


class Student:
    """The model whose routers α restricts, and what the full model said of the items."""

    def __init__(self, folder: Path, items: Sequence[Item], space: PruningSpace, config: RcoConfig) -> None:
        self.family = Checkpoint.open(folder).family
        if self.family.weight_on_input:
            raise UnsupportedError(
                "--method rco", f"{self.family.model_type} weighs its experts' inputs: a dropped one has no gradient",
                "choose another --method",
            )  # fmt: skip
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.model.requires_grad_(False)
        self.items, self.space = items, space
        with torch.no_grad():
            parts = [range(at, min(at + config.batch, len(items))) for at in range(0, len(items), config.batch)]
            self.wanted = [logprobs for part in parts for logprobs in self._logprobs(part)]

    def _logprobs(self, numbers: Sequence[int]) -> list[torch.Tensor]:
        """Of each item, log-probabilities [answer tokens, V] of what comes next, at every token of its answer."""
        batch = collate(self.tokenizer, [self.items[number] for number in numbers], prompt_weight=0.0)
        logits = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits[:, :-1]
        answered = batch.weights[:, 1:] > 0
        return [row[at].float().log_softmax(-1) for row, at in zip(logits, answered, strict=True)]

    def divergence(self, numbers: Sequence[int], mask: torch.Tensor) -> torch.Tensor:
        """KL(full ‖ restricted to the mask [L, E]) in nats, mean over the answer tokens of these items."""
        with gated_routers(self.model, self.family, self.space) as gates:
            for gate, row in zip(gates, mask, strict=True):
                gate.mask = row
            found = torch.cat(self._logprobs(numbers))
        wanted = torch.cat([self.wanted[number] for number in numbers])
        return (wanted.exp() * (wanted - found)).sum(-1).mean()
