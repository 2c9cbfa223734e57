"""Tiny random checkpoints, one per MoE family, as stock transformers writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COMMON: dict[str, Any] = dict(
    vocab_size=160, hidden_size=64, intermediate_size=64, num_hidden_layers=4, num_attention_heads=2,
    num_key_value_heads=1, head_dim=32, max_position_embeddings=256, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
SPECIFIC: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True),
    "qwen2_moe": dict(
        num_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=32
    ),
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "olmoe": dict(num_experts=8, num_experts_per_tok=2),
    "gpt_oss": dict(num_local_experts=8, num_experts_per_tok=2, sliding_window=32),
    "llama4_text": dict(
        num_local_experts=8, num_experts_per_tok=1, intermediate_size_mlp=64, interleave_moe_layer_step=1
    ),
    "glm4_moe": dict(
        n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=32, n_group=1, topk_group=1,
        first_k_dense_replace=1, norm_topk_prob=True,
    ),
}  # fmt: skip


def make_checkpoint(family: str, folder: Path, seed: int = 0, dtype: str = "float32", **overrides: Any) -> Path:
    """Write a random checkpoint whose routing is decisive: weights N(0, 0.2), so that dropping experts shows."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**COMMON, **SPECIFIC[family], **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(0.0, 0.2)
        for name, buffer in model.named_buffers():
            if "correction_bias" in name:
                buffer.normal_(0.0, 0.1)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    return folder
