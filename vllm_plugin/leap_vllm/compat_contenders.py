"""The private names of vLLM behind the kernels that ours is measured against; like compat.py, for tuning and benches."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.errors import UnsupportedError
from leap_serve.files import read_json
from leap_vllm import compat

if TYPE_CHECKING:
    import torch

_MOE = "vllm.model_executor.layers.fused_moe"
PROBES: Mapping[str, tuple[str, ...]] = {
    f"{_MOE}.fused_moe:get_default_config": ("M", "E", "N", "K", "topk", "dtype"),
    f"{_MOE}:fused_experts": (
        "hidden_states",
        "w1",
        "w2",
        "topk_weights",
        "topk_ids",
        "global_num_experts",
        "expert_map",
    ),
    f"{_MOE}:override_config": ("config",),
}
"""As compat.PROBES."""
_OPENAI = f"{_MOE}.experts.gpt_oss_triton_kernels_moe"
OPENAI_PROBES: Mapping[str, tuple[str, ...]] = {
    f"{_OPENAI}:make_routing_data": ("topk_ids", "topk_weights", "num_local_experts"),
    "triton_kernels.matmul_ogs:matmul_ogs": ("x", "w", "bias", "routing_data", "gather_indx", "scatter_indx", "gammas"),
}


def vllm_layer(
    x: torch.Tensor, w13: list[torch.Tensor], w2: list[torch.Tensor], ids: torch.Tensor, weights: torch.Tensor,
    config: dict[str, int] | None = None, expert_map: torch.Tensor | None = None,
) -> Callable[[int], object]:  # fmt: skip
    """Return vLLM's Triton layer on the i-th weights: with a configuration, or as vLLM itself chooses one.

    ``expert_map``: global id → local id or −1, where ranks share the experts.

    Raises UnsupportedError with a vLLM whose kernel is called otherwise.
    """
    compat.check_signatures(PROBES)
    from vllm.model_executor.layers.fused_moe import fused_experts, override_config

    def run(index: int) -> object:
        experts = -1 if expert_map is None else len(expert_map)
        with override_config(config):
            return fused_experts(
                x, w13[index], w2[index], weights, ids, global_num_experts=experts, expert_map=expert_map
            )

    return run


def vllm_launches(
    tokens: int, experts: int, hidden: int, width: int, top_k: int, file_name: str
) -> list[dict[str, int]]:
    """What vLLM runs where nobody tuned: its default for a shape and, where it ships ``file_name``, the launch in there."""
    from vllm.model_executor.layers.fused_moe import fused_moe

    default = fused_moe.get_default_config(tokens, experts, width, hidden, top_k, None)
    found: list[dict[str, int]] = [{"num_warps": 4, "num_stages": 3, **default}]
    shipped = Path(fused_moe.__file__).parent / "configs" / file_name
    if shipped.is_file():
        launches = {int(key): launch for key, launch in read_json(shipped).items() if key.isdecimal()}
        found.append(launches[min(launches, key=lambda measured: abs(measured - tokens))])
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


def openai_layer(
    x: torch.Tensor, w13: list[torch.Tensor], w2: list[torch.Tensor], ids: torch.Tensor, weights: torch.Tensor
) -> Callable[[int], object]:
    """Return OpenAI's triton_kernels on the i-th weights, as vLLM calls them: matmul_ogs twice, SiLU·mul between.

    The sum over a token's experts is fused into the second. Raises UnsupportedError, with the reason, where the
    package is absent (vLLM's CPU build carries none) or too new or old to be called so.
    """
    from vllm.utils.import_utils import has_triton_kernels, import_triton_kernels

    if not has_triton_kernels():
        raise UnsupportedError("triton_kernels", "neither installed nor carried by this vLLM", "use vLLM's CUDA build")
    import_triton_kernels()
    compat.check_signatures(OPENAI_PROBES)
    import torch
    from vllm.model_executor.layers.fused_moe.experts.gpt_oss_triton_kernels_moe import make_routing_data

    matmul_ogs = importlib.import_module("triton_kernels.matmul_ogs").matmul_ogs

    def run(index: int) -> object:
        up, down = w13[index], w2[index]
        routing, gather, scatter = make_routing_data(ids, weights, len(up))
        rows: Any = matmul_ogs(x, up.transpose(1, 2), None, routing, gather_indx=gather)
        rows = rows.view(-1, up.shape[1])
        h = torch.empty(len(rows), down.shape[2], dtype=x.dtype, device=x.device)
        torch.ops._C.silu_and_mul(h, rows)
        out: Any = matmul_ogs(
            h, down.transpose(1, 2), None, routing, scatter_indx=scatter, gammas=routing.gate_scal
        )  # fmt: skip
        return out.view_as(x)

    return run
