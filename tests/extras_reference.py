"""The reference of plans with extras: transformers on the FULL model, its weights and routers changed by hand.

Knows nothing of leap_serve's arithmetic: it reads the fields of a plan and does what their names say, token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leap_serve.plan import LayerPlan, Plan
from reference import route_of, router_of


@torch.no_grad()
def clustered_logprobs(folder: Path, plan: Plan, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Return log-softmax [tokens, vocabulary] where experts are merged and ids mapped, whatever the router's kind."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    route = route_of(net.config)
    for index, layer in plan.layers.items():
        merge = layer.merge
        assert merge is not None
        block: Any = next(m for m in net.model.layers[index].modules() if hasattr(m, "experts"))
        _change_weights(block.experts, layer)
        slots = torch.zeros(plan.num_experts, len(merge.router))
        for slot, row in enumerate(merge.router):
            slots[[e for e, _ in row], slot] = 1.0

        def hook(module: Any, args: Any, _output: Any, layer: LayerPlan = layer, slots: torch.Tensor = slots) -> Any:
            every = (range(len(slots)), layer.top_k, layer.temperature)
            found = route(module, args[0].reshape(-1, args[0].shape[-1]), every)
            if len(found) == 2:  # Llama-4: scores [T, E], of which one is not 0
                return found[0] @ slots, found[1]
            return found[0], found[1], slots.argmax(1)[found[2]]

        router_of(net.model.layers[index]).register_forward_hook(hook)
    return [net(torch.tensor([list(prompt)])).logits[0].float().log_softmax(-1) for prompt in prompts]


@torch.no_grad()
def extras_logprobs(folder: Path, plan: Plan, prompts: Sequence[Sequence[int]]) -> tuple[list[torch.Tensor], float]:
    """Return log-softmax [tokens, vocabulary] of each prompt, and how many experts a token used on average."""
    from transformers import AutoModelForCausalLM

    net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    used: list[int] = []
    for index, layer in plan.layers.items():
        block: Any = net.model.layers[index].mlp
        _change_weights(block.experts, layer)
        renormalise = bool(getattr(net.config, "norm_topk_prob", True))

        def hook(
            _module: Any, _args: Any, output: Any, layer: LayerPlan = layer, renormalise: bool = renormalise
        ) -> Any:
            rows = [_route(z, layer, plan.num_experts, renormalise) for z in output[0].float()]
            used.extend(sum(w > 0 for w, _ in row) for row in rows)
            weights = torch.tensor([[w for w, _ in row] for row in rows])
            return output[0], weights, torch.tensor([[e for _, e in row] for row in rows])

        (getattr(block, "gate", None) or block.router).register_forward_hook(hook)
    found = [net(torch.tensor([list(prompt)])).logits[0].float().log_softmax(-1) for prompt in prompts]
    return found, sum(used) / len(used)


def _change_weights(experts: Any, layer: LayerPlan) -> None:
    for expert, kept in zip(layer.retained, layer.channels, strict=False):
        gone = sorted(set(range(experts.down_proj.shape[2])) - set(kept))
        experts.down_proj.data[expert][:, gone] = 0.0  # [E, H, I]: what nobody reads is as if it were not there
    if layer.merge is not None:
        for value in experts.parameters():
            value.data = torch.stack([sum(w * value.data[e] for e, w in row) for row in layer.merge.experts])
        experts.num_experts = len(layer.merge.experts)


def _route(z: torch.Tensor, layer: LayerPlan, num_experts: int, renormalise: bool) -> list[tuple[float, int]]:
    """Return (weight, id) of a token's choices: of original experts, or of slots where they are merged."""
    z = z / layer.temperature
    merge = layer.merge
    if merge is not None and merge.router and merge.applied == "probabilities":
        p = z.softmax(-1)
        found = [(float(sum(w * p[e] for e, w in row)), slot) for slot, row in enumerate(merge.router)]
    elif merge is not None and merge.router:
        found = [(float(w), e) for e, w in enumerate(z.softmax(-1))]
    else:
        kept = list(layer.retained)
        found = [(float(w), e) for w, e in zip(z[kept].softmax(-1), kept, strict=True)]
    chosen = sorted(found, reverse=True)[: layer.top_k]
    total = sum(w for w, _ in chosen) if renormalise else 1.0
    chosen = [(w / total, e) for w, e in chosen]
    if layer.skip is not None:
        strong = [(w if w >= layer.skip * chosen[0][0] else 0.0, e) for w, e in chosen]
        again = sum(w for w, _ in chosen) / sum(w for w, _ in strong) if renormalise else 1.0
        chosen = [(w * again, e) for w, e in strong]
    if merge is not None and merge.router and merge.applied == "ids":
        slot_of = {e: slot for slot, row in enumerate(merge.router) for e, _ in row}
        chosen = [(w, slot_of[e]) for w, e in chosen]
    elif merge is not None and not merge.router:
        chosen = [(w, layer.retained.index(e)) for w, e in chosen]
    return chosen
