"""The on-disk format: find, open and check a checkpoint from its headers, without torch and without its weights."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_serve.architectures import Family, Role, family_of, role_of, text_config
from leap_serve.errors import CheckpointError, UnsupportedError
from leap_serve.hub import resolve_model as resolve_model  # one import serves whoever opens checkpoints
from leap_serve.plan import BaseModel, Plan
from leap_serve.weights.overlays import ADAPTER, ROUTER_HEAD, check_overlays
from leap_serve.weights.shards import INDEX as INDEX
from leap_serve.weights.shards import OPTIMIZER as OPTIMIZER
from leap_serve.weights.shards import PICKLES as PICKLES
from leap_serve.weights.shards import read_object, read_shards
from leap_serve.weights.tensorfile import TensorEntry, read_header

MANIFEST = "leap.json"
FINGERPRINT_KEY = "leap_fingerprint"
# transformers 5 writes num_local_experts where older files of the same family say num_experts.
COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts")
ROUTING_KEYS = (
    "model_type", "num_hidden_layers", "hidden_size", "norm_topk_prob", "n_group", "topk_group", "topk_method",
    "scoring_func", "routed_scaling_factor",
)  # fmt: skip
_HUB_SNAPSHOT = re.compile(r"models--(?P<org>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<revision>[^/]+)$")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as its headers describe it.

    Args:
        folder: where it lies.
        config: config.json.
        family: the row of its family.
        tensors: name → entry, in the order of the shards.
        metadata: shard file name → its safetensors metadata.
        manifest: leap.json as it stands, or None for a full model.
        plan: the plan that leap.json holds, or None.
    """

    folder: Path
    config: Mapping[str, Any]
    family: Family
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, Mapping[str, str]]
    manifest: Mapping[str, Any] | None
    plan: Plan | None

    @classmethod
    def open(cls, folder: Path) -> Checkpoint:
        """Read config.json, the index, every shard's header and leap.json; raise CheckpointError on any damage."""
        if not folder.is_dir():
            raise CheckpointError(folder, "no such folder", "check the path")
        if not (folder / "config.json").is_file():
            raise CheckpointError(folder, "has no config.json", "give the folder of a transformers checkpoint")
        config = read_object(folder / "config.json")
        family = family_of(config, folder / "config.json")
        tensors, metadata = read_shards(folder)
        manifest = read_object(folder / MANIFEST) if (folder / MANIFEST).exists() else None
        plan = Plan.from_json(manifest, folder / MANIFEST) if manifest is not None else None
        checkpoint = cls(folder, config, family, tensors, metadata, manifest, plan)
        _ = checkpoint.num_experts, checkpoint.top_k, checkpoint.num_hidden_layers
        if not checkpoint.moe_layers:
            raise UnsupportedError(folder, f"no {family.model_type} experts among its tensors", "give an MoE model")
        return checkpoint

    @property
    def num_hidden_layers(self) -> int:
        """Decoder layers of the main model; MTP layers come after them."""
        return self._number("num_hidden_layers")

    @property
    def num_experts(self) -> int:
        """Routed experts per MoE layer as config.json says; of an uneven cut, the largest count."""
        keys = self.count_keys
        if len({text_config(self.config)[key] for key in keys}) > 1:
            raise CheckpointError(self.folder / "config.json", f"{' and '.join(keys)} disagree", "make them equal")
        return self._number(keys[0] if keys else self.family.num_experts_key)

    @property
    def count_keys(self) -> list[str]:
        """The config keys that hold the number of experts."""
        return [key for key in COUNT_KEYS if text_config(self.config).get(key) is not None]

    @property
    def top_k(self) -> int:
        """Experts per token as config.json says; of an uneven cut, the largest."""
        return self._number(self.family.top_k_key)

    @property
    def moe_layers(self) -> list[int]:
        """Main layers that hold routed experts, increasing."""
        return [layer for layer in self._expert_layers() if layer < self.num_hidden_layers]

    @property
    def mtp_layers(self) -> list[int]:
        """Multi-token-prediction layers that hold routed experts; numbered from num_hidden_layers on."""
        return [layer for layer in self._expert_layers() if layer >= self.num_hidden_layers]

    @property
    def mtp_retained(self) -> dict[int, tuple[int, ...]]:
        """Of a cut checkpoint: MTP layer → retained ids where the plan does not name the layer (leap.json)."""
        found = ((self.manifest or {}).get("checkpoint") or {}).get("mtp_retained") or {}
        return {int(layer): tuple(ids) for layer, ids in found.items()}

    @property
    def exported(self) -> Mapping[str, Any]:
        """Of an exported cut (leap.json): what was merged into its weights; empty otherwise."""
        return ((self.manifest or {}).get("checkpoint") or {}).get("exported") or {}

    @property
    def trained(self) -> Mapping[str, Any]:
        """Of a cut whose experts and routers were trained as a whole (leap.json): by what; empty otherwise."""
        return ((self.manifest or {}).get("checkpoint") or {}).get("trained") or {}

    @property
    def overlays(self) -> list[Path]:
        """The tuned parts that lie beside the weights: router head and adapter."""
        return [path for name in (ROUTER_HEAD, ADAPTER) if (path := self.folder / name).exists()]

    @property
    def weight_bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.nbytes for entry in self.tensors.values())

    def role(self, name: str) -> Role:
        """What a tensor of this checkpoint is to the cut."""
        return role_of(self.family, name, self.num_hidden_layers)

    def experts_in(self, layer: int) -> int:
        """Routed experts that a layer must hold: by the plan in leap.json, otherwise by config.json."""
        if self.plan is None:
            return self.num_experts
        if layer in self.plan.layers:
            return len(self.plan.layers[layer].retained)
        return len(self.mtp_retained.get(layer, ())) or self.num_experts

    def router_rows_in(self, layer: int) -> int:
        """Rows that a layer's router must have: one per expert, of a router with a map one per expert of the full model."""
        planned = self.plan.layers.get(layer) if self.plan else None
        if self.plan is not None and planned is not None and planned.maps_router:
            return self.plan.num_experts
        return self.experts_in(layer)

    def head_tails(self) -> dict[int, frozenset[str]]:
        """Layer → what follows ``router.`` in the names of its tensors with one row per expert.

        That is {"weight", "bias", "e_score_correction_bias"} as far as present. Of a router of several
        layers it is the last affine one alone ({"2.weight", "2.bias"}): the others know no experts.
        """
        tails: dict[int, dict[str, TensorEntry]] = {}
        for name, entry in self.tensors.items():
            role = self.role(name)
            if role.kind == "router":
                tails.setdefault(role.layer, {})[router_tail(self.family, name)] = entry
        return {layer: _head_of(found, self.router_rows_in(layer)) for layer, found in tails.items()}

    def identity(self) -> BaseModel:
        """Identify the weights without reading them all.

        The SHA-256 is over the config keys that decide the routing, the fingerprint of a cut, the name,
        dtype and shape of every tensor in the order of names, and the bytes of all router tensors. So it
        does not depend on sharding or on file names, and two models that were trained apart differ in it;
        it does not notice a change of an expert's or an attention weight's value, but that by an export or by training.
        """
        text = text_config(self.config)
        essence = [
            {key: text.get(key) for key in ROUTING_KEYS}, self.num_experts, self.top_k,
            self.plan.fingerprint if self.plan else None,
            [[name, entry.dtype, list(entry.shape)] for name, entry in sorted(self.tensors.items())],
        ]  # fmt: skip
        essence += [self.exported["merged"]] if self.exported else []
        essence += [dict(self.trained)] if self.trained else []
        digest = hashlib.sha256(json.dumps(essence, separators=(",", ":"), sort_keys=True).encode())
        for name, entry in sorted(self.tensors.items()):
            if self.role(name).kind == "router":
                digest.update(read_bytes(entry))
        hub = _HUB_SNAPSHOT.search(self.folder.absolute().as_posix())
        if hub:
            return BaseModel(f"{hub['org']}/{hub['name']}", digest.hexdigest(), hub["revision"])
        return BaseModel(self.folder.resolve().name, digest.hexdigest())

    def _expert_layers(self) -> list[int]:
        roles = map(self.role, self.tensors)
        return sorted({role.layer for role in roles if role.kind in ("expert", "fused")})

    def _number(self, key: str) -> int:
        value = text_config(self.config).get(key)
        if type(value) is not int or value < 1:
            raise CheckpointError(self.folder / "config.json", f"{key} is {value!r}, not a count", "restore the file")
        return value


def router_tail(family: Family, name: str) -> str:
    """Return what follows the router's own name in a tensor's name."""
    return name.rpartition(f".{family.block}.{family.router}.")[2]


def _head_of(tails: Mapping[str, TensorEntry], experts: int) -> frozenset[str]:
    direct = frozenset(tail for tail in tails if "." not in tail)
    if "weight" in direct or not tails:
        return direct
    heads = [
        tail.rpartition(".")[0] for tail, entry in tails.items()
        if tail.endswith(".weight") and len(entry.shape) == 2 and entry.shape[0] == experts
    ]  # fmt: skip
    if not heads:
        return direct
    last = max(heads, key=lambda head: [int(part) if part.isdigit() else -1 for part in head.split(".")])
    return direct | {tail for tail in tails if tail.rpartition(".")[0] == last}


def read_bytes(entry: TensorEntry) -> bytes:
    """Read one tensor's bytes; meant for small ones."""
    with entry.file.open("rb") as stream:
        stream.seek(entry.begin)
        return stream.read(entry.nbytes)


def width_of(source: Checkpoint) -> int:
    """Return the routed experts' intermediate size (I) as config.json says."""
    found = text_config(source.config).get(source.family.width_key)
    if type(found) is not int or found < 1:
        raise UnsupportedError(source.folder / "config.json", f"{source.family.width_key} is {found!r}", "restore it")
    return found


def check_narrow(source: Checkpoint) -> None:
    """Raise UnsupportedError where the family's config cannot say that routed experts alone are narrower."""
    shared = source.family.shares_width
    if shared is not None and (not shared or text_config(source.config).get(shared)):
        raise UnsupportedError(
            source.folder, f"its shared expert's size hangs on {source.family.width_key}, too, and would have to shrink",
            "choose another --method than intra",
        )  # fmt: skip


def check_experts(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless every MoE layer holds all its experts, alike, and router rows for just them."""
    _check_shapes(checkpoint)
    suffixes: dict[int, dict[int, set[str]]] = {}
    heads = checkpoint.head_tails()
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.role(name)
        if role.kind == "expert":
            suffixes.setdefault(role.layer, {}).setdefault(role.expert, set()).add(role.after)
        elif role.kind == "fused":
            check_rows(entry, role, checkpoint.experts_in(role.layer))
        elif role.kind == "router" and router_tail(checkpoint.family, name) in heads[role.layer]:
            check_rows(entry, role, checkpoint.router_rows_in(role.layer))
        elif role.kind == "other" and ".experts." in name:
            what = f"{name} is an expert's, but not where {checkpoint.family.model_type} keeps experts"
            raise UnsupportedError(entry.file, what, "convert the weights with transformers")
    for layer in checkpoint.moe_layers + checkpoint.mtp_layers:
        if not heads.get(layer):
            raise CheckpointError(checkpoint.folder, f"layer {layer} has experts but no router", "restore its weights")
    for layer, experts in suffixes.items():
        count = checkpoint.experts_in(layer)
        if sorted(experts) != list(range(count)):
            raise CheckpointError(
                checkpoint.folder, f"layer {layer} holds {len(experts)} experts ({_ids(experts)}), {count} are expected",
                "restore its weights and its manifest",
            )  # fmt: skip
        whole = set().union(*experts.values())
        for expert, found in experts.items():
            if found != whole:
                lacks = ", ".join(sorted(whole - found))
                raise CheckpointError(
                    checkpoint.folder, f"layer {layer}, expert {expert} lacks {lacks}", "restore its weights"
                )


def _check_shapes(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the experts, and the routers, of all layers have the same shapes.

    Experts that a plan made narrower are compared with those of the same width. An engine may pad what is too small and answer with NaN, as vLLM does.
    """
    first: dict[tuple[str, int | None], TensorEntry] = {}
    planned = checkpoint.plan.layers if checkpoint.plan else {}
    for name, entry in checkpoint.tensors.items():
        role = checkpoint.role(name)
        if role.kind == "other":
            continue
        what = f"expert{role.after}" if role.kind == "expert" else name.rpartition(f".{checkpoint.family.block}.")[2]
        width = planned[role.layer].width if role.layer in planned and role.kind == "expert" else None
        if width is not None and width not in entry.shape:
            raise CheckpointError(
                entry.file, f"tensor {name} has shape {list(entry.shape)}, layer {role.layer} keeps {width} channels",
                "restore its weights, or cut again",
            )  # fmt: skip
        known = first.setdefault((what, width), entry)
        size, wanted = (found.shape if role.kind == "expert" else found.shape[1:] for found in (entry, known))
        if size != wanted:
            raise CheckpointError(
                entry.file,
                f"tensor {name} has shape {list(entry.shape)}, which does not go with {list(known.shape)} of {known.name}",
                "copy or download the shard again, or cut again",
            )


def check_rows(entry: TensorEntry, role: Role, experts: int) -> None:
    """Raise CheckpointError unless dimension 0 counts the experts; a fused scalar scale is let through."""
    if entry.shape[:1] == (experts,) or (role.kind == "fused" and is_shared_scale(entry)):
        return
    raise CheckpointError(
        entry.file, f"tensor {entry.name} has shape {list(entry.shape)}, but layer {role.layer} has {experts} experts",
        "restore the weights, or the expert count in config.json and leap.json",
    )  # fmt: skip


def is_shared_scale(entry: TensorEntry) -> bool:
    """Whether a tensor beside fused experts is one number for all of them (a per-tensor scale)."""
    return entry.elements == 1


def _ids(experts: Iterable[int]) -> str:
    found = sorted(experts)
    return f"ids {found[0]}…{found[-1]}"


def check_cut(checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless a cut checkpoint is what its leap.json says: layers, counts, ONE fingerprint."""
    plan = checkpoint.plan
    if plan is None:
        raise CheckpointError(
            checkpoint.folder, f"has no {MANIFEST}: it is not a cut checkpoint", "cut it with leap cut"
        )
    where = checkpoint.folder / MANIFEST
    layers = set(plan.layers) | set(checkpoint.mtp_retained)
    present = set(checkpoint.moe_layers) | set(checkpoint.mtp_layers)
    if layers != present:
        odd = sorted(layers ^ present)
        raise CheckpointError(where, f"and the weights disagree on MoE layers {odd[:8]}", "cut again")
    check_experts(checkpoint)
    _check_config(checkpoint, plan)
    _check_fingerprints(checkpoint, plan)
    check_overlays(checkpoint)


def _check_config(checkpoint: Checkpoint, plan: Plan) -> None:
    where = checkpoint.folder / "config.json"
    top_k = max(layer.top_k for layer in plan.layers.values())
    width = max((layer.width or 0 for layer in plan.layers.values()), default=0)
    for what, said, planned in (
        ("experts", checkpoint.num_experts, max(plan.counts)),
        ("top_k", checkpoint.top_k, top_k),
        ("channels", text_config(checkpoint.config).get(checkpoint.family.width_key) if width else 0, width),
    ):
        if said != planned:
            raise CheckpointError(where, f"says {said} {what}, {MANIFEST} says {planned}", "cut again")
    architecture = (checkpoint.config.get("architectures") or [""])[0]
    ours = architecture == checkpoint.family.leap_architecture
    if not plan.is_uniform and not ours:
        what = f"architecture {architecture} cannot hold a plan whose layers differ"
        raise CheckpointError(where, what, f"set it to {checkpoint.family.leap_architecture}, or cut again")
    if checkpoint.overlays and not ours:
        what = f"architecture {architecture} would be served without {checkpoint.overlays[0].name}"
        raise CheckpointError(where, what, f"set it to {checkpoint.family.leap_architecture}")


def _check_fingerprints(checkpoint: Checkpoint, plan: Plan) -> None:
    parts: dict[Path, object] = {checkpoint.folder / "config.json": checkpoint.config.get(FINGERPRINT_KEY)}
    parts |= {checkpoint.folder / file: found.get(FINGERPRINT_KEY) for file, found in checkpoint.metadata.items()}
    parts |= {path: read_header(path)[1].get(FINGERPRINT_KEY) for path in checkpoint.overlays}
    for path, found in parts.items():
        if found != plan.fingerprint:
            raise CheckpointError(
                path, f"has fingerprint {str(found)[:12]}…, {MANIFEST} has {plan.fingerprint[:12]}…",
                "it belongs to another cut: put the right file back, or cut again",
            )  # fmt: skip
