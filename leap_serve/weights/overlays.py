"""What tuning lays beside a cut, read from headers: the router head, and PEFT's adapter on the experts.

``router_head.safetensors`` holds ``layers.{l}.weight`` [|I|, H] (and ``.bias`` [|I|]) in place of the rows of
MoE layer l's router. ``adapter/`` is PEFT's own folder. transformers 5 holds the experts of a layer as two
parameters, ``gate_up_proj`` and ``down_proj``, each [E, d1, d2]; PEFT's ``target_parameters`` keep for such a
parameter ONE pair of matrices, in which each expert e has a block of rank r of its own:

    lora_A [r·E, in]    row e·r + j is rank j of expert e
    lora_B [out, r·E]   column j·E + e is rank j of expert e
    ΔW_e = scaling · B_e A_e [out, in],  scaling = alpha / r, or alpha / √r with use_rslora

(out, in) is (d1, d2), and (d2, d1) in families whose experts transformers marks as transposed. PEFT nests two
adapters of one module: the first's names gain ``base_layer.``. E is the layer's own |I|.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from leap_serve.architectures import Family, Role
from leap_serve.errors import CheckpointError, UnsupportedError
from leap_serve.files import read_json
from leap_serve.weights.tensorfile import TensorEntry, read_header

if TYPE_CHECKING:
    from leap_serve.checkpoint import Checkpoint

ROUTER_HEAD = "router_head.safetensors"
ADAPTER_FOLDER = "adapter"
ADAPTER = "adapter/adapter_model.safetensors"
ADAPTER_CONFIG = "adapter/adapter_config.json"
MERGEABLE = ("F32", "BF16", "F16")
TRANSPOSED = ("gpt_oss",)
"""Families whose expert parameters lie [E, in, out] to transformers (is_transposed)."""

Parameter = Literal["gate_up_proj", "down_proj"]
PARAMETERS: tuple[Parameter, ...] = ("gate_up_proj", "down_proj")
PROJECTIONS: Mapping[str, tuple[Parameter, int]] = {
    "gate_proj": ("gate_up_proj", 0), "w1": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1), "w3": ("gate_up_proj", 1),
    "down_proj": ("down_proj", 0), "w2": ("down_proj", 0),
}  # fmt: skip
"""Tensor of one expert on disk → the parameter it is a part of, and which half."""

_NAME = re.compile(
    r"^base_model\.model\.(?:.*\.)?layers\.(?P<layer>\d+)\.(?P<block>\w+)\.experts\."
    r"(?P<inner>base_layer\.)?lora_(?P<side>[AB])\.weight$"
)
# What changes the arithmetic, and the only values under which it is the one above.
_PLAIN: Mapping[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "use_dora": (False, None), "bias": ("none", None), "fan_in_fan_out": (False, None),
    "lora_bias": (False, None), "rank_pattern": ({}, None), "alpha_pattern": ({}, None), "modules_to_save": ([], None),
    "target_modules": ([], None), "layer_replication": (None,), "use_qalora": (False, None), "use_bdlora": (None, False),
    "alora_invocation_tokens": (None,), "trainable_token_indices": (None,),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Factors:
    """The adapter of one parameter: A [rank·E, in] and B [out, rank·E] as entries of adapter_model.safetensors."""

    layer: int
    parameter: Parameter
    experts: int
    rank: int
    scaling: float
    transposed: bool
    a: TensorEntry
    b: TensorEntry


@dataclass(frozen=True, slots=True)
class Part:
    """What a weight tensor holds of a parameter [E, d1, d2]: all of it, or of one expert a half (or the whole) of d1."""

    layer: int
    parameter: Parameter
    expert: int | None = None
    half: int = 0


def part_of(role: Role, name: str) -> Part | None:
    """Return what an expert tensor is to an adapter; None for biases, scales and all that is no expert's."""
    if role.kind == "expert":
        found = PROJECTIONS.get(role.after.removeprefix(".").removesuffix(".weight"))
        return Part(role.layer, found[0], role.expert, found[1]) if found and role.after.endswith(".weight") else None
    last = name.removesuffix(".weight").rpartition(".")[2]
    for parameter in PARAMETERS:
        if role.kind == "fused" and last == parameter:
            return Part(role.layer, parameter)
    return None


def part_of_expert(role: Role) -> Literal["gate", "up", "down"] | None:
    """Which matrix a tensor of one expert is; None for all that is none."""
    if role.kind != "expert" or not role.after.endswith(".weight"):
        return None
    found = PROJECTIONS.get(role.after.removeprefix(".").removesuffix(".weight"))
    if found is None:
        return None
    if found[0] == "down_proj":
        return "down"
    return "up" if found[1] else "gate"


def check_overlays(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError or UnsupportedError unless router head and adapter fit the cut they lie beside.

    Fingerprints are checked with those of all other parts (checkpoint.py); here it is layers, names and shapes.
    """
    if checkpoint.plan is None:
        if checkpoint.overlays:
            raise CheckpointError(
                checkpoint.overlays[0], "lies beside a checkpoint that has no leap.json",
                "copy leap.json from where the checkpoint was cut, or move the file away",
            )  # fmt: skip
        return
    head, factors = router_rows(checkpoint), read_factors(checkpoint)
    merged = set(checkpoint.exported.get("merged", {}).values())
    for path in checkpoint.overlays if merged and (head or factors) else ():
        if data_sha256(path) in merged:
            raise CheckpointError(path, "is merged into these weights already", "move it away")


def router_rows(checkpoint: Checkpoint) -> dict[str, TensorEntry]:
    """Return {router tensor of the checkpoint: the tensor of router_head.safetensors that takes its place}."""
    path = checkpoint.folder / ROUTER_HEAD
    if not path.exists():
        return {}
    entries = dict(read_header(path)[0])
    layers = checkpoint.plan.layers if checkpoint.plan else {}
    for name in entries:
        layer = name.split(".")[1] if name.startswith("layers.") else ""
        if not layer.isdigit() or int(layer) not in layers:
            raise CheckpointError(path, f"tensor {name} is for no MoE layer of leap.json", "tune again")
    tails, found = checkpoint.head_tails(), {}
    for name, own in checkpoint.tensors.items():
        role = checkpoint.role(name)
        if role.kind != "router" or not any(name.endswith(f".{tail}") for tail in tails[role.layer]):
            continue
        last = name.rpartition(".")[2]
        entry = entries.pop(f"layers.{role.layer}.{last}", None) if last in ("weight", "bias") else None
        if entry is not None:
            _check_like(entry, own.shape, f"layer {role.layer} has {own.shape[0]} experts and {list(own.shape)} there")
            _check_mergeable(own, "router head")
            found[name] = entry
    if entries:
        raise CheckpointError(path, f"{min(entries)} replaces nothing in the checkpoint", "tune again")
    return found


def read_factors(checkpoint: Checkpoint) -> dict[tuple[int, Parameter], Factors]:
    """Return {(layer, parameter): its adapter} of adapter/, every shape checked against the checkpoint's experts."""
    folder = checkpoint.folder / ADAPTER_FOLDER
    if not folder.exists():
        return {}
    path = checkpoint.folder / ADAPTER
    if not path.is_file():
        raise CheckpointError(folder, "has no adapter_model.safetensors", "save the adapter again, or move it away")
    config = read_json(checkpoint.folder / ADAPTER_CONFIG)
    _check_config(checkpoint, config)
    shapes = _parameter_shapes(checkpoint)
    pairs = _pairs(checkpoint, config, read_header(path)[0])
    found = {}
    for (layer, parameter), pair in pairs.items():
        if set(pair) != {"A", "B"}:
            only = next(iter(pair.values()))
            raise CheckpointError(path, f"tensor {only.name} lacks its counterpart", "save the adapter again")
        if (layer, parameter) not in shapes:
            what = f"tensor {pair['A'].name} adapts {parameter} of layer {layer}, where leap.json has no experts"
            raise CheckpointError(path, what, "tune again")
        found[layer, parameter] = _factors(checkpoint, config, layer, parameter, pair, shapes[layer, parameter])
    if not found:
        raise CheckpointError(path, "adapts nothing", "move adapter/ away")
    return found


def _check_config(checkpoint: Checkpoint, config: Any) -> None:
    path = checkpoint.folder / ADAPTER_CONFIG
    if not isinstance(config, dict):
        raise CheckpointError(path, f"holds a JSON {type(config).__name__}, not an object", "save the adapter again")
    for key, allowed in _PLAIN.items():
        if key in config and config[key] not in allowed:
            raise UnsupportedError(
                path, f"{key} is {config[key]!r}, which cannot be merged into the experts",
                "tune with plain LoRA on the experts' parameters alone",
            )  # fmt: skip
    rank, alpha = config.get("r"), config.get("lora_alpha")
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or isinstance(alpha, bool):
        raise CheckpointError(path, f"r is {rank!r} and lora_alpha {alpha!r}, not two numbers", "save it again")
    version = re.match(r"(\d+)\.(\d+)", str(config.get("peft_version") or ""))
    if version and (int(version[1]), int(version[2])) < (0, 19):
        what = f"was written by PEFT {version[0]}, which lays out the factors of 3-D parameters otherwise"
        raise UnsupportedError(path, what, "save it with PEFT 0.19 or newer")


def _pairs(
    checkpoint: Checkpoint, config: Mapping[str, Any], entries: Mapping[str, TensorEntry]
) -> dict[tuple[int, Parameter], dict[str, TensorEntry]]:
    """Sort the tensors by what they adapt: {(layer, parameter): {"A": …, "B": …}}."""
    targets = {str(target).rpartition(".")[2] for target in config.get("target_parameters") or ()}
    order = [parameter for parameter in PARAMETERS if parameter in targets]
    # PEFT wraps the parameters of a module in the order in which transformers defines them.
    if not order or len(order) != len(targets):
        path = checkpoint.folder / ADAPTER_CONFIG
        what = f"target_parameters are {sorted(targets)}, not experts.gate_up_proj and experts.down_proj"
        raise UnsupportedError(path, what, "tune the experts' parameters alone")
    # transformers 5 holds Mixtral's block as ``mlp`` in memory, where PEFT takes its names from.
    blocks = (checkpoint.family.block, "mlp")
    pairs: dict[tuple[int, Parameter], dict[str, TensorEntry]] = {}
    for name, entry in entries.items():
        found = _NAME.match(name)
        if not found or found["block"] not in blocks or (found["inner"] and len(order) == 1):
            raise UnsupportedError(entry.file, f"tensor {name} adapts no expert parameter", "adapt the experts alone")
        parameter = order[0] if found["inner"] else order[-1]
        pairs.setdefault((int(found["layer"]), parameter), {})[found["side"]] = entry
    return pairs


def _parameter_shapes(checkpoint: Checkpoint) -> dict[tuple[int, Parameter], tuple[int, int, int]]:
    """Return [|I|, d1, d2] of every parameter that an adapter may adapt; MTP layers are not among them."""
    shapes: dict[tuple[int, Parameter], tuple[int, int, int]] = {}
    for name, entry in checkpoint.tensors.items():
        part = part_of(checkpoint.role(name), name)
        if part is None or part.layer >= checkpoint.num_hidden_layers:
            continue
        _check_mergeable(entry, "adapter")
        if part.expert is None:
            d1, d2 = entry.shape[1:]
        elif part.expert == 0:
            d1, d2 = entry.shape[0] * (2 if part.parameter == "gate_up_proj" else 1), entry.shape[1]
        else:
            continue
        shapes[part.layer, part.parameter] = (checkpoint.experts_in(part.layer), d1, d2)
    return shapes


def _factors(
    checkpoint: Checkpoint,
    config: Mapping[str, Any],
    layer: int,
    parameter: Parameter,
    pair: Mapping[str, TensorEntry],
    shape: tuple[int, int, int],
) -> Factors:
    experts, d1, d2 = shape
    transposed = is_transposed(checkpoint.family)
    out, inner = (d2, d1) if transposed else (d1, d2)
    rank = int(config["r"])
    fits = f"layer {layer} has {experts} experts and {parameter} {list(shape)}, at rank {rank}"
    _check_like(pair["A"], (rank * experts, inner), fits)
    _check_like(pair["B"], (out, rank * experts), fits)
    scaling = config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return Factors(layer, parameter, experts, rank, float(scaling), transposed, pair["A"], pair["B"])


def is_transposed(family: Family) -> bool:
    """Whether transformers holds the family's expert parameters as [E, in, out]."""
    return family.model_type in TRANSPOSED


def _check_like(entry: TensorEntry, shape: tuple[int, ...], why: str) -> None:
    if entry.shape != shape:
        raise CheckpointError(
            entry.file, f"tensor {entry.name} has shape {list(entry.shape)}, but {why}",
            "it belongs to another cut: put the right file back, or tune again",
        )  # fmt: skip
    _check_mergeable(entry, entry.file.name)


def _check_mergeable(entry: TensorEntry, what: str) -> None:
    if entry.dtype not in MERGEABLE:
        raise UnsupportedError(
            entry.file, f"tensor {entry.name} is {entry.dtype}, into which no {what} can be merged",
            f"use a checkpoint in one of {', '.join(MERGEABLE)}",
        )  # fmt: skip


def data_sha256(path: Any) -> str:
    """Hash a safetensors file's tensors without its metadata: names, dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for name, entry in sorted(read_header(path)[0].items()):
        digest.update(f"{name} {entry.dtype} {entry.shape}".encode())
        with path.open("rb") as stream:
            stream.seek(entry.begin)
            digest.update(stream.read(entry.nbytes))
    return digest.hexdigest()
