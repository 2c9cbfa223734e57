"""Plain supervised fine-tuning of a cut checkpoint: retained experts and routers, nothing else.

    python -m leap_training.finetune ckpt/ --task toy-gsm --out tuned/

The yardstick of the tables: no routing agent, no active learning, no adapters (the papers' «vanilla
fine-tuning»). The number of items and steps is fixed once, for every comparison.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.rules import check_untuned
from leap_serve.engines.torch_cut import load_model
from leap_serve.errors import LeapError, UsageError
from leap_serve.provenance import made_by
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import load_task
from leap_training.batches import Batch, collate, use_fast_experts, weighted_loss
from leap_training.whole import check_writable, write_whole

REPORT = "finetune.json"
ITEMS = 1000
STEPS = 400


@dataclass(frozen=True, slots=True)
class FinetuneConfig:
    """AdamW with linear decay; the defaults are those of every published comparison."""

    items: int = ITEMS
    steps: int = STEPS
    batch: int = 32
    lr: float = 1e-3
    weight_decay: float = 0.01
    seed: int = 0


def finetune(
    folder: Path,
    task_name: str,
    out: Path,
    config: FinetuneConfig = FinetuneConfig(),
    progress: Callable[[int, int], None] | None = None,
    force: bool = False,
) -> list[float]:
    """Tune the experts and routers of a checkpoint and write it, whole, to ``out``; return the losses.

    A cut may be of any plan that transformers holds (engines.torch_cut): uneven, merged, skipping. Its router map and β stay.
    Raises LeapError, before anything is loaded, where it was tuned already or could not be written to ``out``.
    """
    source = Checkpoint.open(folder)
    check_untuned(source)
    check_writable(source, out, force, "let leap tune leave adapters beside a cut of it")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = load_model(source, torch.float32)
    use_fast_experts(model)
    routers = (".gate.weight", ".router.weight")
    tuned = [p for name, p in model.named_parameters() if ".experts." in name or name.endswith(routers)]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for parameter in tuned:
        parameter.requires_grad_(True)
    items = load_task(task_name).items("train", config.items, seed=config.seed)
    batches = (collate(tokenizer, chosen, prompt_weight=0.0) for chosen in in_order(items, config))
    losses = take_steps(model, tuned, batches, config, progress)
    note = made_by(task=task_name, items=config.items, steps=config.steps, seed=config.seed, losses=losses)
    write_whole(model, folder, out, (REPORT, note), force)
    return losses


def in_order(items: Sequence[Item], config: FinetuneConfig) -> Iterator[list[Item]]:
    """The items of every step, each item once before any comes again."""
    rng, order = random.Random(config.seed), list[int]()
    for _ in range(config.steps):
        if len(order) < config.batch:
            order += rng.sample(range(len(items)), len(items))
        yield [items[i] for i in order[: config.batch]]
        order = order[config.batch :]


def take_steps(
    model: Any,
    tuned: Sequence[torch.nn.Parameter],
    batches: Iterable[Batch],
    config: FinetuneConfig,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:
    """Tune parameters of a model on one batch after the other; returns the training loss before every step, in nats."""
    optimizer = torch.optim.AdamW(tuned, lr=config.lr, weight_decay=config.weight_decay)
    losses: list[float] = []
    for step, batch in enumerate(batches):
        for group in optimizer.param_groups:
            group["lr"] = config.lr * (1 - step / config.steps)
        loss = weighted_loss(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tuned, 1.0)
        optimizer.step()
        losses.append(loss.item())
        if progress:
            progress(step + 1, config.steps)
    return losses


def main() -> None:
    """Parse the few flags and tune."""
    parser = argparse.ArgumentParser(description="Fine-tune the retained experts and routers of a checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="replace what is at --out")
    args = parser.parse_args()
    config = FinetuneConfig(steps=args.steps, seed=args.seed)
    try:
        losses = finetune(args.checkpoint, args.task, args.out, config, force=args.force)
    except LeapError as error:
        parser.exit(2 if isinstance(error, UsageError) else 1, f"{parser.prog}: {error}\n")
    print(json.dumps({"first": losses[0], "last": sum(losses[-20:]) / len(losses[-20:])}))


if __name__ == "__main__":
    main()
