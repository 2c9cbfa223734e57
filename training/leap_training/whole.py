"""A tuned model of transformers as a whole checkpoint: the source's files with its experts' and routers' tensors replaced."""

from __future__ import annotations

import copy
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from leap_serve.adapter import plain_name
from leap_serve.checkpoint import INDEX, MANIFEST, Checkpoint, check_cut
from leap_serve.cut.write import MAX_SHARD_BYTES, check_destination, copy_others, whole_folder
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.files import check_free, write_json
from leap_serve.provenance import made_by

DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def check_writable(source: Checkpoint, out: Path, force: bool, remedy: str, flag: str = "--out") -> None:
    """Raise LeapError, before any training, where what comes of ``source`` could not be written to ``out``.

    The folder is the source's or not empty, or the weights are quantised (:func:`check_unpacked`, whose ``remedy`` this is).
    """
    check_destination(source.folder, out, flag)
    check_free(out, force, flag)
    check_unpacked(source, remedy)


def check_unpacked(source: Checkpoint, remedy: str) -> None:
    """Raise UnsupportedError where tuned experts or routers could not be written as the source holds them."""
    for name, entry in source.tensors.items():
        if source.role(name).kind != "other" and entry.dtype not in DTYPES:
            what = f"is quantised ({name} is {entry.dtype}), and tuned whole weights are written as the source's are"
            raise UnsupportedError(source.folder, what, remedy)


def write_whole(model: Any, source: Path, out: Path, report: tuple[str, Mapping[str, Any]], force: bool) -> None:
    """Write what a model holds that was loaded from ``source`` and tuned: a checkpoint like it, to ``out``.

    transformers writes what it holds, in its own dtype; :func:`replace_weights` does the rest, and can refuse.

    Args:
        model: as engines.torch_cut.load_model returns it.
        source: the full model, or a cut of any plan that transformers holds.
        report: the name of a JSON file that is laid beside it, and its content.
    """

    def save(scratch: Path) -> Path:
        model.save_pretrained(scratch, max_shard_size=MAX_SHARD_BYTES)
        return scratch

    replace_weights(source, out, report, save, sum(parameter.nbytes for parameter in model.parameters()), force)


def replace_weights(
    source: Path,
    out: Path,
    report: tuple[str, Mapping[str, Any]],
    save: Callable[[Path], Path],
    room: int,
    force: bool,
) -> None:
    """Write ``source`` with other experts and routers to ``out``; leap.json of a cut says that they are no longer the base's.

    Each tensor takes the place of the source's own in a copy of its shards, in that one's dtype. So names, fingerprints and
    config stay the source's, and so does what transformers does not read (MTP layers, a vision tower). The result appears
    under ``out`` whole and checked, or not at all.

    Args:
        save: given a folder, leaves safetensors there, or in the one below it that it returns.
        room: bytes that it needs for that.

    Raises:
        CheckpointError, LeapError: the cut is damaged, or the tensors are not the source's; nothing is left.
    """
    found = Checkpoint.open(source)
    if found.manifest is not None:
        check_cut(found)
    with whole_folder(out, force, found.weight_bytes + room) as work:
        for file in [*found.metadata, *([INDEX] if (source / INDEX).exists() else [])]:
            shutil.copyfile(source / file, work / file)
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            _fill(work, found, sorted(save(Path(scratch)).glob("*.safetensors")))
        others = {layer: range(found.experts_in(layer)) for layer in found.moe_layers + found.mtp_layers}
        copy_others(work, found, others)
        write_json(work / report[0], dict(report[1]))
        if found.manifest is None:
            shutil.copyfile(source / "config.json", work / "config.json")
            return
        write_json(work / "config.json", {**found.config, "architectures": [plain_name(found)]})
        manifest = copy.deepcopy(dict(found.manifest))
        manifest.setdefault("checkpoint", {})["trained"] = {"report": report[0], "made_by": made_by()}
        write_json(work / MANIFEST, manifest)
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
