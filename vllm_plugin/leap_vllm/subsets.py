"""Many plans in one running vLLM model: every token is routed among its own request's experts only.

C plans are loaded at a time, slot 0 being «no plan»; T tokens, E experts of a layer, K the model's top_k.
A request names its slot in ``SamplingParams.extra_args["leap_plan"]``. Dropped experts get the logit −inf,
the rest is divided by τ, and slots beyond the plan's own top_k get the weight 0, so that shapes stay as
they are. What comes out is the routing of the checkpoint cut to that plan (methods: §5).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from leap_serve.errors import LeapError, UnsupportedError
from leap_vllm import compat, compat_runners
from leap_vllm.heads import HeadTable, LayerHead, TokensOf

REQUEST_KEY = "leap_plan"
"""Key of the slot in a request's extra_args (over HTTP: vllm_xargs)."""
PlainPlan = Mapping[int, tuple[Sequence[int], int, float]]
"""MoE layer → (retained ids, top_k, τ); plain data, since it crosses processes."""
MAX_SLOTS = 65
"""Plans that are loaded at one time, and slot 0."""


class LayerTable:
    """What up to C − 1 plans say of one layer: penalty [C, E] float32 (0 or −inf), top_k [C] int64, temperature [C] float32.

    The tensors are made once and written in place, since CUDA graphs remember where they lie.

    Args:
        num_experts: E.
        top_k: K, that of slot 0.
        device: of the layer.
        fixed: every step takes the same path, whatever the plans are: logits in float32, τ and top_k applied even
            where they change nothing. Without it steps are spared what their plans do not ask for.
    """

    def __init__(self, num_experts: int, top_k: int, device: torch.device, *, fixed: bool = False) -> None:
        self.penalty = torch.zeros(MAX_SLOTS, num_experts, device=device)
        self.top_k = torch.full((MAX_SLOTS,), top_k, dtype=torch.long, device=device)
        self.temperature = torch.ones(MAX_SLOTS, device=device)
        self.fixed = self.scaled = self.limited = fixed

    def load(self, plans: Sequence[tuple[Sequence[int], int, float]]) -> None:
        """Write (retained ids, top_k, τ) into slots 1, 2, …; the slots behind them are «no plan»."""
        self._write(1, plans)
        self.clear(slice(len(plans) + 1, MAX_SLOTS))

    def put(self, slot: int, plan: tuple[Sequence[int], int, float]) -> None:
        """Write one slot and leave the others alone, whose requests may be running."""
        self._write(slot, [plan])
        self._settle()

    def clear(self, slots: int | slice) -> None:
        """Make slots «no plan»."""
        self.penalty[slots], self.top_k[slots], self.temperature[slots] = 0.0, self.top_k[0], 1.0
        self._settle()

    def _write(self, first: int, plans: Sequence[tuple[Sequence[int], int, float]]) -> None:
        slots = slice(first, first + len(plans))
        penalty = torch.full((len(plans), self.penalty.shape[1]), float("-inf"))
        for row, (retained, _, _) in zip(penalty, plans, strict=True):
            row[list(retained)] = 0.0
        self.penalty[slots] = penalty.to(self.penalty.device)
        self.top_k[slots] = torch.tensor([k for _, k, _ in plans], dtype=torch.long, device=self.top_k.device)
        self.temperature[slots] = torch.tensor([tau for _, _, tau in plans], device=self.temperature.device)

    def _settle(self) -> None:
        # bf16 logits stay bf16 where no τ asks for more, as they do in the stock router of a cut.
        self.scaled = self.fixed or bool((self.temperature != 1.0).any())
        self.limited = self.fixed or bool((self.top_k < self.top_k[0]).any())


def route(
    table: LayerTable,
    slots: torch.Tensor,
    logits: torch.Tensor,
    choosing: compat.Choosing,
    stock: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route logits [T, E] by the plans in slots [T], or [1] where all tokens share one; returns weights and ids [T, K].

    ``stock`` is vLLM's routing of given logits. It serves all routers whose choice follows the logits
    alone (softmax, renormalised or not, top-k before softmax, Llama-4's sigmoid): −inf is never chosen
    before a retained expert, and weighs nothing. A correction bias or groups get a branch of our own.
    """
    if table.scaled:
        logits = logits.float() / table.temperature.index_select(0, slots)[:, None]
    penalty = table.penalty.index_select(0, slots)
    if choosing.biased:
        ids, weights, merit = _biased(logits, penalty, choosing)
        if table.limited:
            weights = limit(weights, merit, table.top_k[slots], choosing.renormalise)
        return weights, ids
    masked = logits + (penalty if penalty.dtype == logits.dtype else penalty.to(logits.dtype))
    weights, ids = stock(masked)
    if table.limited:
        # On a GPU padded tokens have the expert −1, and no logit.
        weights = limit(weights, masked.gather(1, ids.long().clamp_min(0)), table.top_k[slots], choosing.renormalise)
    return weights, ids


def limit(weights: torch.Tensor, merit: torch.Tensor, top_k: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """Keep of weights [T, K] the top_k [T] of highest merit [T, K], 0 elsewhere; the row's sum stays if renormalised."""
    rank = merit.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = weights.masked_fill(rank >= top_k[:, None], 0.0)
    if renormalise:
        least = torch.finfo(kept.dtype).tiny  # padded tokens weigh nothing
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True).clamp_min(least))
    return kept


def _biased(
    logits: torch.Tensor, penalty: torch.Tensor, choosing: compat.Choosing
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores weigh, scores + bias choose, within the best groups; returns ids, weights and merit, all [T, K].

    Masking the logits would not do: σ(−inf) = 0, and 0 + bias may win. So the biased score is masked.
    """
    z = logits.float()
    scores = z.sigmoid() if choosing.scoring == "sigmoid" else (z + penalty).softmax(-1)
    choice = (scores if choosing.bias is None else scores + choosing.bias) + penalty
    if choosing.groups > 1:
        grouped = choice.view(choice.shape[0], choosing.groups, -1)
        # With a bias a group is worth the sum of its two best experts, without one its best.
        worth = grouped.amax(-1) if choosing.bias is None else grouped.topk(2, -1).values.sum(-1)
        left = torch.ones_like(worth, dtype=torch.bool)
        left.scatter_(1, worth.topk(choosing.chosen_groups, -1).indices, False)
        choice = grouped.masked_fill(left[..., None], float("-inf")).flatten(1)
    merit, ids = choice.topk(choosing.top_k, -1)
    weights = scores.gather(1, ids).masked_fill(merit.isinf(), 0.0)
    if choosing.renormalise:
        weights = weights / weights.sum(-1, keepdim=True)
    return ids.to(torch.int32), weights * choosing.scale, merit


class Subsets:
    """Hooks on a runner and its model's routers, from construction to :meth:`remove`.

    In an eager engine the stock routing runs untouched while no request names a slot. Where steps may be
    replays of CUDA graphs, no Python runs in them: the graphs must be captured anew after construction and
    removal, and then always hold the masked routing, whose slot 0 is the stock one. Raises UnsupportedError,
    and hooks nothing, where the routing of this engine cannot be taken over.
    """

    def __init__(self, runner: Any) -> None:
        compat_runners.check_runner(runner)
        self.layers = compat.moe_layers(runner.get_model())
        if not self.layers:
            raise UnsupportedError("plans", "the model has no MoE layer that can be masked", "load a MoE model")
        choosing = {layer: compat.choosing(f"layer {layer}", found) for layer, found in self.layers.items()}
        self._fixed = compat_runners.captures_graphs(runner)
        self._tables = {
            layer: LayerTable(found.router.global_num_experts, found.router.top_k, runner.device, fixed=self._fixed)
            for layer, found in self.layers.items()
        }
        self._heads = {layer: HeadTable(runner.device) for layer in self.layers}
        self._dtype: torch.dtype = runner.dtype
        self._loaded: set[int] = set()
        self._headed = np.zeros(MAX_SLOTS, dtype=bool)
        self._with_heads: TokensOf = {}
        self._active = self._fixed
        self._slot_of = torch.zeros(runner.max_num_tokens, dtype=torch.long, device=runner.device)
        self._each_slot = torch.arange(MAX_SLOTS, device=runner.device).split(1)
        self._shared: torch.Tensor | None = None
        self._filled = 0
        self._step: tuple[bytes, bytes] | None = None
        self._undo = [
            self._hook_router(self._tables[layer], self._heads[layer], choosing[layer], found.router)
            for layer, found in self.layers.items()
        ]
        self._undo.append(compat_runners.follow_requests(runner, self._slot_asked, self._before_step))

    def load(self, plans: Sequence[PlainPlan]) -> None:
        """Put plans into slots 1, 2, …, in place of those before; no request may be running."""
        if len(plans) >= MAX_SLOTS:
            raise LeapError("plans", f"are {len(plans)}", f"load at most {MAX_SLOTS - 1} at a time")
        for number, plan in enumerate(plans):
            self._check(f"plan {number}", plan)
        for slot in np.flatnonzero(self._headed):
            self._drop_head(int(slot))
        for layer, table in self._tables.items():
            table.load([plan[layer] for plan in plans])
        self._loaded, self._step = set(range(1, len(plans) + 1)), None

    def put(self, slot: int, plan: PlainPlan, heads: Mapping[int, LayerHead]) -> int:
        """Put one plan, with router heads for some of its layers or none, into a slot that no request uses.

        Requests of other slots may be running. Returns the bytes that the slot now takes.
        """
        self._check(f"slot {slot}", plan)
        if not 0 < slot < MAX_SLOTS:
            raise LeapError("slot", f"is {slot}", f"use one of 1 … {MAX_SLOTS - 1}")
        if heads and self._fixed:
            raise UnsupportedError(
                "router head", "the engine runs CUDA graphs, which hold no routers but the model's",
                "start it with --enforce-eager, or serve that specialist from its own cut",
            )  # fmt: skip
        self._drop_head(slot)  # one before, or half of one that failed, may have had other layers
        for layer, table in self._tables.items():
            table.put(slot, plan[layer])
        for layer, head in heads.items():
            self._heads[layer].put(slot, plan[layer][0], head, self._dtype)
        self._headed[slot] = bool(heads)
        self._loaded.add(slot)
        self._step = None
        rows = sum(table.penalty[slot].nbytes + 12 for table in self._tables.values())
        of_heads = [weight.numel() + (0 if bias is None else bias.numel()) for weight, bias in heads.values()]
        return rows + sum(of_heads) * self._dtype.itemsize

    def clear(self, slot: int) -> None:
        """Take one plan out of its slot, which no request uses any more; harmless when there is none."""
        self._drop_head(slot)
        for table in self._tables.values():
            table.clear(slot)
        self._loaded.discard(slot)
        self._step = None

    def _drop_head(self, slot: int) -> None:
        for table in self._heads.values():
            table.drop(slot)
        self._headed[slot] = False

    def _check(self, where: str, plan: PlainPlan) -> None:
        if set(plan) != set(self.layers):
            raise LeapError(
                where, f"plans layers {sorted(plan)}, vLLM runs {sorted(self.layers)} here",
                "plan every MoE layer; pipeline parallelism is not supported",
            )  # fmt: skip

    def remove(self) -> None:
        """Put routers and runner back as they were."""
        while self._undo:
            self._undo.pop()()

    def _hook_router(
        self, table: LayerTable, heads: HeadTable, choosing: compat.Choosing, router: Any
    ) -> Callable[[], None]:
        stock = router._compute_routing

        def compute_routing(
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            indices_type: torch.dtype | None,
            *,
            input_ids: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            def whole(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
                found: tuple[torch.Tensor, torch.Tensor] = stock(
                    hidden_states, logits, indices_type, input_ids=input_ids
                )
                return found

            if not self._active:
                return whole(router_logits)
            slots = self._slot_of[: router_logits.shape[0]] if self._shared is None else self._shared
            if self._with_heads:
                router_logits = heads.logits(hidden_states, router_logits, self._with_heads)
            return route(table, slots, router_logits, choosing, whole)

        return compat.replace_method(router, "_compute_routing", compute_routing)

    def _slot_asked(self, extra: Mapping[str, Any]) -> int:
        """Read the slot that a request names in its extra_args."""
        slot = int(extra.get(REQUEST_KEY, 0))
        if slot and slot not in self._loaded:
            raise LeapError(
                REQUEST_KEY, f"names plan {slot}, {len(self._loaded)} are loaded", "load the plan before asking for it"
            )
        return slot

    def _before_step(self, slots: np.ndarray, tokens: np.ndarray) -> None:
        """Make each token of a step find its slot: slots and token counts of the requests [R], in the batch's order."""
        step = slots.tobytes(), tokens.tobytes()
        if step == self._step:  # Decoding: what the last step wrote still holds.
            return
        self._step = step
        if not self._fixed:
            self._active = bool(slots.any())
            if not self._active:
                return
            # A penalty for all is added faster than one gathered for each.
            alone = bool((slots == slots[0]).all())
            self._shared = self._each_slot[slots[0]] if alone else None
            if alone:
                self._with_heads = {int(slots[0]): None} if self._headed[slots[0]] else {}
                return
        each = np.repeat(slots, tokens)
        self._with_heads = {int(slot): self._places(each == slot) for slot in np.unique(slots[self._headed[slots]])}
        compat_runners.copy_to(self._slot_of, each)
        # What is padded behind them has no plan.
        self._slot_of[len(each) : self._filled] = 0
        self._filled = len(each)

    def _places(self, mask: np.ndarray) -> torch.Tensor:
        """Where a mask over the step's tokens is set, on the device."""
        return torch.from_numpy(np.flatnonzero(mask)).to(self._slot_of.device, non_blocking=True)
