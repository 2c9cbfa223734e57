"""How text becomes token ids, the same for every engine and for training."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leap_serve.errors import LeapError

if TYPE_CHECKING:
    from leap_serve.tasks.base import Item


@dataclass(frozen=True, slots=True)
class Encoded:
    """Token ids of an item: the prompt with the tokenizer's own prefix (BOS where it has one), and the bare answer."""

    prompt: list[int]
    answer: list[int]


def encode(tokenizer: Any, texts: Sequence[str], prefix: bool = False) -> list[list[int]]:
    """Encode texts without adding special tokens, or with what the tokenizer puts before a text alone."""
    before = prefix_ids(tokenizer) if prefix else []
    _check(tokenizer)
    found = tokenizer(list(texts), add_special_tokens=False)["input_ids"] if texts else []
    return [before + list(ids) for ids in found]


def _check(tokenizer: Any) -> None:
    # For a folder without tokenizer files transformers makes up an empty one, which turns any text into nothing.
    if tokenizer is None or not tokenizer("a", add_special_tokens=False)["input_ids"]:
        raise LeapError("tokenizer", "the model's folder holds none", "copy the tokenizer's files beside config.json")


def prefix_ids(tokenizer: Any) -> list[int]:
    """Return what the tokenizer puts before a text: [BOS] or nothing."""
    _check(tokenizer)
    # An appended end of text must not stand between prompt and answer, so only the leading part counts.
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer("").get("input_ids", []))[:1] == [bos] else []


def encode_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Encode prompts as the model saw them in training: the tokenizer's prefix, then the text."""
    return encode(tokenizer, prompts, prefix=True)


def encode_items(tokenizer: Any, items: Sequence[Item]) -> list[Encoded]:
    """Encode prompt and answer apart and let them be concatenated, so that the boundary is training's."""
    prompts = encode_prompts(tokenizer, [item.prompt for item in items])
    answers = encode(tokenizer, [item.answer for item in items])
    return [Encoded(prompt, answer) for prompt, answer in zip(prompts, answers, strict=True)]


def with_end(tokenizer: Any, items: Sequence[Item]) -> list[Encoded]:
    """Encode items for scoring: the end of text belongs to the answer."""
    end = end_ids(tokenizer)
    return [Encoded(one.prompt, one.answer + end) for one in encode_items(tokenizer, items)]


def end_ids(tokenizer: Any) -> list[int]:
    """Return [EOS], or nothing for a tokenizer without an end-of-text token."""
    return [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]


def check_lengths(lengths: Sequence[int], longest: int, what: str) -> None:
    """Raise LeapError for the first of ``what`` (prompt, item) that is empty or exceeds ``longest`` tokens."""
    for number, length in enumerate(lengths):
        if length < 1:
            raise LeapError(f"{what} {number}", "holds no tokens", "give some text")
        if length > longest:
            raise LeapError(
                f"{what} {number}", f"has {length} tokens, the engine takes {longest} (max_model_len)",
                "shorten it, or raise max_model_len",
            )  # fmt: skip


def items_sha256(items: Sequence[Item]) -> str:
    """Identify a data set: SHA-256 over prompts and answers in their order."""
    digest = hashlib.sha256()
    for item in items:
        for text in (item.prompt, item.answer):
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()
