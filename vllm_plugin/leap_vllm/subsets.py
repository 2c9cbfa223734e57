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
from leap_vllm import compat

REQUEST_KEY = "leap_plan"
"""Key of the slot in a request's extra_args (over HTTP: vllm_xargs)."""
PlainPlan = Mapping[int, tuple[Sequence[int], int, float]]
"""MoE layer → (retained ids, top_k, τ); plain data, since it crosses processes."""


class LayerTable:
    """What C plans say of one layer: penalty [C, E] float32 (0 or −inf), top_k [C] int64, temperature [C] float32.

    Args:
        plans: (retained ids, top_k, τ) of slots 1…C−1.
        num_experts: E.
        top_k: K, that of slot 0.
        device: of the layer.
    """

    def __init__(
        self, plans: Sequence[tuple[Sequence[int], int, float]], num_experts: int, top_k: int, device: torch.device
    ) -> None:
        penalty = torch.full((len(plans) + 1, num_experts), float("-inf"))
        penalty[0] = 0.0
        for slot, (retained, _, _) in enumerate(plans, 1):
            penalty[slot, list(retained)] = 0.0
        self.penalty = penalty.to(device)
        self.top_k = torch.tensor([top_k, *(k for _, k, _ in plans)], device=device)
        self.temperature = torch.tensor([1.0, *(tau for _, _, tau in plans)], device=device)
        # bf16 logits stay bf16 where no τ asks for more, as they do in the stock router of a cut.
        self.scaled = any(tau != 1.0 for _, _, tau in plans)
        self.limited = any(k < top_k for _, k, _ in plans)


def route(
    table: LayerTable,
    slots: torch.Tensor,
    logits: torch.Tensor,
    choosing: compat.Choosing,
    stock: Callable[[torch.Tensor], tuple[torch.Tensor, torch.Tensor]],
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route logits [T, E] by the plans in slots [T]; returns weights and ids [T, K].

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
    masked = logits + penalty.to(logits.dtype)
    weights, ids = stock(masked)
    if table.limited:
        weights = limit(weights, masked.gather(1, ids.long()), table.top_k[slots], choosing.renormalise)
    return weights, ids


def limit(weights: torch.Tensor, merit: torch.Tensor, top_k: torch.Tensor, renormalise: bool) -> torch.Tensor:
    """Keep of weights [T, K] the top_k [T] of highest merit [T, K], 0 elsewhere; the row's sum stays if renormalised."""
    rank = merit.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    kept = weights.masked_fill(rank >= top_k[:, None], 0.0)
    if renormalise:
        kept = kept * (weights.sum(-1, keepdim=True) / kept.sum(-1, keepdim=True))
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

    While no request names a slot, the stock routing runs untouched. Raises UnsupportedError, and hooks
    nothing, where the routing of this engine cannot be taken over.
    """

    def __init__(self, runner: Any) -> None:
        compat.check_subset_runner(runner)
        self._runner = runner
        self.layers = compat.moe_layers(runner.get_model())
        if not self.layers:
            raise UnsupportedError("plans", "the model has no MoE layer that can be masked", "load a MoE model")
        self._choosing = {layer: compat.choosing(f"layer {layer}", found) for layer, found in self.layers.items()}
        self._tables: dict[int, LayerTable] = {}
        self.slots = 1
        self._active = False
        self._slot_of = torch.zeros(runner.max_num_tokens, dtype=torch.long, device=runner.device)
        self._filled = 0
        self._undo: list[Callable[[], None]] = []
        for layer, found in self.layers.items():
            self._hook_router(layer, found.router)
        self._hook_runner()

    def load(self, plans: Sequence[PlainPlan]) -> None:
        """Put plans into slots 1, 2, …, in place of those before; no request may be running."""
        for number, plan in enumerate(plans):
            if set(plan) != set(self.layers):
                raise LeapError(
                    f"plan {number}", f"plans layers {sorted(plan)}, vLLM runs {sorted(self.layers)} here",
                    "plan every MoE layer; pipeline parallelism is not supported",
                )  # fmt: skip
        self._tables = {
            layer: LayerTable(
                [plan[layer] for plan in plans], found.router.global_num_experts, found.router.top_k,
                self._runner.device,
            )
            for layer, found in self.layers.items()
        }  # fmt: skip
        self.slots = len(plans) + 1
        self._active = False

    def remove(self) -> None:
        """Put routers and runner back as they were."""
        while self._undo:
            self._undo.pop()()

    def _hook_router(self, layer: int, router: Any) -> None:
        stock, choosing = router._compute_routing, self._choosing[layer]

        def compute_routing(
            hidden_states: torch.Tensor,
            router_logits: torch.Tensor,
            indices_type: torch.dtype | None,
            *,
            input_ids: torch.Tensor | None = None,
        ) -> tuple[torch.Tensor, torch.Tensor]:
            if not self._active:
                found: tuple[torch.Tensor, torch.Tensor] = stock(
                    hidden_states, router_logits, indices_type, input_ids=input_ids
                )
                return found
            return route(
                self._tables[layer], self._slot_of[: router_logits.shape[0]], router_logits, choosing,
                lambda logits: stock(hidden_states, logits, indices_type, input_ids=input_ids),
            )  # fmt: skip

        self._undo.append(compat.replace_method(router, "_compute_routing", compute_routing))

    def _hook_runner(self) -> None:
        stock = self._runner._prepare_inputs

        def prepare_inputs(*args: Any, **kwargs: Any) -> Any:
            prepared = stock(*args, **kwargs)
            # Afterwards, since the batch may be reordered while its inputs are prepared.
            self._fill(compat.batch_slots(self._runner, args[0] if args else kwargs["scheduler_output"], REQUEST_KEY))
            return prepared

        self._undo.append(compat.replace_method(self._runner, "_prepare_inputs", prepare_inputs))

    def _fill(self, batch: Sequence[tuple[int, int]]) -> None:
        """Write each token's slot: (slot, tokens) of the requests in the order of the batch; 0 for padding."""
        for slot, _ in batch:
            if not 0 <= slot < self.slots:
                raise LeapError(
                    REQUEST_KEY, f"names plan {slot}, {self.slots - 1} are loaded", "load the plan before asking for it"
                )
        self._active = any(slot for slot, _ in batch)
        if not self._active:
            return
        slots = np.repeat(*np.array(batch).T)
        self._slot_of[len(slots) : self._filled] = 0
        self._slot_of[: len(slots)] = torch.from_numpy(slots)
        self._filled = len(slots)
