"""A checkpoint's weight files: which they are, and what their headers say together."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_serve.errors import CheckpointError
from leap_serve.files import read_json
from leap_serve.weights.overlays import ROUTER_HEAD
from leap_serve.weights.tensorfile import TensorEntry, read_header

INDEX = "model.safetensors.index.json"
OPTIMIZER = "optimizer.safetensors"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object; CheckpointError naming the file where it is none."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise CheckpointError(path, f"holds a JSON {type(value).__name__}, not an object", "restore the file")
    return value


def read_shards(folder: Path) -> tuple[dict[str, TensorEntry], dict[str, dict[str, str]]]:
    """Read the headers of all weight files: those that the index names, or the only one there is."""
    index: Mapping[str, str] | None = None
    if (folder / INDEX).exists():
        index = read_object(folder / INDEX).get("weight_map")
        if not isinstance(index, dict) or not index or not all(_plain(name) for name in index.values()):
            raise CheckpointError(folder / INDEX, "has no weight_map of tensor → file name", "restore the file")
    names = sorted(set(index.values())) if index else [_single_file(folder)]
    tensors: dict[str, TensorEntry] = {}
    metadata: dict[str, dict[str, str]] = {}
    for file in names:
        path = folder / file
        if not path.is_file():
            raise CheckpointError(path, f"is missing, {INDEX} names it", "copy or download the shard")
        entries, metadata[file] = read_header(path)
        for name, entry in entries.items():
            # A tensor stored twice counts where the index says it is.
            if index and index.get(name, file) != file:
                continue
            if name in tensors:
                raise CheckpointError(path, f"holds {name}, which {tensors[name].file.name} holds too", "keep one")
            tensors[name] = entry
    missing = [name for name in index or () if name not in tensors]
    if missing and index:
        raise CheckpointError(
            folder / index[missing[0]], f"lacks tensor {missing[0]}, {INDEX} says it is there"
            + (f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""), "copy or download the shard again",
        )  # fmt: skip
    return tensors, metadata


def _plain(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def _single_file(folder: Path) -> str:
    if (folder / "model.safetensors").is_file():
        return "model.safetensors"
    found = [path.name for path in folder.glob("*.safetensors") if path.name not in (ROUTER_HEAD, OPTIMIZER)]
    if len(found) == 1:
        return found[0]
    if found:
        raise CheckpointError(folder, f"has {len(found)} safetensors files but no {INDEX}", "restore the index")
    if any(next(folder.glob(pattern), None) for pattern in PICKLES):
        raise CheckpointError(
            folder, "has only pickled weights (.bin, .pt), which can run code when read",
            "convert them to safetensors, for instance with save_pretrained(safe_serialization=True)",
        )  # fmt: skip
    raise CheckpointError(folder, "has no safetensors weights", "give the folder of a complete checkpoint")
