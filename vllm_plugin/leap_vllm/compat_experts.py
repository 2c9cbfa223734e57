"""The private names of vLLM around the kernels of its MoE layers; like compat.py, and imported by experts.py alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from leap_kernels.config import KernelConfig

_METHOD = "UnquantizedFusedMoEMethod"


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """What vLLM is about to build, in our words.

    Args:
        experts, hidden, width, top_k, dtype: of the weights that this rank holds.
        backend: vLLM's name of the kernel it chose: "TRITON", "CPU", …
        plain: SiLU·mul without clamps, biases or LoRA: what our kernel computes.
        ranks: ranks that the experts are spread over.
        batch_invariant: results must not depend on the batch.
    """

    experts: int
    hidden: int
    width: int
    top_k: int
    dtype: str
    backend: str
    plain: bool
    ranks: int
    batch_invariant: bool


def register_experts(choose: Callable[[MoeLayer, type], type]) -> None:
    """Let ``choose(layer, stock)`` name the experts class of every unquantised MoE layer. Safe to call twice."""
    from vllm.model_executor.custom_op import op_registry_oot
    from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod

    if _METHOD in op_registry_oot:
        return

    class Method(UnquantizedFusedMoEMethod):
        """vLLM's own, but for the experts class."""

        def __init__(self, moe: Any) -> None:
            super().__init__(moe)
            stock: type | None = vars(self).get("experts_cls")
            if stock is not None:
                self.experts_cls = choose(_describe(moe, self.unquantized_backend.name), stock)

    UnquantizedFusedMoEMethod.register_oot(Method, name=_METHOD)
    # vLLM's settings go by this name, and who asks what a layer is reads the class's.
    Method.name, Method.__name__ = UnquantizedFusedMoEMethod.name, _METHOD


def _describe(moe: Any, backend: str) -> MoeLayer:
    import vllm.envs as envs

    clamps = (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)
    return MoeLayer(
        experts=moe.num_local_experts, hidden=moe.hidden_dim, width=moe.intermediate_size_per_partition,
        top_k=moe.experts_per_token, dtype=str(moe.in_dtype).removeprefix("torch."), backend=backend,
        plain=moe.activation.value == "silu" and not moe.has_bias and not moe.is_lora_enabled and not any(clamps),
        ranks=moe.moe_parallel_config.ep_size, batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
    )  # fmt: skip


def our_experts(launch: Callable[[Any, Any, Any], KernelConfig | bool]) -> type:
    """Return vLLM's Triton experts class with our kernel in it.

    ``launch(x, w13, topk_ids)`` says how: a configuration, True for the default one, False for vLLM's kernel.
    """
    from vllm.model_executor.layers.fused_moe.oracle.unquantized import UnquantizedMoeBackend, backend_to_kernel_cls

    from leap_kernels import fused_moe

    stock: Any = backend_to_kernel_cls(UnquantizedMoeBackend.TRITON)[0]

    class LeapExperts(stock):
        """Our fused MoE where it is the faster one, else vLLM's; the workspaces stay sized for vLLM's."""

        def apply(
            self, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
            topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: Any, global_num_experts: int,
            expert_map: torch.Tensor | None, *rest: Any, **more: Any,
        ) -> None:  # fmt: skip
            how = launch(hidden_states, w1, topk_ids)
            if how is False:
                super().apply(
                    output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
                    expert_map, *rest, **more,
                )  # fmt: skip
                return
            if _on_input(rest, more):  # vLLM has multiplied the weight into hidden_states already
                topk_weights = topk_weights.new_ones(topk_weights.shape)
            fused_moe(
                hidden_states, w1, w2, topk_ids=topk_ids.contiguous(), topk_weights=topk_weights.contiguous(),
                expert_map=expert_map, config=None if how is True else how, out=output,
            )  # fmt: skip

    return LeapExperts


def mapped_cpu_experts(stock: Any) -> type:
    """Return a CPU experts class that honours expert_map: vLLM's own reads past its weights with remote ids."""

    class MappedCpuExperts(stock):
        """Slots of other ranks go to local expert 0 and weigh nothing."""

        def apply(
            self, output: torch.Tensor, hidden_states: torch.Tensor, w1: torch.Tensor, w2: torch.Tensor,
            topk_weights: torch.Tensor, topk_ids: torch.Tensor, activation: Any, global_num_experts: int,
            expert_map: torch.Tensor | None, *rest: Any, **more: Any,
        ) -> None:  # fmt: skip
            here = None
            if expert_map is not None:
                local = expert_map[topk_ids.long()]
                here = local >= 0
                topk_ids = local.clamp(min=0).to(topk_ids.dtype)
                topk_weights = topk_weights * here
            super().apply(
                output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
                None, *rest, **more,
            )  # fmt: skip
            if here is not None and _on_input(rest, more):  # then the kernel reads no weights
                output.mul_(here.any(1, keepdim=True))

    return MappedCpuExperts


def _on_input(rest: tuple[Any, ...], more: dict[str, Any]) -> bool:
    """Read apply_router_weight_on_input, the last argument of vLLM's ``apply``."""
    return bool(more["apply_router_weight_on_input"] if "apply_router_weight_on_input" in more else rest[-1])


# vLLM's kernel as a contender ---------------------------------------------------------------------


def vllm_layer(
    x: torch.Tensor, w13: list[torch.Tensor], w2: list[torch.Tensor], ids: torch.Tensor, weights: torch.Tensor,
    config: dict[str, int] | None = None,
) -> Callable[[int], object]:  # fmt: skip
    """Return vLLM's Triton layer on the i-th weights: with a configuration, or as vLLM itself chooses one."""
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config

    def run(index: int) -> object:
        with override_config(config):
            return fused_experts(x, w13[index], w2[index], weights, ids)

    return run


def vllm_default(tokens: int, experts: int, hidden: int, width: int, top_k: int) -> dict[str, int]:
    """The launch that vLLM chooses for a shape without a tuned file."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_default_config

    found: dict[str, int] = get_default_config(tokens, experts, width, hidden, top_k, None)
    return found


def vllm_changes() -> list[list[dict[str, int]]]:
    """Groups of changes to a launch of vLLM's, for descent: the space of its own benchmark_moe, a field or two a time."""
    return [
        [{"BLOCK_SIZE_M": m} for m in (16, 32, 64, 128)],
        [{"BLOCK_SIZE_N": n, "BLOCK_SIZE_K": k} for n in (32, 64, 128, 256) for k in (64, 128, 256)],
        [{"num_warps": w, "num_stages": s} for w in (4, 8) for s in (2, 3, 4, 5)],
        [{"GROUP_SIZE_M": g} for g in (1, 16, 32, 64)],
        [{"BLOCK_SIZE_M": m} for m in (16, 32, 64, 128)],
    ]  # fmt: skip


def vllm_file_name(experts: int, width: int) -> str:
    """vLLM's name for the tuned file of an unquantised shape on this device."""
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    return str(get_config_file_name(experts, width, None))
