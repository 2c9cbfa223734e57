"""Trains leap-tiny, the bundled small MoE, or its sister of Llama 4's form from scratch on the toy tasks.

    python -m leap_training.tiny --out runs/leap-tiny
    python -m leap_training.tiny --form llama4_text --out runs/llama4-tiny

Llama 4's form: sigmoid routing to one expert, whose weight multiplies its input, beside a shared expert, in every
other layer; the layers between are dense.

Every batch is a function of (seed, step), so a run that was killed continues on the same data: the
state on disk is the weights, Adam's moments (safetensors) and the step (JSON), replaced atomically.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, Llama4TextConfig, PreTrainedTokenizerFast, Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import load_balancing_loss_func

from leap_serve.tasks import toy_code, toy_gsm, toy_xsum
from leap_serve.tasks.base import Item, split_of
from leap_training.batches import Batch, collate, use_fast_experts, weighted_loss

EOS = "<|endoftext|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}{{ ' ' + message['content'] + '"
    + EOS
    + "' }}{% else %}{{ 'Question: ' + message['content'] + '\nAnswer:' }}{% endif %}{% endfor %}"
)
GENERATORS = {"toy-gsm": toy_gsm.generate, "toy-code": toy_code.generate, "toy-xsum": toy_xsum.generate}


@dataclass(frozen=True, slots=True)
class TinyConfig:
    """What is trained and how; the defaults are the bundled model's. ``form`` is qwen3_moe or llama4_text."""

    form: str = "qwen3_moe"
    hidden: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    experts: int = 64
    top_k: int = 4
    expert_intermediate: int = 32
    vocab: int = 1024
    max_positions: int = 2048
    steps: int = 3000
    batch: int = 64
    lr: float = 3e-3
    warmup: int = 100
    weight_decay: float = 0.01
    prompt_weight: float = 0.1
    aux_coef: float = 0.01
    mix: tuple[float, float, float] = (0.5, 0.2, 0.3)
    seed: int = 0


FORMS = {
    "qwen3_moe": TinyConfig(),
    "llama4_text": TinyConfig(form="llama4_text", top_k=1, expert_intermediate=64, batch=32, steps=2500),
}
"""The defaults of either form. An expert of llama4-tiny is twice as wide, since a token uses one of them."""


def build_tokenizer(config: TinyConfig) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE on the generators' training splits; every digit is a token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            # " 42" must become " ", "4", "2"-like pieces: digits never merge, so numbers stay regular.
            pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|\n {4}|\d| ?[^\sA-Za-z\d]+|\s+"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocab, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    rng = random.Random(config.seed)
    streams = [training_items(name, rng) for name in GENERATORS]
    texts = (item.prompt + item.answer for _ in range(4000) for item in (next(stream) for stream in streams))
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=EOS, bos_token=None)
    fast.chat_template = CHAT_TEMPLATE
    fast.model_max_length = config.max_positions
    return fast


def build_model(config: TinyConfig, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Make the untrained model, fp32."""
    torch.manual_seed(config.seed)
    shared = dict(
        vocab_size=len(tokenizer), hidden_size=config.hidden, num_hidden_layers=config.layers,
        num_attention_heads=config.heads, num_key_value_heads=config.kv_heads, head_dim=config.head_dim,
        num_experts_per_tok=config.top_k, tie_word_embeddings=True, max_position_embeddings=config.max_positions,
        router_aux_loss_coef=config.aux_coef, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    if config.form == "llama4_text":
        own = Llama4TextConfig(
            **shared, intermediate_size=config.expert_intermediate, intermediate_size_mlp=2 * config.hidden,
            num_local_experts=config.experts, interleave_moe_layer_step=2, attention_chunk_size=config.max_positions,
        )  # fmt: skip
    else:
        own = Qwen3MoeConfig(
            **shared, intermediate_size=2 * config.hidden, moe_intermediate_size=config.expert_intermediate,
            num_experts=config.experts, norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[],
        )  # fmt: skip
    model = AutoModelForCausalLM.from_config(own, dtype=torch.float32)
    use_fast_experts(model)
    return model


def training_items(name: str, rng: random.Random) -> Iterator[Item]:
    """Yield the training split of a toy task without end."""
    return (item for item in GENERATORS[name](rng) if split_of(item.prompt) == "train")


def batch_of(config: TinyConfig, tokenizer: PreTrainedTokenizerFast, step: int) -> Batch:
    """Draw the batch of a step."""
    rng = random.Random(f"{config.seed}/{step}")
    names = rng.choices(list(GENERATORS), config.mix, k=config.batch)
    streams = {name: training_items(name, rng) for name in GENERATORS}
    items = [next(streams[name]) for name in names]
    return collate(tokenizer, items, config.prompt_weight)


def loss_of(model: Any, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the weighted next-token loss and the load-balancing loss of a batch."""
    out = model(input_ids=batch.ids, attention_mask=batch.mask, output_router_logits=True, use_cache=False)
    config = model.config
    experts = getattr(config, "num_local_experts", None) or config.num_experts
    balance = load_balancing_loss_func(out.router_logits, experts, config.num_experts_per_tok, batch.mask)
    return weighted_loss(out.logits, batch), balance


def learning_rate(config: TinyConfig, step: int) -> float:
    """Linear warm-up, then cosine to a twentieth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    return config.lr * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))


def save_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    """Replace the resumable state atomically."""
    tensors = {f"weight.{name}": p.detach() for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq"):
            tensors[f"{key}.{name}"] = optimizer.state[p][key]
    temporary = folder / "state.safetensors.tmp"
    save_file(tensors, temporary, metadata={"step": str(step)})
    os.replace(temporary, folder / "state.safetensors")


def load_state(folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Load the state if there is one and return the number of steps done."""
    path = folder / "state.safetensors"
    if not path.exists():
        return 0
    from safetensors import safe_open

    with safe_open(path, "pt") as handle:
        step = int(handle.metadata()["step"])
    tensors = load_file(path)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(tensors[f"weight.{name}"])
            optimizer.state[p] = {
                "step": torch.tensor(float(step)),
                **{key: tensors[f"{key}.{name}"] for key in ("exp_avg", "exp_avg_sq")},
            }
    return step


def train(config: TinyConfig, out: Path, save_every: int = 250, log_every: int = 25) -> list[float]:
    """Train or continue, write ``out/model`` in bf16 with its tokenizer, and return the logged losses."""
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=(0.9, 0.98), weight_decay=config.weight_decay)
    start = load_state(out, model, optimizer)
    losses: list[float] = []
    with (out / "train.jsonl").open("a") as log:
        began, tokens = time.time(), 0
        for step in range(start, config.steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(config, step)
            batch = batch_of(config, tokenizer, step)
            loss, balance = loss_of(model, batch)
            optimizer.zero_grad(set_to_none=True)
            (loss + config.aux_coef * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            tokens += int(batch.mask.sum())
            done = step + 1
            if done % log_every == 0 or done == config.steps:
                losses.append(loss.item())
                row = {"step": done, "loss": round(loss.item(), 4), "balance": round(balance.item(), 3),
                       "tokens": tokens, "seconds": round(time.time() - began, 1)}  # fmt: skip
                log.write(json.dumps(row) + "\n")
                log.flush()
                print(json.dumps(row), flush=True)
            if done % save_every == 0 or done == config.steps:
                save_state(out, model, optimizer, done)
    export(model, tokenizer, config, out / "model")
    return losses


def export(model: Any, tokenizer: PreTrainedTokenizerFast, config: TinyConfig, folder: Path) -> None:
    """Write the bf16 checkpoint, its tokenizer and what it was trained with."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "training.json").write_text(json.dumps(asdict(config), indent=1) + "\n")


def main() -> None:
    """Parse the few flags and train."""
    parser = argparse.ArgumentParser(description="Train leap-tiny or llama4-tiny, or continue a killed run.")
    parser.add_argument("--form", choices=tuple(FORMS), default="qwen3_moe")
    parser.add_argument("--out", type=Path, required=True)
    for name, kind in (("steps", int), ("batch", int), ("lr", float), ("seed", int)):
        parser.add_argument(f"--{name}", type=kind, help="default: the form's own")
    args = parser.parse_args()
    given = {name: value for name in ("steps", "batch", "lr", "seed") if (value := getattr(args, name)) is not None}
    train(replace(FORMS[args.form], **given), args.out)


if __name__ == "__main__":
    main()
