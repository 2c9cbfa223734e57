"""LoRA on the experts, through PEFT: wrap a transformers model, save what leap-serve merges, load it again.

leap_serve.weights.overlays says how PEFT lays out one adapter per expert for a 3-D parameter. What PEFT cannot do
there: dropout, DoRA, a rank per expert, and E = 1 where the parameter is transposed (GPT-OSS).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.weights.overlays import PARAMETERS

if TYPE_CHECKING:
    from peft import PeftModel


def wrap(model: Any, rank: int, alpha: float, rslora: bool = False) -> PeftModel:
    """Give every expert of a transformers MoE model its own adapter of the given rank on gate_up_proj and down_proj.

    Only the adapters require gradients afterwards. B starts at zero, so the wrapped model answers as before.
    Each expert's ΔW is alpha / rank · B A (alpha / √rank with ``rslora``); layers may differ in their |I|.
    The adapters have the dtype of the experts: wrap an fp32 model, or cast them before training.

    Args:
        model: a causal LM whose experts transformers holds as 3-D parameters; it is changed in place.
        rank: r of every expert, at least 1.
        alpha: numerator of the scaling.

    Raises LeapError for a rank below 1, and UnsupportedError where there are no such parameters.
    """
    from peft import LoraConfig, get_peft_model

    if rank < 1:
        raise LeapError("rank", f"is {rank}", "give at least 1")
    targets = [name for name, value in model.named_parameters() if _is_target(name, value)]
    blocks = {name.split(".")[-3] for name in targets}
    if not blocks:
        kind = type(model).__name__
        raise UnsupportedError(kind, "holds no experts.gate_up_proj or experts.down_proj", "give an MoE model")
    config = LoraConfig(
        r=rank, lora_alpha=alpha, use_rslora=rslora, target_modules=[], task_type="CAUSAL_LM",
        target_parameters=sorted(f"{block}.experts.{parameter}" for block in blocks for parameter in PARAMETERS),
    )  # fmt: skip
    return get_peft_model(model, config)


def save(model: PeftModel, folder: Path) -> None:
    """Write adapter_config.json and adapter_model.safetensors; leap_serve.adapter.write_overlays takes the folder."""
    model.save_pretrained(str(folder), safe_serialization=True)


def load(model: Any, folder: Path, trainable: bool = False) -> PeftModel:
    """Put a saved adapter on its model, unmerged, with PEFT's own reader."""
    from peft import PeftModel

    return PeftModel.from_pretrained(model, str(folder), is_trainable=trainable)


def _is_target(name: str, value: Any) -> bool:
    return value.ndim == 3 and name.endswith(tuple(f".experts.{parameter}" for parameter in PARAMETERS))
