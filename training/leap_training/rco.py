"""Experts chosen by gradients (RCO-style, methods.md §2): learned scores α, Gumbel noise, a hard budget, KL to the full model.

The direct learned rival of the pruning agent. Each step draws a subset, the best of α + noise within the exact
budget; runs the model with every router restricted to it; and sends the gradient of KL(full ‖ restricted) to α,
straight through the hard choice, as if the mask were σ((α + noise − λ)/T) with λ such that the mask sums to the
budget. Dropped experts that a router would have chosen are computed as well, at weight zero, so that the gradient
knows what adding them would do. All that decides how it goes on is written at every check (Training).

L MoE layers, E experts, T tokens, K experts per token, V vocabulary. Softmax routers (renormalised or not,
GPT-OSS's included) and sigmoid routers with a correction bias; not Llama-4, whose weight multiplies an expert's
input, so that a dropped expert has no gradient.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from transformers import AutoModelForCausalLM, AutoTokenizer

from leap_serve.architectures import Family
from leap_serve.checkpoint import Checkpoint
from leap_serve.encoding import items_sha256
from leap_serve.errors import CheckpointError, UnsupportedError, UsageError
from leap_serve.files import write_bytes
from leap_serve.tasks.base import Item
from leap_training.batches import collate
from leap_training.pruning_space import Chosen, Ledger, PruningSpace
from leap_training.saliency import Scores
from leap_training.tune_state import load_optimizer, optimizer_tensors

STATE = "rco.safetensors"
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
        check: evaluations' worth of training between two evaluations of the noiseless plan, and between two
            states.
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
    report: Callable[[float], None] | None = None,
    config: RcoConfig = RcoConfig(),
    state: Path | None = None,
    identity: Mapping[str, Any] | None = None,
) -> Cost:
    """Train α, evaluating the plan it stands for now and then; the ledger's best is the find.

    Args:
        model: folder of the full checkpoint; loaded in float32 by transformers, and freed at the end.
        ledger: holds the space and evaluates plans.
        scores: the ranking to start at.
        items: to learn from; each pass over all of them counts as one evaluation.
        evaluations: to spend, in all. Backward passes (about two forward passes' work each) come on top.
        seed: of noise and batches.
        report: called with the evaluations' worth spent whenever another whole one is; in the end with all of them.
        state: folder that is written to at every check and continued from, to the same bits; or None.
        identity: what decides the ledger's losses beside model, items and reward, for a state to be continued (JSON).

    Raises UnsupportedError for routers that have no useful gradient, UsageError where ``state`` is of another search,
    CheckpointError where it is damaged.
    """
    training = Training(ledger, scores, len(items), evaluations, seed, config)
    told = report or (lambda _: None)
    path = None if state is None else state / STATE
    of = {} if path is None else {**training.identity(model, scores, items, seed), **(identity or {})}

    def check() -> None:
        training.check()
        if path is not None:
            training.save(path, of)

    resumed = path is not None and training.resume(path, of)
    if not (resumed and training.finished):
        # Where a search is resumed, this repeats the full model's pass; it stays counted once, as if never killed.
        student = Student(model, items, ledger.space, config)
        training.evaluate(ledger.space.best_of(scores))
        told(training.spent)
        while not training.finished:
            before = int(training.spent)
            training.step(student)
            if training.spent >= training.following:
                check()
            if int(training.spent) > before:
                told(training.spent)
        check()
    # What is left pays for nothing more.
    told(max(training.spent, evaluations))
    return Cost(training.forward, training.backward, tuple(training.marks))


class Training:
    """α on its way: the scores, Adam, what is drawn from, and what was spent.

    Args:
        ledger: evaluates plans; what it holds already was spent before.
        scores: the ranking to start at.
        items: how many there are.
        evaluations: to spend, in all.
        seed: of noise and batches.
    """

    def __init__(
        self, ledger: Ledger, scores: Scores, items: int, evaluations: int, seed: int, config: RcoConfig
    ) -> None:
        self.ledger, self.items, self.evaluations, self.config = ledger, items, evaluations, config
        self.random = torch.Generator().manual_seed(seed)
        self.alpha = start(scores, ledger.space, config.spread).requires_grad_()
        self.optimizer = torch.optim.Adam([self.alpha], config.learning_rate)
        self.order = torch.zeros(0, dtype=torch.long)
        """Items [≤ n] that are left of this pass over all of them."""
        # The full model's own pass.
        self.forward, self.backward = items, 0
        self.marks = [float(n) for n in range(1, ledger.evaluations + 1)]
        self.begun = self.spent
        self.following = self.begun + config.check
        """Evaluations' worth at which the plan is evaluated next."""

    @property
    def spent(self) -> float:
        """Evaluations' worth so far."""
        return self.ledger.evaluations + self.forward / self.items

    @property
    def batch(self) -> int:
        """Items per step."""
        return min(self.config.batch, self.items)

    @property
    def finished(self) -> bool:
        """Whether what is left does not pay for a step and for the last plan."""
        return self.spent + self.batch / self.items + 1 > self.evaluations

    def evaluate(self, chosen: Chosen) -> None:
        """Evaluate a plan [L, E], if it is new, and note what had been spent by then."""
        known = self.ledger([chosen], self.evaluations)[0] is not None
        if known and self.ledger.evaluations > len(self.marks):
            self.marks.append(self.spent)

    def check(self) -> None:
        """Evaluate the plan that α stands for."""
        self.evaluate(hardest(self.alpha.detach(), self.ledger.space).numpy())
        self.following = self.spent + self.config.check

    def step(self, student: Student) -> None:
        """One step of Adam, on the next items."""
        config, alpha = self.config, self.alpha
        if len(self.order) < self.batch:
            self.order = torch.randperm(self.items, generator=self.random)
        share, self.order = self.order[: self.batch], self.order[self.batch :]
        left = 1 - (self.spent - self.begun) / max(1e-9, self.evaluations - self.begun)
        noise = -torch.empty_like(alpha).exponential_(generator=self.random).log() * config.noise * left
        mask = straight_through(alpha + noise, self.ledger.space, config.temperature)
        loss = student.divergence(share.tolist(), mask)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        self.forward, self.backward = self.forward + len(share), self.backward + len(share)

    def identity(self, model: Path, scores: Scores, items: Sequence[Item], seed: int) -> dict[str, Any]:
        """What must be the same for a state to be continued: model, data, space, start, reward and settings."""
        space, digest = self.ledger.space, hashlib.sha256()
        for layer in space.layers:
            digest.update(np.ascontiguousarray(scores[layer], np.float64).tobytes())
        for key in self.ledger.losses:
            digest.update(key)
        return {
            "model": Checkpoint.open(model).identity().sha256, "search_data": items_sha256(items),
            "prior_and_start": digest.hexdigest(), "budget": space.budget, "cap": space.cap, "top_k": list(space.top_k),
            "uniform": space.uniform, "temperatures": list(space.temperatures), "reward": asdict(self.ledger.reward),
            "evaluations": self.evaluations, "seed": seed, "settings": asdict(self.config),
        }  # fmt: skip

    def save(self, path: Path, of: Mapping[str, Any]) -> None:
        """Write everything that decides how it goes on, all or nothing; ``of``: of which search (JSON)."""
        note = {
            "of": of, "forward": self.forward, "backward": self.backward, "following": self.following,
            "marks": self.marks, "losses": list(self.ledger.losses.values()),
            "rewards": list(self.ledger.rewards.values()),
        }  # fmt: skip
        tensors = {
            "alpha": self.alpha.detach(), "order": self.order.clone(), "generator": self.random.get_state(),
            "plans": torch.from_numpy(np.stack([self.ledger.subset(key) for key in self.ledger.losses])),
            **optimizer_tensors(self.optimizer, {"alpha": self.alpha}),
        }  # fmt: skip
        write_bytes(path, save(tensors, {"rco": json.dumps(note)}))

    def resume(self, path: Path, of: Mapping[str, Any]) -> bool:
        """Continue what :meth:`save` wrote; False where nothing is. Raises where it is damaged, or of another search."""
        if not path.exists():
            return False
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["rco"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            there = dict(note["of"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise CheckpointError(path, "is no state of rco", "remove it, or choose another --state") from None
        for key, value in json.loads(json.dumps(of)).items():
            if there.get(key) != value:
                raise UsageError(
                    path, f"{key} is {there.get(key)} there and {value} now",
                    "repeat the same command to resume, or choose another --state",
                )  # fmt: skip
        with torch.no_grad():
            self.alpha.copy_(tensors["alpha"])
        load_optimizer(self.optimizer, {"alpha": self.alpha}, tensors)
        self.random.set_state(tensors["generator"])
        self.ledger.restore([plan.numpy() for plan in tensors["plans"]], note["losses"], note["rewards"])
        self.order, self.marks, self.following = tensors["order"], note["marks"], note["following"]
        self.forward, self.backward = note["forward"], note["backward"]
        return True


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
