"""Which kernel an MoE layer gets: ours where a measured table says that it is faster, vLLM's otherwise.

The setting is the environment variable LEAP_KERNEL (``leap serve --leap-kernel``), so that every process of the
engine reads the same: "auto" asks the table, "ours" and "vllm" do as they say.
"""

from __future__ import annotations

import functools
import logging
import os
from typing import TYPE_CHECKING, Any, Literal, get_args

from leap_vllm import compat_experts
from leap_vllm.compat_experts import MoeLayer

if TYPE_CHECKING:
    from leap_kernels.config import KernelConfig

VARIABLE = "LEAP_KERNEL"
Choice = Literal["auto", "ours", "vllm"]
_log = logging.getLogger("vllm.leap")


def setting() -> Choice:
    """Return LEAP_KERNEL, "auto" if unset; another word is named once and counts as "auto"."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in get_args(Choice):
        _say(f"{VARIABLE} is {value!r}, not one of {', '.join(get_args(Choice))}: taken as auto")
        return "auto"
    return value  # type: ignore[return-value]


def choose(layer: MoeLayer, stock: type) -> type:
    """Return the experts class for a layer that vLLM is building with class ``stock``."""
    wanted = setting()
    if layer.backend == "CPU" and not (wanted == "ours" and _interpreting()):
        if wanted == "ours":
            _say("our MoE kernel needs a CUDA GPU: vLLM's CPU kernel runs instead")
        return compat_experts.mapped_cpu_experts(stock) if layer.ranks > 1 else stock
    if wanted == "vllm":
        return stock
    if layer.backend not in ("TRITON", "CPU") or not layer.plain or layer.batch_invariant:
        if wanted == "ours":
            why = "it is not plain SiLU·mul" if not layer.plain else "results must be batch-invariant"
            why = (
                why if layer.backend in ("TRITON", "CPU") else f"vLLM chose {layer.backend}; pass --moe-backend triton"
            )
            _say(f"an MoE layer keeps vLLM's kernel: {why}")
        return stock
    if wanted == "ours":
        return _ours("ours")
    table = _table(layer.experts, layer.hidden, layer.width, layer.top_k, layer.dtype)
    if table is None or not any(table.faster(tokens) for tokens in table.entries):
        return stock
    return _ours("auto")


def launch(wanted: str, x: Any, w13: Any, topk_ids: Any) -> KernelConfig | bool:
    """Say how to run one batch x [T, H]: a tuned configuration, True (the default one), or False (vLLM's kernel)."""
    shape = (len(w13), x.shape[1], w13.shape[1] // 2, topk_ids.shape[1], str(x.dtype).removeprefix("torch."))
    table = _table(*shape)
    if table is None:
        return wanted == "ours"
    if wanted == "auto" and not table.faster(len(x)):
        return False
    return table.nearest(len(x)).config


@functools.cache
def _ours(wanted: str) -> type:
    return compat_experts.our_experts(functools.partial(launch, wanted))


@functools.cache
def _table(experts: int, hidden: int, width: int, top_k: int, dtype: str) -> Any:
    """Return the measured table of a shape on this process's GPU, or None; a damaged one counts as none, and is named."""
    import torch

    if not torch.cuda.is_available():
        return None
    from leap_kernels.tuning import Shape, device_name, find_table

    try:
        return find_table(Shape(experts, hidden, width, top_k, dtype), device_name(torch.device("cuda")))
    except ValueError as error:
        _say(str(error))
        return None


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter: how our kernel is tried in an engine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _say(text: str) -> None:
    _log.warning(text)
