"""Active learning: which items of a pool to label next (LEAP eq. 15–17 and appendix D; methods: §7).

N items, L MoE layers, E experts that are retained, H hidden. Items are judged by their input alone, the
prompt: an answer that is looked at is a label that is paid for.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch

from leap_serve.architectures import family_of
from leap_serve.encoding import encode_prompts, end_ids
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.tasks.base import Item, fingerprint
from leap_training.batch_choice import greedy, k_means_plus_plus
from leap_training.splits import refuse_test_items

Strategy = Literal["active", "random"]
Uncertainty = Literal["entropy", "margin", "output", "answer", "none"]
Diversity = Literal["nearest", "k-means++", "none"]
Layers = Literal["mean", "first", "last"]
STATE_WIDTH = 8192
"""Numbers of h(x) that are kept per item; wider states are projected, which keeps cosines within about 2 %."""


@dataclass(frozen=True, slots=True)
class Acquisition:
    """How a batch is chosen; the defaults are the paper's eq. 15–17.

    Args:
        strategy: "active", or "random" batches of the same size, the paper's baseline.
        uncertainty: u(x): "entropy" of the routers (eq. 15), "margin" between their two most probable experts
            (1 − p₍₁₎ + p₍₂₎), "output" (mean entropy of the model's next-token distribution over the prompt),
            "answer" (mean −log p of the tokens of the model's own greedy answer: no label, but decoding), or "none".
        diversity: "nearest" is Div(B) of eq. 17; "k-means++" draws items with probability (u(x) − min u)·d(x, B)²,
            after BADGE (Ash et al. 2020), whose distances themselves grow with the uncertainty; "none" takes the highest u.
        layers: u(x) and h(x) of all MoE layers (ours; the paper does not say), the first or the last alone.
        div_coef: η of eq. 17.
        al_temperature: T of eq. 16.
        random_share: part of every batch that is drawn at random instead, in [0, 1].
        candidates: items that are judged for each one chosen, drawn anew for every batch; 0 judges the whole pool.
        answer_tokens: how far "answer" decodes.
    """

    strategy: Strategy = "active"
    uncertainty: Uncertainty = "entropy"
    diversity: Diversity = "nearest"
    layers: Layers = "mean"
    div_coef: float = 1.0
    al_temperature: float = 1.0
    random_share: float = 0.0
    candidates: int = 0
    answer_tokens: int = 32

    def __post_init__(self) -> None:
        """Refuse what is out of range."""
        for name, allowed in (("strategy", Strategy), ("uncertainty", Uncertainty), ("diversity", Diversity),
                              ("layers", Layers)):  # fmt: skip
            if getattr(self, name) not in get_args(allowed):
                raise UsageError(name, f"is {getattr(self, name)!r}", f"choose one of {', '.join(get_args(allowed))}")
        if not (self.div_coef >= 0 and math.isfinite(self.div_coef)):
            raise UsageError("div_coef", f"is {self.div_coef}", "give a number of at least 0")
        if not (self.al_temperature > 0 and math.isfinite(self.al_temperature)):
            raise UsageError("al_temperature", f"is {self.al_temperature}", "give a number above 0")
        if not 0 <= self.random_share <= 1:
            raise UsageError("random_share", f"is {self.random_share}", "give a number in [0, 1]")
        if self.candidates < 0:
            raise UsageError("candidates", f"is {self.candidates}", "give at least 1, or 0 for the whole pool")
        if self.answer_tokens < 1:
            raise UsageError("answer_tokens", f"is {self.answer_tokens}", "give at least 1")


BY_ANSWER = Acquisition(uncertainty="answer", diversity="k-means++", candidates=24)
"""What `leap tune` takes. On leap-tiny's hard task it was ahead of random batches with each of three plans, where eq. 15–17
were behind them (dev/LOG.md). It decodes a greedy answer for each candidate."""


class Features(NamedTuple):
    """What an Acquisition needs to know of N items: u(x) [N] float64 and h(x) [N, D] fp32 of length 1, on the CPU."""

    u: torch.Tensor
    h: torch.Tensor


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def collect(
    model: Any,
    tokenizer: Any,
    items: Sequence[Item],
    how: Acquisition = Acquisition(),
    *,
    batch: int = 64,
    max_length: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Features:
    """Run the prompts through a transformers MoE model and keep u(x) and h(x).

    The router distribution is softmax(z*(x)/T) of the LOGITS over the experts that the model holds, for
    sigmoid routers too; means are over the prompt's tokens, padding excluded. An item without a prompt (plain
    text) is judged by its text. Batches hold prompts of similar length.

    Args:
        model: a causal LM of a supported family, full or cut; the training mode of each of its modules is left as it was.
        tokenizer: the model's.
        items: the pool.
        how: which uncertainty, of which layers.
        batch: prompts per forward pass.
        max_length: longer prompts lose their beginning; None takes the model's own limit.
        progress: called with (done, total).

    Raises:
        UnsupportedError: the model's family is unknown, or it has no router.
    """
    config = model.config.get_text_config()
    longest = max_length or config.max_position_embeddings
    ids = [one[-longest:] for one in encode_prompts(tokenizer, [item.prompt or item.answer for item in items])]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    kept = 0 if how.uncertainty == "output" else 1
    u, h = [], []
    # Parts may differ in their mode: of a model that PEFT has wrapped the adapters alone are in training mode.
    were_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with _watched(model, how) as watch:
            for start in range(0, len(order), batch):
                tokens, mask = _padded([ids[i] for i in order[start : start + batch]], model.device)
                watch.mask = mask
                logits = model(input_ids=tokens, attention_mask=mask, use_cache=False, logits_to_keep=kept).logits
                seen = watch.taken()
                if how.uncertainty == "output":
                    u.append(_mean(_entropy(logits), mask).double().cpu())
                elif how.uncertainty == "answer":
                    watch.mask = None
                    u.append(_answer_doubt(model, tokens, mask, end_ids(tokenizer), how.answer_tokens))
                else:
                    u.append(seen.u)
                h.append(seen.h)
                if progress is not None:
                    progress(min(start + batch, len(order)), len(order))
    finally:
        for module in were_training:
            module.training = True
    back = torch.tensor(order, dtype=torch.long).argsort()
    return Features(torch.cat(u)[back], torch.cat(h)[back])


class _Watch:
    """Hooks on routers that reduce their logits and inputs to u and h per row of the batch, layer by layer."""

    def __init__(self, how: Acquisition, width: int) -> None:
        self.how, self.width = how, width
        self.mask: torch.Tensor | None = None
        self._u: dict[int, torch.Tensor] = {}
        self._h: dict[int, torch.Tensor] = {}

    def see(self, layer: int, sigmoid: bool, x: torch.Tensor, output: tuple[torch.Tensor, ...]) -> None:
        """Take in a router's input [B·S, H] and output: logits first, of Llama-4 second. Without a mask, do nothing."""
        if self.mask is None:
            return
        z = output[1 if sigmoid else 0].reshape(*self.mask.shape, -1).float() / self.how.al_temperature
        if self.how.uncertainty == "margin":
            best = z.softmax(-1).topk(min(2, z.shape[-1]), -1).values
            doubt = 1 - best[..., 0] + (best[..., 1] if z.shape[-1] > 1 else 0)
        else:
            doubt = _entropy(z)
        h = _mean(x.reshape(*self.mask.shape, -1).float(), self.mask)
        if h.shape[1] > self.width:
            # One fixed Gaussian matrix for all batches and rounds (Johnson and Lindenstrauss 1984).
            draw = torch.Generator().manual_seed(layer)
            h = h @ torch.randn(h.shape[1], self.width, generator=draw).to(h.device)
        self._u[layer] = _mean(doubt, self.mask).double().cpu()
        self._h[layer] = torch.nn.functional.normalize(h, dim=1).cpu()

    def taken(self) -> Features:
        """Return mean u and concatenated h of the batch, of length 1 again."""
        layers = sorted(self._u)
        u = torch.stack([self._u[layer] for layer in layers]).mean(0)
        h = torch.cat([self._h[layer] for layer in layers], 1) / math.sqrt(len(layers))
        return Features(u if self.how.uncertainty != "none" else torch.zeros_like(u), h)


@contextmanager
def _watched(model: Any, how: Acquisition) -> Iterator[_Watch]:
    """Watch the routers of the wanted layers; the hooks are off again at the end."""
    name = type(model).__name__
    family = family_of({"model_type": model.config.get_text_config().model_type}, name)
    routers = {
        int(path.split("layers.")[-1].split(".")[0]): getattr(block, family.router)
        for path, block in model.named_modules()
        if hasattr(block, "experts") and hasattr(block, family.router)
    }
    if not routers:
        raise UnsupportedError(name, "has no router to learn from", "tune a MoE model")
    wanted = {"mean": sorted(routers), "first": [min(routers)], "last": [max(routers)]}[how.layers]
    watch, handles = _Watch(how, max(1, STATE_WIDTH // len(wanted))), []
    sigmoid = family.router_kind == "sigmoid"

    def hook(layer: int) -> Callable[..., None]:
        return lambda _router, args, output: watch.see(layer, sigmoid, args[0], output)

    try:
        handles = [routers[layer].register_forward_hook(hook(layer)) for layer in wanted]
        yield watch
    finally:
        for handle in handles:
            handle.remove()


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """Entropy in nats of softmax(logits [..., E])."""
    logp = logits.float().log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def _mean(values: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the real tokens: values [B, S] or [B, S, H] under mask [B, S] to [B] or [B, H]."""
    weight = (mask / mask.sum(1, keepdim=True)).to(values.dtype)
    return torch.einsum("bs...,bs->b...", values, weight)


def _answer_doubt(model: Any, ids: torch.Tensor, mask: torch.Tensor, ends: list[int], limit: int) -> torch.Tensor:
    """Decode greedily after prompts [B, S] and return the mean −log p of the tokens, end of text included, [B] float64."""
    # Decoding wants the padding on the left.
    pad = ids.shape[1] - mask.sum(1, keepdim=True)
    place = torch.arange(ids.shape[1], device=ids.device)[None]
    ids, mask = ids.gather(1, (place - pad) % ids.shape[1]), (place >= pad).long()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    total = torch.zeros(len(ids), dtype=torch.float64, device=ids.device)
    count, going, cache = total.clone(), mask[:, -1].bool(), None
    for _ in range(limit):
        out = model(
            input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        best = out.logits[:, -1].float().log_softmax(-1).max(-1)
        total -= best.values.double() * going
        count += going
        going &= ~torch.isin(best.indices, torch.tensor(ends, device=ids.device))
        if not going.any():
            break
        cache, ids = out.past_key_values, best.indices[:, None]
        mask = torch.cat([mask, torch.ones_like(ids)], 1)
        positions = positions[:, -1:] + 1
    return (total / count).cpu()


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask [B, S], padded on the right."""
    longest = max(map(len, rows))
    ids, mask = torch.zeros(2, len(rows), longest, dtype=torch.long)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.tensor(row)
        mask[number, : len(row)] = 1
    return ids.to(device), mask.to(device)


def select(features: Features, k: int, how: Acquisition = Acquisition(), seed: int = 0) -> list[int]:
    """Choose ``k`` of N items, increasing indices, all of them where k ≥ N; equal inputs give equal choices."""
    u, h = features
    k = min(k, len(u))
    random = np.random.default_rng(seed)
    by_chance = k if how.strategy == "random" else round(k * how.random_share)
    wanted = k - by_chance
    if how.diversity == "none":
        chosen = u.argsort(descending=True, stable=True)[:wanted].tolist()
    elif how.diversity == "nearest":
        chosen = greedy(u, h, wanted, how.div_coef)
    else:
        chosen = k_means_plus_plus(u, h, wanted, random)
    rest = np.setdiff1d(np.arange(len(u)), np.array(chosen, dtype=np.int64))
    return sorted([*chosen, *(int(i) for i in random.choice(rest, by_chance, replace=False))])


class Pool:
    """The items that may be labelled, and those that were, round by round.

    Args:
        items: train items; of several with the same prompt and answer the first stays.
        tests: the task's test items, none of which may be among ``items`` (LeapError names the first).
    """

    def __init__(self, items: Sequence[Item], tests: Sequence[Item]) -> None:
        refuse_test_items(items, tests)
        self._items: dict[str, Item] = {}
        for item in items:
            self._items.setdefault(fingerprint(item), item)
        self._rounds: list[list[str]] = []

    def __len__(self) -> int:
        return len(self._items)

    @property
    def rounds(self) -> int:
        """How many batches were selected."""
        return len(self._rounds)

    @property
    def labelled(self) -> list[Item]:
        """Every item whose label was used, in the order of selection; its length is the number of labels."""
        return [self._items[key] for batch in self._rounds for key in batch]

    @property
    def unlabelled(self) -> list[Item]:
        """What is left, in the pool's own order."""
        used = {key for batch in self._rounds for key in batch}
        return [item for key, item in self._items.items() if key not in used]

    def candidates(self, k: int, how: Acquisition, seed: int = 0) -> list[Item]:
        """The unlabelled items that the next batch of ``k`` is chosen from, in the pool's order."""
        left = self.unlabelled
        if not how.candidates or k * how.candidates >= len(left):
            return left
        random = np.random.default_rng([seed, self.rounds, 1])
        return [left[i] for i in np.sort(random.choice(len(left), k * how.candidates, replace=False))]

    def select(self, k: int, how: Acquisition, features: Features | None = None, seed: int = 0) -> list[Item]:
        """Move ``k`` items (or all that are left) to the labelled ones, and return them as one round's batch.

        Args:
            k: size of the batch, B.
            how: the strategy; "random" needs no features.
            features: collect() of ``candidates``, under the model as it is now.
            seed: of random strategies; each round draws its own numbers from it.
        """
        left = self.unlabelled
        if not left or k < 1:
            what = f"has {len(left)} unlabelled items for a batch of {k}"
            raise LeapError("the pool", what, "use fewer rounds, a positive batch, or more items")
        if how.strategy == "random":
            random = np.random.default_rng([seed, self.rounds])
            indices = sorted(int(i) for i in random.choice(len(left), min(k, len(left)), replace=False))
        else:
            left = self.candidates(k, how, seed)
            if features is None or len(features.u) != len(left):
                seen = "none" if features is None else len(features.u)
                raise ValueError(f"active learning needs features of all {len(left)} candidates, got {seen}")
            indices = select(features, k, how, seed + self.rounds)
        batch = [left[i] for i in indices]
        self._rounds.append([fingerprint(item) for item in batch])
        return batch

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON: the pool's size and the rounds' items by fingerprint."""
        return {"size": len(self), "rounds": [list(batch) for batch in self._rounds]}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Take up a state(); LeapError where it speaks of another pool."""
        keys = [key for batch in state["rounds"] for key in batch]
        if state["size"] != len(self) or not set(keys) <= set(self._items) or len(set(keys)) != len(keys):
            what = f"belongs to another pool ({state['size']} items; this one has {len(self)})"
            raise LeapError("the pool's state", what, "resume with the same --task, --data and seed, or start anew")
        self._rounds = [list(batch) for batch in state["rounds"]]
