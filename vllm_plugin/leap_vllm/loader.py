"""What a ``Leap…`` model reads beside its weights, and the load format ``leap``. Both refuse before weights move."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vllm.model_executor.model_loader import DefaultModelLoader

from leap_serve.architectures import Family, text_config
from leap_serve.checkpoint import MANIFEST, Checkpoint, check_cut, check_experts, resolve_model
from leap_serve.errors import CheckpointError, UnsupportedError, UsageError
from leap_serve.plan import Plan
from leap_serve.weights import unmerged
from leap_serve.weights.merge import Merge
from leap_serve.weights.overlays import ADAPTER, check_overlays

if TYPE_CHECKING:
    import torch
    from torch import nn
    from vllm.config import LoadConfig, ModelConfig, VllmConfig


@dataclass(frozen=True, slots=True)
class Cut:
    """A cut checkpoint, checked: its plan and what its router head and adapter make of its tensors.

    Args:
        folder: where it lies.
        family: the row of its family.
        plan: what leap.json holds.
        merge: router head and adapter; changes nothing where there is neither.
        dtype: that is served, to which merged tensors are rounded.
    """

    folder: Path
    family: Family
    plan: Plan
    merge: Merge
    dtype: torch.dtype

    def with_overlays(self, weights: Iterable[tuple[str, torch.Tensor]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Pass the checkpoint's tensors on, router head and adapter merged in, one at a time and before any sharding."""
        for name, tensor in weights:
            # The head's own file comes by where vLLM takes every *.safetensors of the folder.
            if name not in self.merge.head_names:
                yield name, self.merge.merged(name, tensor, self.dtype)


def open_cut(vllm_config: VllmConfig, family: Family) -> Cut:
    """Find, check and open the cut checkpoint that vLLM is about to load.

    Raises LeapError: leap.json is absent or of an unknown version, parts bear different fingerprints, a
    shard is missing or truncated, or counts, shapes, router head, adapter and plan disagree.
    """
    folder = resolve_model(vllm_config.model_config.model, vllm_config.model_config.revision)
    if not (folder / MANIFEST).is_file():
        raise CheckpointError(
            folder, f"has no {MANIFEST}, without which architecture {family.leap_architecture} cannot be served",
            f"copy {MANIFEST} from where the checkpoint was cut, or cut again",
        )  # fmt: skip
    checkpoint = Checkpoint.open(folder)
    check_cut(checkpoint)
    assert checkpoint.plan is not None  # check_cut refuses a checkpoint without one
    check_groups(checkpoint, checkpoint.plan)
    merge = Merge(checkpoint, adapter=merges_adapter(checkpoint, vllm_config))
    return Cut(folder, family, checkpoint.plan, merge, vllm_config.model_config.dtype)


def merges_adapter(checkpoint: Checkpoint, vllm_config: VllmConfig) -> bool:
    """Whether an adapter is merged at load, or left to vLLM as LEAP_UNMERGED says; raises LeapError for half of either."""
    by_vllm = vllm_config.lora_config is not None
    if unmerged.left_to_vllm():
        needed = unmerged.rank_for_vllm(checkpoint)
        if not by_vllm or vllm_config.lora_config.max_lora_rank < needed:
            raise UsageError(
                unmerged.VARIABLE, f"leaves {ADAPTER} to vLLM, which needs --enable-lora and --max-lora-rank {needed}",
                f"serve with leap serve {unmerged.FLAG}",
            )  # fmt: skip
        return False
    if by_vllm and (checkpoint.folder / ADAPTER).exists():
        raise UnsupportedError(
            "--enable-lora", f"would apply adapters on top of {ADAPTER}, which is merged into the experts at load",
            f"serve with leap serve {unmerged.FLAG}, without it, or merge with leap export first",
        )  # fmt: skip
    return True


def check_groups(checkpoint: Checkpoint, plan: Plan) -> None:
    """Raise UnsupportedError where routing is limited to groups of experts and a layer cannot be divided so."""
    if checkpoint.family.group_keys is None:
        return
    groups, kept = (int(text_config(checkpoint.config).get(key) or 1) for key in checkpoint.family.group_keys)
    for index, layer in plan.layers.items():
        count = len(layer.retained)
        if count % groups or layer.top_k > count // groups * kept:
            raise UnsupportedError(
                checkpoint.folder / MANIFEST,
                f"layer {index} retains {count} experts, its router picks {layer.top_k} of them from {kept} of"
                f" {groups} equal groups",
                "search with the same number of experts from each group, and enough of them",
            )


def check_any(checkpoint: Checkpoint) -> None:
    """Raise LeapError unless a full or a cut checkpoint is whole, and loses no router head or adapter when served."""
    if checkpoint.plan is not None:
        check_cut(checkpoint)
        return
    check_experts(checkpoint)
    check_overlays(checkpoint)


class LeapLoader(DefaultModelLoader):
    """``--load-format leap``: vLLM's own loader, after the files were checked; reads safetensors only."""

    def __init__(self, load_config: LoadConfig) -> None:
        ours = copy.copy(load_config)
        ours.load_format = "safetensors"
        super().__init__(ours)

    def load_model(self, vllm_config: VllmConfig, model_config: ModelConfig, prefix: str = "") -> nn.Module:
        """Check the checkpoint, then load it; a ``Leap…`` model has its own, stricter checks."""
        folder = resolve_model(model_config.model, model_config.revision)
        check_any(Checkpoint.open(folder))
        model: Any = super().load_model(vllm_config, model_config, prefix)
        return model
