"""What the tests of router heads and adapters share: a cut in transformers' memory, PEFT on it, random tuned parts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from leap_serve.adapter import RouterHead, write_overlays
from leap_serve.plan import Plan
from leap_serve.provenance import made_by
from leap_training import adapters
from reference import route_of, router_of

RANK, ALPHA = 3, 4.0


def cut_in_memory(full: Path, plan: Plan) -> Any:
    """The full model with each layer's experts and router sliced to the plan, in fp32, routed as the plan says.

    Slices transformers' own parameters and knows nothing of leap_serve's cut, so it may be as uneven as it likes.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(full, dtype=torch.float32, attn_implementation="eager").eval()
    route = route_of(model.config)
    for index, layer in plan.layers.items():
        router, ids = router_of(model.model.layers[index]), torch.tensor(layer.retained)
        experts = next(m for n, m in model.model.layers[index].named_modules() if n.endswith(".experts"))
        for module in (router, experts):
            for name, value in list(module.named_parameters(recurse=False)) + list(module.named_buffers(recurse=False)):
                setattr(module, name, _like(value, value.detach()[ids]))
            for name in ("num_experts", "n_routed_experts"):
                if hasattr(module, name):
                    setattr(module, name, len(ids))
        at = (range(len(ids)), layer.top_k, layer.temperature)

        def hook(module: Any, args: Any, output: Any, at: Any = at) -> Any:
            return route(module, args[0].reshape(-1, args[0].shape[-1]), at)

        router.top_k = layer.top_k
        router.register_forward_hook(hook)
    return model


def _like(value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    return torch.nn.Parameter(rows) if isinstance(value, torch.nn.Parameter) else rows


def with_random_adapter(model: Any, seed: int = 3, rank: int = RANK) -> Any:
    """Wrap a model with PEFT; every factor of every expert gets values that change the answers."""
    tuned = adapters.wrap(model, rank, ALPHA)
    made = torch.Generator().manual_seed(seed)
    for name, value in tuned.named_parameters():
        if "lora_" in name:
            value.data = torch.randn(value.shape, generator=made) * 0.2
    return tuned


def random_head(model: Any, plan: Plan, layers: Sequence[int], seed: int = 5) -> dict[int, RouterHead]:
    """New router rows (and biases) for some layers, put into the model too."""
    made = torch.Generator().manual_seed(seed)
    heads = {}
    for index in layers:
        router = router_of(model.model.layers[index])
        with torch.no_grad():
            router.weight.copy_(torch.randn(router.weight.shape, generator=made) * 0.2)
            bias = getattr(router, "bias", None)
            if bias is not None:
                bias.copy_(torch.randn(bias.shape, generator=made) * 0.2)
        heads[index] = RouterHead(router.weight.detach().clone(), None if bias is None else bias.detach().clone())
    return heads


def tune_at_random(full: Path, plan: Plan, cut: Path, work: Path, head_layers: Sequence[int] = (1, 2)) -> Any:
    """Lay a random router head and a random adapter beside a cut; return the same in transformers + PEFT, unmerged."""
    model = cut_in_memory(full, plan)
    head = random_head(model, plan, head_layers)
    tuned = with_random_adapter(model)
    adapters.save(tuned, work)
    write_overlays(cut, router_head=head, adapter=work, made_by=made_by(seed=3))
    return tuned


@torch.no_grad()
def logprobs_of(model: Any, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Log-softmax [tokens, vocabulary] of each prompt, in fp32."""
    return [model(input_ids=torch.tensor([list(p)])).logits[0].float().log_softmax(-1) for p in prompts]
