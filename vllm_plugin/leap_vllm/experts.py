"""Which kernel an MoE layer gets: ours where a measured table says that it is faster, vLLM's otherwise.

The setting is the environment variable LEAP_KERNEL (``leap serve --leap-kernel``), so that every process of the
engine reads the same: "auto" asks the table, "ours" and "vllm" do as they say. Tables are looked for where
leap_kernels.tuning says: what ``leap tune-kernels CKPT`` wrote beside the weights is found without being named.
Each decision is logged once a shape, kept with its layer, and shown by GET /leap.
"""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from leap_vllm import compat_experts
from leap_vllm.compat_experts import Chosen, MoeLayer

if TYPE_CHECKING:
    from leap_kernels.config import KernelConfig

VARIABLE = "LEAP_KERNEL"
Setting = Literal["auto", "ours", "vllm"]
_log = logging.getLogger("vllm.leap")


def setting() -> Setting:
    """Return LEAP_KERNEL, "auto" if unset; another word is named once and counts as "auto"."""
    value = os.environ.get(VARIABLE) or "auto"
    if value not in get_args(Setting):
        _warn(f"{VARIABLE} is {value!r}, not one of {', '.join(get_args(Setting))}: taken as auto")
        return "auto"
    return value  # type: ignore[return-value]


def choose(layer: MoeLayer, stock: type) -> Chosen:
    """Return what a layer runs that vLLM is building with experts class ``stock``, and why."""
    wanted, beside = setting(), _beside(layer.model)
    compat_experts.offer_tuned_files(beside)
    chosen = _choose(layer, stock, wanted, beside)
    shared = f" a rank of {layer.ranks}" if layer.ranks > 1 else ""
    about = f"MoE layers of {layer.experts} experts{shared}, H {layer.hidden}, I {layer.width}, top-{layer.top_k}, {layer.dtype}"
    if chosen.kernel == "ours":
        launches = f"launches from {chosen.launches}" if chosen.launches else "default launches"
        _inform(f"{about}: our kernel, {chosen.why}; {launches}")
    elif wanted == "ours":
        _warn(f"{about} keep vLLM's kernel: {chosen.why}")
    else:
        _inform(f"{about}: vLLM's kernel, {chosen.why}")
    return chosen


def _choose(layer: MoeLayer, stock: type, wanted: Setting, beside: Path | None) -> Chosen:
    if layer.backend == "CPU" and not (wanted == "ours" and _interpreting()):
        experts = compat_experts.mapped_cpu_experts(stock) if layer.ranks > 1 else stock
        return Chosen(experts, "vllm", None, "ours needs a CUDA GPU")
    if refusal := _refusal(layer):
        return Chosen(stock, "vllm", None, refusal)
    if wanted == "vllm":
        return Chosen(stock, "vllm", None, f"as {VARIABLE} says")
    table, path = _table(layer.experts, layer.hidden, layer.width, layer.top_k, layer.dtype, layer.ranks, beside)
    if wanted == "ours":
        return Chosen(_ours("ours", beside, layer.ranks), "ours", path, f"as {VARIABLE} says")
    if table is None:
        return Chosen(stock, "vllm", None, "nobody measured this shape here (leap tune-kernels does)")
    ahead = sum(table.faster(tokens) for tokens in table.entries)
    why = f"measured as the faster one at {ahead} of {len(table.entries)} numbers of tokens"
    if not ahead:
        return Chosen(stock, "vllm", None, "measured as the faster one throughout")
    return Chosen(_ours("auto", beside, layer.ranks), "ours", path, why)


def _refusal(layer: MoeLayer) -> str:
    """Say why our kernel cannot run a layer; empty if it can."""
    if layer.backend not in ("TRITON", "CPU"):
        return f"vLLM chose {layer.backend}; pass --moe-backend triton"
    if not layer.plain:
        return "it is not plain SiLU·mul"
    return "results must be batch-invariant" if layer.batch_invariant else ""


def _beside(model: str) -> Path | None:
    """The folder in which a checkpoint keeps its tables; None where it has none."""
    from leap_kernels.tuning import BESIDE_WEIGHTS

    folder = Path(model) / BESIDE_WEIGHTS
    return folder if model and folder.is_dir() else None


def launch(
    wanted: str, beside: Path | None, x: Any, w13: Any, topk_ids: Any, ranks: int = 1
) -> KernelConfig | bool:  # fmt: skip
    """Say how to run one batch x [T, H]: a tuned configuration, True (the default one), or False (vLLM's kernel)."""
    shape = (len(w13), x.shape[1], w13.shape[1] // 2, topk_ids.shape[1], str(x.dtype).removeprefix("torch."))
    table, _ = _table(*shape, ranks, beside)
    if table is None:
        return wanted == "ours"
    if wanted == "auto" and not table.faster(len(x)):
        return False
    return table.nearest(len(x)).config


@functools.cache
def _ours(wanted: str, beside: Path | None, ranks: int) -> type:
    return compat_experts.our_experts(functools.partial(launch, wanted, beside, ranks=ranks))


@functools.cache
def _table(experts: int, hidden: int, width: int, top_k: int, dtype: str, ranks: int, beside: Path | None) -> Any:
    """Return (table, its file) of a shape on this process's GPU, or (None, None); a damaged one is named and not used."""
    import torch

    from leap_kernels.tuning import Shape, Table, device_name, find_file

    if not torch.cuda.is_available() and not _interpreting():
        return None, None
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    path = find_file(Shape(experts, hidden, width, top_k, dtype, ranks), device_name(device), beside)
    try:
        return (Table.load(path), path) if path else (None, None)
    except ValueError as error:
        _warn(str(error))
        return None, None


def _interpreting() -> bool:
    """Whether Triton runs kernels in its interpreter: how our kernel is tried in an engine without a GPU."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _warn(text: str) -> None:
    _log.warning(text)


@functools.cache
def _inform(text: str) -> None:
    _log.info(text)
