"""Checkpoints made of raw bytes for the file side: any layout, dtype and name, written without the code under test."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

Spec = tuple[str, tuple[int, ...]]
"""safetensors dtype and shape."""
WIDTH = {"F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I8": 1, "I32": 4, "I64": 8, "BOOL": 1}


def content_of(name: str, dtype: str, shape: tuple[int, ...]) -> bytes:
    """Pseudo-random bytes that depend on the tensor's name alone, so that any mix-up shows."""
    size = WIDTH[dtype] * prod(shape)
    return hashlib.shake_128(name.encode()).digest(size)


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Spec],
    metadata: Mapping[str, str] | None = None,
    content: Mapping[str, bytes] | None = None,
) -> None:
    """Write a file by the format's own page: length, header, data in the order given."""
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    blobs, position = [], 0
    for name, (dtype, shape) in tensors.items():
        blob = (content or {}).get(name) or content_of(name, dtype, shape)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + len(blob)]}
        position += len(blob)
        blobs.append(blob)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))


def read_safetensors(path: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read a file by the format's own page: name → dtype, shape, bytes."""
    blob = path.read_bytes()
    size = struct.unpack("<Q", blob[:8])[0]
    header = json.loads(blob[8 : 8 + size])
    header.pop("__metadata__", None)
    data = blob[8 + size :]
    return {
        name: (spec["dtype"], tuple(spec["shape"]), data[spec["data_offsets"][0] : spec["data_offsets"][1]])
        for name, spec in header.items()
    }


def read_all(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Read every weight file of a checkpoint."""
    found: dict[str, tuple[str, tuple[int, ...], bytes]] = {}
    for path in sorted(folder.glob("model*.safetensors")):
        found |= read_safetensors(path)
    return found


def make(
    folder: Path,
    tensors: Mapping[str, Spec],
    config: Mapping[str, Any],
    shards: int = 1,
    total_parameters: int | None = None,
) -> Path:
    """Write a checkpoint of the given tensors, dealt out over shards in contiguous runs."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors)
        return folder
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for k in range(shards):
        file = f"model-{k + 1:05d}-of-{shards:05d}.safetensors"
        part = names[k * len(names) // shards : (k + 1) * len(names) // shards]
        write_safetensors(folder / file, {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, file)
    metadata = {"total_size": sum(WIDTH[dtype] * prod(shape) for dtype, shape in tensors.values())}
    if total_parameters is not None:
        metadata["total_parameters"] = total_parameters
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": metadata, "weight_map": weight_map}))
    return folder


def qwen_config(experts: int = 8, layers: int = 2, top_k: int = 2, **more: Any) -> dict[str, Any]:
    """A Qwen3-MoE config as its files on the Hub have it."""
    return {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": experts,
        "num_experts_per_tok": top_k, "num_hidden_layers": layers, "hidden_size": 16, "moe_intermediate_size": 8,
        "norm_topk_prob": True, "vocab_size": 32, "router_aux_loss_coef": 0.001, **more,
    }  # fmt: skip


def qwen_tensors(
    experts: int = 8,
    layers: Iterable[int] = (0, 1),
    hidden: int = 16,
    inner: int = 8,
    dtype: str = "F32",
    prefix: str = "model.layers.",
) -> dict[str, Spec]:
    """The tensors of a small Qwen3-MoE, per-expert layout."""
    tensors: dict[str, Spec] = {"model.embed_tokens.weight": (dtype, (32, hidden))}
    for layer in layers:
        head = f"{prefix}{layer}."
        tensors[f"{head}input_layernorm.weight"] = (dtype, (hidden,))
        for expert in range(experts):
            for part, shape in (("gate", (inner, hidden)), ("up", (inner, hidden)), ("down", (hidden, inner))):
                tensors[f"{head}mlp.experts.{expert}.{part}_proj.weight"] = (dtype, shape)
        tensors[f"{head}mlp.gate.weight"] = (dtype, (experts, hidden))
    tensors["lm_head.weight"] = (dtype, (32, hidden))
    return tensors
