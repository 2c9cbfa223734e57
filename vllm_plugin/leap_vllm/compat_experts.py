"""The private names of vLLM around the kernels of its MoE layers; like compat.py, and imported by experts.py alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_vllm import compat

if TYPE_CHECKING:
    import torch
    from torch import nn

    from leap_kernels.config import KernelConfig

_METHOD = "UnquantizedFusedMoEMethod"
_MOE = "vllm.model_executor.layers.fused_moe"
_APPLY = (
    "output", "hidden_states", "w1", "w2", "topk_weights", "topk_ids", "activation", "global_num_experts",
    "expert_map", "apply_router_weight_on_input",
)  # fmt: skip
PROBES: Mapping[str, tuple[str, ...]] = {
    "vllm.model_executor.custom_op:CustomOp.register_oot": ("name",),
    f"{_MOE}.unquantized_fused_moe_method:{_METHOD}.__init__": ("moe",),
    f"{_MOE}.modular_kernel:FusedMoEExpertsModular.apply": _APPLY,
    f"{_MOE}.oracle.unquantized:backend_to_kernel_cls": ("backend",),
    f"{_MOE}.config:FusedMoEConfig": (
        "num_local_experts", "hidden_dim", "experts_per_token", "in_dtype", "activation", "has_bias",
        "is_lora_enabled", "moe_parallel_config", "swiglu_limit", "swiglu_alpha", "swiglu_beta",
    ),
    f"{_MOE}.config:FusedMoEQuantConfig.config_name": ("dtype",),
    f"{_MOE}.fused_moe:get_config_file_name": ("E", "N", "dtype"),
}  # fmt: skip
"""What register_experts relies on, as in compat.PROBES."""
_TUNED_FOLDER = "VLLM_TUNED_CONFIG_FOLDER"


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """What vLLM is about to build, in our words.

    Args:
        experts, hidden, width, top_k, dtype: of the weights that this rank holds.
        backend: vLLM's name of the kernel it chose: "TRITON", "CPU", …
        plain: SiLU·mul without clamps, biases or LoRA: what our kernel computes.
        ranks: ranks that the experts are spread over.
        batch_invariant: results must not depend on the batch.
        model: the model's folder or id.
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
    model: str = ""


@dataclass(frozen=True, slots=True)
class Chosen:
    """What an MoE layer runs.

    Args:
        experts: the experts class.
        kernel: whose.
        launches: the file of measured launches that our kernel follows; None: its defaults, or vLLM's kernel.
        why: in a few words.
    """

    experts: type
    kernel: Literal["ours", "vllm"]
    launches: Path | None
    why: str


def register_experts(
    choose: Callable[[MoeLayer, type], Chosen], probes: Mapping[str, tuple[str, ...]] = PROBES
) -> None:
    """Let ``choose(layer, stock)`` name the experts class of every unquantised MoE layer. Safe to call twice.

    Raises UnsupportedError, and changes nothing, with a vLLM whose layers are not those we know.
    """
    compat.check_signatures(probes)
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
                self.leap_chosen = choose(_describe(moe, self.unquantized_backend.name), stock)
                self.experts_cls = self.leap_chosen.experts

    UnquantizedFusedMoEMethod.register_oot(Method, name=_METHOD)
    # vLLM's settings go by this name, and who asks what a layer is reads the class's.
    Method.name, Method.__name__ = UnquantizedFusedMoEMethod.name, _METHOD


def _describe(moe: Any, backend: str) -> MoeLayer:
    import vllm.envs as envs
    from vllm.config import get_current_vllm_config_or_none

    clamps = (moe.swiglu_limit, moe.swiglu_alpha, moe.swiglu_beta)
    config = get_current_vllm_config_or_none()
    return MoeLayer(
        experts=moe.num_local_experts, hidden=moe.hidden_dim, width=moe.intermediate_size_per_partition,
        top_k=moe.experts_per_token, dtype=str(moe.in_dtype).removeprefix("torch."), backend=backend,
        plain=moe.activation.value == "silu" and not moe.has_bias and not moe.is_lora_enabled and not any(clamps),
        ranks=moe.moe_parallel_config.ep_size, batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        model=str(config.model_config.model) if config is not None and config.model_config is not None else "",
    )  # fmt: skip


def kernels_of(model: nn.Module) -> list[dict[str, Any]]:
    """Return for each MoE layer {layer, kernel, experts_class, backend, launches, why}; quantised ones are vLLM's.

    ``launches`` is the file of measured launches that the kernel follows, None where it goes by its defaults.
    """
    found = []
    for layer, runner in sorted(compat.moe_layers(model).items()):
        method = runner.routed_experts.quant_method
        chosen: Chosen | None = getattr(method, "leap_chosen", None)
        experts = getattr(method, "experts_cls", None)
        backend = getattr(getattr(method, "unquantized_backend", None), "name", None)
        launches = chosen.launches if chosen else None
        if chosen and chosen.kernel == "vllm" and backend == "TRITON":
            moe = runner.moe_config
            launches = tuned_file(
                moe.num_local_experts, moe.intermediate_size_per_partition, str(moe.in_dtype).removeprefix("torch.")
            )
        found.append({
            "layer": layer, "kernel": chosen.kernel if chosen else "vllm",
            "experts_class": getattr(experts, "__name__", type(method).__name__),
            "backend": backend,
            "launches": str(launches) if launches else None,
            "why": chosen.why if chosen else "its experts are quantised, or the plugin's kernels are off",
        })  # fmt: skip
    return found


def offer_tuned_files(folder: Path | None) -> None:
    """Let vLLM's own kernel find its tuned files in ``folder``, unless the user has named another.

    By vLLM's own variable, of this process; what an engine before this one was offered is taken back. An engine that
    has started keeps variables and files as it read them: both memories are emptied.
    """
    import vllm.envs as envs
    from vllm.model_executor.layers.fused_moe.fused_moe import get_moe_configs

    global _offered
    named = os.environ.get(_TUNED_FOLDER)
    wanted = str(folder) if folder else None
    if named == wanted or named not in (None, _offered):
        return
    if wanted is None:
        del os.environ[_TUNED_FOLDER]
    else:
        os.environ[_TUNED_FOLDER] = wanted
    _offered = wanted
    envs.disable_envs_cache()
    get_moe_configs.cache_clear()


_offered: str | None = None


def tuned_file(experts: int, width: int, dtype: str) -> Path | None:
    """Return the file of measured launches that vLLM's kernel takes for an unquantised shape here, or None."""
    import vllm.envs as envs
    from vllm.model_executor.layers.fused_moe import fused_moe

    shipped = Path(fused_moe.__file__).parent / "configs"
    for folder in (envs.VLLM_TUNED_CONFIG_FOLDER, shipped):
        if folder and (path := Path(folder) / vllm_file_name(experts, width, dtype)).is_file():
            return path
    return None


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
        ) -> Any:  # fmt: skip
            how = launch(hidden_states, w1, topk_ids)
            if how is False:
                return super().apply(
                    output, hidden_states, w1, w2, topk_weights, topk_ids, activation, global_num_experts,
                    expert_map, *rest, **more,
                )  # fmt: skip
            if _on_input(rest, more):  # vLLM has multiplied the weight into hidden_states already
                topk_weights = topk_weights.new_ones(topk_weights.shape)
            fused_moe(
                hidden_states, w1, w2, topk_ids=topk_ids.contiguous(), topk_weights=topk_weights.contiguous(),
                expert_map=expert_map, config=None if how is True else how, out=output,
            )  # fmt: skip
            return None  # what vLLM takes for a finished output

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


def vllm_file_name(experts: int, width: int, dtype: str) -> str:
    """vLLM's name for the tuned file of an unquantised shape on this device; bfloat16 and float16 share theirs.

    Nor does it tell shapes apart that differ in H or top_k alone.
    """
    import torch
    from vllm.model_executor.layers.fused_moe.config import FUSED_MOE_UNQUANTIZED_CONFIG
    from vllm.model_executor.layers.fused_moe.fused_moe import get_config_file_name

    selector = FUSED_MOE_UNQUANTIZED_CONFIG.config_name(getattr(torch, dtype))
    return str(get_config_file_name(experts, width, selector))
