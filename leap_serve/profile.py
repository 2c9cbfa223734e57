"""The profile: what each routed expert did on a data set, one pass for all criteria (methods: §0).

On disk: ``profile.json`` (what it is of) and ``profile.safetensors`` (float64 tensors ``layers.{l}.{statistic}``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from leap_serve.architectures import text_config
from leap_serve.encoding import items_sha256
from leap_serve.errors import CheckpointError, LeapError, UnsupportedError
from leap_serve.files import new_folder, read_json, sha256_of, write_json
from leap_serve.plan import BaseModel
from leap_serve.provenance import made_by

if TYPE_CHECKING:
    from leap_serve.checkpoint import Checkpoint
    from leap_serve.tasks.base import Item

FORMAT_VERSIONS = (1, 2)
"""Version 2 is written where there are channel sums, version 1 otherwise."""
Array = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, eq=False)
class LayerProfile:
    """Statistics of one MoE layer over all tokens t; float64, [E] unless said otherwise.

    S(t): experts chosen for t; g: router weight really applied; f: expert output without it; c: the
    contribution, g·f(x) or, where the weight multiplies the input (Llama-4), f(g·x).

    Args:
        n: Σ 1[e ∈ S(t)], how often the expert was chosen.
        m: Σ g, gate mass.
        a: Σ ‖f‖₂ (EAN).
        w: Σ ‖c‖₂ (weighted EAN; REAP is w/n).
        w2: Σ ‖c‖₂².
        max: max |f| over tokens and channels.
        coact: [E, E], how often two experts were chosen together; the diagonal is n.
        easy: Σ ‖c‖·max(1 − cos(h, h + r), 0) (EASY-EP), h the residual stream before the block, r the
            routed experts' output; None where the engine could not see h.
        x2: [E, H], Σ (g·x)² over the tokens that chose the expert; None unless channel sums were asked for.
        mid2: [E, I], the same of the intermediate act(W_gate x)·(W_up x), the input of the down projection.
    """

    n: Array
    m: Array
    a: Array
    w: Array
    w2: Array
    max: Array
    coact: Array
    easy: Array | None = None
    x2: Array | None = None
    mid2: Array | None = None

    def arrays(self) -> dict[str, Array]:
        """Return the statistics that are present, by name."""
        named = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in named.items() if value is not None}


CHANNEL_SUMS = ("x2", "mid2")
STATISTICS = tuple(f.name for f in fields(LayerProfile) if f.name not in CHANNEL_SUMS)
"""Statistics that every profile has, but for ``easy`` where the residual stream was out of sight."""


@dataclass(frozen=True, slots=True, eq=False)
class Profile:
    """Statistics of every MoE layer of a base model on one data set.

    Args:
        base: the model.
        num_experts: routed experts per MoE layer (E).
        top_k: MoE layer → experts per token.
        groups, chosen_groups: of group-limited routing, how many and how many a token chooses from; 1 without.
        layers: MoE layer index → LayerProfile, in increasing order.
        tokens: tokens seen (prompt and answer).
        items: items seen.
        data_sha256: identifies the data (:func:`leap_serve.encoding.items_sha256`).
        engine, dtype: what computed it.
        made_by: provenance.
    """

    base: BaseModel
    num_experts: int
    top_k: Mapping[int, int]
    groups: int
    chosen_groups: int
    layers: Mapping[int, LayerProfile]
    tokens: int
    items: int
    data_sha256: str
    engine: str
    dtype: str
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def check(self, where: object) -> None:
        """Raise CheckpointError on the first statistic that cannot be right."""
        again = "make it again with leap profile"
        if not self.layers or list(self.layers) != sorted(self.layers) or set(self.top_k) != set(self.layers):
            raise CheckpointError(where, f"has layers {list(self.layers)}, top_k for {list(self.top_k)}", again)
        for index, layer in self.layers.items():
            for name, value in layer.arrays().items():
                wide = value.shape[-1] if name in CHANNEL_SUMS else self.num_experts
                shape = (self.num_experts, wide) if name in (*CHANNEL_SUMS, "coact") else (wide,)
                if value.shape != shape or value.dtype != np.float64:
                    raise CheckpointError(
                        where, f"layers.{index}.{name} is {value.dtype} {value.shape}, not float64 {shape}", again
                    )
                if not np.isfinite(value).all() or (value < 0).any():
                    raise CheckpointError(where, f"layers.{index}.{name} holds negative or non-finite values", again)
            if not math.isclose(float(layer.n.sum()), self.tokens * self.top_k[index], rel_tol=1e-9):
                raise CheckpointError(
                    where,
                    f"layer {index} counts {layer.n.sum():.0f} choices for {self.tokens} tokens × {self.top_k[index]}",
                    again,
                )

    def save(self, out: Path, force: bool = False) -> None:
        """Write the folder atomically; a non-empty one is refused without ``force``."""
        with new_folder(out, force) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the two files into an existing folder; :meth:`save` is the atomic way."""
        from safetensors.numpy import save_file

        self.check(folder)
        tensors = {f"layers.{i}.{k}": v for i, layer in self.layers.items() for k, v in layer.arrays().items()}
        save_file(tensors, folder / "profile.safetensors")
        write_json(folder / "profile.json", self._header(sha256_of(folder / "profile.safetensors")))

    def _header(self, tensors_sha256: str) -> dict[str, Any]:
        wide = any(layer.x2 is not None or layer.mid2 is not None for layer in self.layers.values())
        return {
            "format_version": FORMAT_VERSIONS[wide],
            "base_model": {"id": self.base.id, "revision": self.base.revision, "sha256": self.base.sha256},
            "num_experts": self.num_experts,
            "top_k": {str(index): k for index, k in self.top_k.items()},
            "groups": self.groups,
            "chosen_groups": self.chosen_groups,
            "tokens": self.tokens,
            "items": self.items,
            "data_sha256": self.data_sha256,
            "engine": self.engine,
            "dtype": self.dtype,
            "tensors_sha256": tensors_sha256,
            "made_by": dict(self.made_by),
        }

    @classmethod
    def load(cls, folder: Path) -> Profile:
        """Read and check a profile folder; CheckpointError where it is damaged or its two files do not match."""
        header, tensors = folder / "profile.json", folder / "profile.safetensors"
        value = read_json(header)
        if not isinstance(value, dict) or value.get("format_version") not in FORMAT_VERSIONS:
            stated = value.get("format_version") if isinstance(value, dict) else type(value).__name__
            raise CheckpointError(
                header, f"format_version is {stated!r}, this leap-serve reads {' and '.join(map(str, FORMAT_VERSIONS))}",
                "update leap-serve, or make the profile again",
            )  # fmt: skip
        if not tensors.is_file():
            raise CheckpointError(tensors, "the file does not exist", "make the profile again")
        if sha256_of(tensors) != value.get("tensors_sha256"):
            raise CheckpointError(tensors, f"is not the file that {header.name} describes", "make the profile again")
        try:
            base = value["base_model"]
            profile = cls(
                base=BaseModel(str(base["id"]), str(base["sha256"]), base.get("revision")),
                num_experts=int(value["num_experts"]),
                top_k={int(i): int(k) for i, k in sorted(value["top_k"].items(), key=lambda pair: int(pair[0]))},
                groups=int(value["groups"]),
                chosen_groups=int(value["chosen_groups"]),
                layers=_layers(tensors),
                tokens=int(value["tokens"]),
                items=int(value["items"]),
                data_sha256=str(value["data_sha256"]),
                engine=str(value["engine"]),
                dtype=str(value["dtype"]),
                made_by=value.get("made_by", {}),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(header, f"is incomplete or ill-formed ({error!r})", "make it again") from None
        profile.check(tensors)
        return profile


def _layers(path: Path) -> dict[int, LayerProfile]:
    """Read ``layers.{l}.{statistic}`` tensors."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    found: dict[int, dict[str, Array]] = {}
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(path, f"not a readable safetensors file ({error})", "make the profile again") from None
    for name, value in tensors.items():
        _, index, statistic = name.split(".")
        found.setdefault(int(index), {})[statistic] = value
    return {index: LayerProfile(**found[index]) for index in sorted(found)}


def groups_of(checkpoint: Checkpoint) -> tuple[int, int]:
    """Return (groups, groups a token chooses from) of group-limited routing; (1, 1) where the router knows none."""
    keys, config = checkpoint.family.group_keys, text_config(checkpoint.config)
    return (int(config.get(keys[0]) or 1), int(config.get(keys[1]) or 1)) if keys else (1, 1)


def check_request(checkpoint: Checkpoint, items: Sequence[Item], channels: bool = False) -> None:
    """Raise LeapError, before any work, where a profile cannot be made."""
    if channels:
        from leap_serve.channel_sums import check_channels

        check_channels(checkpoint)
    if checkpoint.plan is not None and len(set(checkpoint.plan.counts)) > 1:
        raise UnsupportedError(
            checkpoint.folder, "its layers hold different numbers of experts", "profile the full model"
        )
    for layer in checkpoint.plan.layers.values() if checkpoint.plan else ():
        if layer.skip is not None:
            # A skipped choice comes to the experts as the token's best one at weight 0, and would count as a hit of it.
            raise UnsupportedError(checkpoint.folder, "skips experts by the token", "profile the full model")
        if layer.maps_router:
            # Two choices of a token may be one merged expert, and no second cut could be made of it.
            raise UnsupportedError(checkpoint.folder, "maps its router to merged experts", "profile the full model")
    if not items:
        raise LeapError("profile", "no items were given", "give at least one")


def assemble(
    layers: Mapping[int, LayerProfile], checkpoint: Checkpoint, items: Sequence[Item], engine: str, dtype: str
) -> Profile:
    """Make the Profile of a checkpoint from its layers' statistics; raises LeapError where they are inconsistent."""
    plan = checkpoint.plan
    if plan is not None and len(set(plan.counts)) > 1:
        raise UnsupportedError(
            checkpoint.folder, "its layers hold different numbers of experts", "profile the full model"
        )
    top_k = {index: plan.layers[index].top_k if plan else checkpoint.top_k for index in layers}
    groups, chosen = groups_of(checkpoint)
    first = next(iter(layers))
    tokens = round(float(layers[first].n.sum()) / top_k[first])
    profile = Profile(
        base=checkpoint.identity(), num_experts=checkpoint.num_experts, top_k=top_k, groups=groups, chosen_groups=chosen,
        layers=dict(layers), tokens=tokens, items=len(items), data_sha256=items_sha256(items), engine=engine,
        dtype=dtype, made_by=made_by(),
    )  # fmt: skip
    profile.check(engine)
    return profile


def from_worker(
    collected: Mapping[int, Mapping[str, bytes]],
    checkpoint: Checkpoint,
    items: Sequence[Item],
    engine: str,
    dtype: str,
) -> Profile:
    """Make a Profile of what a vLLM worker returned: {layer: {statistic: float64 bytes}}."""
    layers = {}
    for index, statistics in collected.items():
        arrays = {name: np.frombuffer(content, dtype="<f8").astype(np.float64) for name, content in statistics.items()}
        num_experts = arrays["n"].size
        for name in {"coact", *CHANNEL_SUMS} & set(arrays):
            arrays[name] = arrays[name].reshape(num_experts, -1)
        layers[index] = LayerProfile(**arrays)
    return assemble(layers, checkpoint, items, engine, dtype)
