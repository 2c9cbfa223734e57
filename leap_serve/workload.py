"""What clients send in a benchmark: how many requests of which length, drawn from the model's own vocabulary."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leap_serve.architectures import text_config
from leap_serve.errors import CheckpointError, UsageError
from leap_serve.files import read_json


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests of equal length, submitted together.

    Args:
        name: what the row in the results is called, e.g. ``latency``.
        input_tokens: prompt tokens per request.
        output_tokens: tokens decoded per request, end-of-text ignored.
        batch: requests submitted at once.
        seed: of the prompts; with the same vocabulary, the same seed and round give the same prompts.
    """

    name: str
    input_tokens: int
    output_tokens: int
    batch: int
    seed: int = 0

    def __post_init__(self) -> None:
        for field in ("input_tokens", "output_tokens", "batch"):
            if getattr(self, field) < 1:
                raise UsageError(f"--{field.replace('_', '-')}", f"is {getattr(self, field)}", "give 1 or more")

    def prompts(self, vocabulary: Sequence[int], round_: int) -> list[list[int]]:
        """Draw the prompts of one round: ``batch`` lists of ``input_tokens`` token ids.

        Every round draws new ones, so that no prefix cache answers for the model.
        """
        generator = random.Random(f"{self.seed}/{round_}/{self.input_tokens}/{self.batch}")
        return [generator.choices(vocabulary, k=self.input_tokens) for _ in range(self.batch)]

    def to_json(self) -> dict[str, Any]:
        """Return the JSON form, for result rows."""
        return asdict(self)


def vocabulary_of(folder: Path) -> list[int]:
    """Return the token ids that a prompt may hold: the tokenizer's own, special tokens excluded, in order.

    A checkpoint without a tokenizer (random test models) gives the ids of its embedding, less the special
    ones its config names.
    """
    config = text_config(read_json(folder / "config.json"))
    size = int(config.get("vocab_size", 0))
    special = {config.get(f"{name}_token_id") for name in ("bos", "eos", "pad")}
    ids = set(range(size)) - {i for i in special if isinstance(i, int)}
    if (folder / "tokenizer.json").exists() or (folder / "tokenizer_config.json").exists():
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder)
        except (OSError, ValueError) as error:
            raise CheckpointError(folder, f"the tokenizer cannot be read ({error})", "restore its files") from None
        ids &= set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
    if not ids:
        raise CheckpointError(folder / "config.json", f"vocab_size {size} leaves no ordinary token", "check the model")
    return sorted(ids)
