"""A tuned model of transformers as a whole checkpoint: the source's files with its experts' and routers' tensors replaced."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from leap_serve.adapter import plain_name
from leap_serve.checkpoint import INDEX, MANIFEST, Checkpoint, check_cut
from leap_serve.cut.write import MAX_SHARD_BYTES, copy_others, whole_folder
from leap_serve.errors import LeapError
from leap_serve.files import write_json

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def write_whole(model: Any, source: Path, out: Path, report: tuple[str, Mapping[str, Any]], force: bool) -> None:
    """Write what a model holds that was loaded from ``source`` and tuned: a checkpoint like it, to ``out``.

    transformers writes what it holds, in its own dtype; each tensor then takes the place of the source's own in a copy of
    its shards, in that one's dtype. So names, fingerprints and config stay the source's, and so does what transformers does
    not read (MTP layers, a vision tower). The result appears under ``out`` whole and checked, or not at all.

    Args:
        model: as engines.torch_source.load_model returns it.
        source: the full model, or a cut of any plan that transformers holds.
        report: the name of a JSON file that is laid beside it, and its content.

    Raises:
        CheckpointError, LeapError: the cut is damaged, or transformers' tensors are not the source's; nothing is left.
    """
    found = Checkpoint.open(source)
    if found.manifest is not None:
        check_cut(found)
    held = sum(parameter.nbytes for parameter in model.parameters())
    with whole_folder(out, force, found.weight_bytes + held) as work:
        for file in [*found.metadata, *(name for name in (INDEX, MANIFEST) if (source / name).exists())]:
            shutil.copyfile(source / file, work / file)
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            model.save_pretrained(scratch, max_shard_size=MAX_SHARD_BYTES)
            _fill(work, found, sorted(Path(scratch).glob("*.safetensors")))
        copy_others(
            work, found, {layer: range(found.experts_in(layer)) for layer in found.moe_layers + found.mtp_layers}
        )
        if found.manifest is None:
            shutil.copyfile(source / "config.json", work / "config.json")
        else:
            write_json(work / "config.json", {**found.config, "architectures": [plain_name(found)]})
        write_json(work / report[0], dict(report[1]))
        if found.manifest is not None:
            check_cut(Checkpoint.open(work))


def _fill(work: Path, source: Checkpoint, saved: Sequence[Path]) -> None:
    """Put the tensors of the files ``saved`` into the shards in ``work``, which lie there as they are in the source."""
    left = {
        name
        for name in source.tensors
        if source.role(name).kind != "other" and source.role(name).layer in source.moe_layers
    }
    for path in saved:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                # A model of several modalities holds the text model, which alone is tuned, below this name.
                own = name if name in source.tensors else f"language_model.{name}"
                entry, tensor = source.tensors.get(own), file.get_tensor(name)
                if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype not in DTYPES:
                    there = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing of this name"
                    what = f"has {there} where transformers holds {name} {list(tensor.shape)}"
                    raise LeapError(source.folder, what, "let leap tune leave adapters beside it, without --baseline")
                with (work / entry.file.name).open("r+b") as shard:
                    shard.seek(entry.begin)
                    shard.write(tensor.to(DTYPES[entry.dtype]).contiguous().view(torch.uint8).numpy().tobytes())
                left.discard(own)
    if left:
        what = f"holds {min(left)} and {len(left) - 1} more, which transformers does not"
        raise LeapError(source.folder, what, "let leap tune leave adapters beside it, without --baseline")
