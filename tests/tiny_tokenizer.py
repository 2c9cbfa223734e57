"""A character tokenizer that fits the random checkpoints' vocabulary of 160."""

from __future__ import annotations

import shutil
import string
from pathlib import Path


def add_tokenizer(folder: Path, with_bos: bool = False) -> Path:
    """Write a tokenizer beside a checkpoint: <pad> 0, <s> 1, </s> 2, <unk> 3, then one token per printable character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<s>", "</s>", "<unk>", *string.printable]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    if with_bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.save_pretrained(folder)
    return folder


def talking_copy(checkpoint: Path, folder: Path, with_bos: bool = False) -> Path:
    """Copy a checkpoint that has no tokenizer and give it one."""
    return add_tokenizer(Path(shutil.copytree(checkpoint, folder)), with_bos)
