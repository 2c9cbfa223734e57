"""Layers of different sizes in one stock model, and the mixin that every ``Leap…`` class carries."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from leap_serve.architectures import Family
from leap_serve.errors import UnsupportedError
from leap_serve.plan import Plan
from leap_vllm import compat, loader
from leap_vllm.router import apply_plan

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig


class LeapModel:
    """What is added to a stock vLLM model class; it comes first among the bases."""

    leap_family: ClassVar[Family]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        compat.check_signatures()
        cut = loader.open_cut(vllm_config, self.leap_family)
        check_parallel(cut.plan, cut.family, vllm_config)
        with built_to_plan(vllm_config.model_config.hf_text_config, self.leap_family, cut.plan):
            super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        self.leap_cut = cut
        for layer, runner in compat.moe_layers(self).items():
            check_layer(layer, runner, cut.plan)
            planned = cut.plan.layers[layer]
            if planned.maps_router:
                compat.widen_gate(self, layer, self.leap_family.router, len(planned.retained), cut.plan.num_experts)
            apply_plan(runner.router, planned, cut.plan.num_experts, next(runner.routed_experts.parameters()).device)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the cut checkpoint, router head and adapter merged in if there are any."""
        loaded: set[str] = super().load_weights(self.leap_cut.with_overlays(weights))  # type: ignore[misc]
        return loaded


@contextlib.contextmanager
def overlay(config: Any, values: Mapping[str, int]) -> Iterator[None]:
    """Set attributes of a config for as long as the block runs."""
    before = {key: getattr(config, key) for key in values}
    try:
        for key, value in values.items():
            setattr(config, key, value)
        yield
    finally:
        for key, value in before.items():
            setattr(config, key, value)


@contextlib.contextmanager
def built_to_plan(config: Any, family: Family, plan: Plan) -> Iterator[None]:
    """While open, decoder layer l of a model under construction sees ITS expert count, top_k and width in the config."""

    def sizes(layer: int) -> contextlib.AbstractContextManager[None]:
        planned = plan.layers.get(layer)
        if planned is None:  # a dense layer
            return contextlib.nullcontext()
        values = {family.num_experts_key: len(planned.retained), family.top_k_key: planned.top_k}
        if planned.width is not None:
            values[family.width_key] = planned.width
        return overlay(config, values)

    with compat.build_layers_with(sizes):
        yield


def check_layer(layer: int, runner: Any, plan: Plan) -> None:
    """Raise UnsupportedError unless vLLM built MoE layer l with the plan's expert count and top_k, and can apply its τ."""
    moe, planned = runner.moe_config, plan.layers.get(layer)
    built = (moe.num_experts, moe.experts_per_token)
    if planned is None or built != (len(planned.retained), planned.top_k):
        expected = "nothing" if planned is None else f"{len(planned.retained)} experts, top_k {planned.top_k}"
        raise UnsupportedError(
            f"layer {layer}", f"vLLM built {built[0]} experts, top_k {built[1]}, the plan says {expected}",
            "serve without redundant or fused shared experts, or report this",
        )  # fmt: skip
    ours = planned.temperature != 1.0 or planned.maps_router or planned.skip is not None
    if ours and runner.is_monolithic:
        raise UnsupportedError(
            f"layer {layer}", "has a router temperature, a router map or skipping, but vLLM's MoE kernel routes by itself",
            "serve with --moe-backend triton",
        )  # fmt: skip


def check_parallel(plan: Plan, family: Family, vllm_config: VllmConfig) -> None:
    """Raise UnsupportedError where the plan's counts do not go with the way vLLM is to spread the experts."""
    parallel, fewest, counts = vllm_config.parallel_config, min(plan.counts), sorted(set(plan.counts))
    if fewest < parallel.tensor_parallel_size:
        raise UnsupportedError(
            "--tensor-parallel-size",
            f"is {parallel.tensor_parallel_size}, but a layer retains only {fewest} experts",
            f"use at most {fewest}",
        )
    if len(counts) == 1:
        return
    if parallel.enable_eplb:
        raise UnsupportedError(
            "--enable-eplb", f"needs equal expert counts in all layers, the plan has {counts}",
            "serve without it, or search with --allocation uniform",
        )  # fmt: skip
    if parallel.enable_expert_parallel:
        raise UnsupportedError(
            "--enable-expert-parallel", f"is only served with equal expert counts, the plan has {counts}",
            "use tensor parallelism, or search with --allocation uniform",
        )  # fmt: skip
    if family.model_type == "gpt_oss" and vllm_config.quant_config is not None:
        raise UnsupportedError(
            "config.json", "quantised GPT-OSS experts need equal counts in all layers",
            "cut an unquantised checkpoint, or search with --allocation uniform",
        )  # fmt: skip
