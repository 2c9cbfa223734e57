"""Writing, taking away and describing what tuning lays beside a cut: its router head and its adapter."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.checkpoint import FINGERPRINT_KEY, Checkpoint, check_cut
from leap_serve.errors import CheckpointError, LeapError
from leap_serve.files import new_folder, read_json, write_bytes, write_json
from leap_serve.weights.overlays import ADAPTER, ADAPTER_CONFIG, ADAPTER_FOLDER, ROUTER_HEAD, read_factors, router_rows
from leap_serve.weights.tensorfile import Piece, read_header, write_tensors

if TYPE_CHECKING:
    import torch

MADE_BY_KEY = "leap_made_by"


@dataclass(frozen=True, slots=True)
class RouterHead:
    """The tuned router of one MoE layer: weight [|I|, H], bias [|I|] where the family has one; any float dtype."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


def write_overlays(
    folder: Path, *, router_head: Mapping[int, RouterHead] | None, adapter: Path | None, made_by: Mapping[str, Any]
) -> None:
    """Make these the tuned parts of a cut; whichever is None is not there afterwards.

    The weights are not copied: a sibling folder of hard links gets the new parts, is checked as the loader
    would check it, and then takes the cut's name in one step. A kill leaves the old parts or the new ones,
    never a mix, and bad parts leave the cut as it was. While there are parts, config.json bears our
    architecture, so that a stock engine refuses instead of serving the cut without them.

    Args:
        folder: a cut checkpoint; nobody else may write into it meanwhile.
        router_head: MoE layer → its tuned router; layers that are left out keep theirs.
        adapter: a folder as PEFT's save_pretrained writes it, of an adapter on the experts' parameters; it is
            not one inside ``folder``'s own adapter/, which is replaced.
        made_by: provenance (leap_serve.provenance.made_by), kept in the metadata of both parts.

    Raises:
        CheckpointError, UnsupportedError: the cut is not sound, or the parts do not fit it.
        LeapError: writing failed.
    """
    folder = folder.resolve()
    checkpoint = Checkpoint.open(folder)
    check_cut(checkpoint)
    metadata = {
        "format": "pt", FINGERPRINT_KEY: str(checkpoint.config[FINGERPRINT_KEY]), MADE_BY_KEY: json.dumps(dict(made_by))
    }  # fmt: skip
    here = _is_inside(Path.cwd(), folder)
    try:
        with new_folder(folder, force=True) as work:
            _link_all(folder, work)
            if router_head:
                _write_head(work / ROUTER_HEAD, router_head, metadata)
            if adapter is not None:
                _copy_adapter(adapter, work, metadata)
            architecture = checkpoint.family.leap_architecture if router_head or adapter else plain_name(checkpoint)
            write_json(work / "config.json", {**checkpoint.config, "architectures": [architecture]})
            _check(work, folder)
    except OSError as error:
        what = f"could not be written ({error.strerror or error}); the checkpoint is as it was"
        raise LeapError(folder, what, "check the disk, the folder and its rights") from None
    if here is not None:
        os.chdir(folder / here)  # the process stood in the folder that is gone


def plain_name(checkpoint: Checkpoint) -> str:
    """Return the architecture name of a cut without overlays: the stock one if a stock engine can hold its plan."""
    family, plan = checkpoint.family, checkpoint.plan
    if plan is not None and not plan.is_uniform:
        return family.leap_architecture
    before = ((checkpoint.manifest or {}).get("checkpoint") or {}).get("architecture")
    return str(before) if before and before != family.leap_architecture else family.architecture


def describe_overlays(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what the overlays of a sound cut are: layers, rank, alpha, bytes and provenance; {} without any."""
    found: dict[str, Any] = {}
    rows = router_rows(checkpoint)
    if rows:
        layers = sorted({int(entry.name.split(".")[1]) for entry in rows.values()})
        found["router_head"] = {"layers": layers, **_file_facts(checkpoint.folder / ROUTER_HEAD)}
    factors = read_factors(checkpoint)
    if factors:
        config = read_json(checkpoint.folder / ADAPTER_CONFIG)
        found["adapter"] = {
            "layers": sorted({layer for layer, _ in factors}),
            "parameters": sorted({parameter for _, parameter in factors}),
            "rank": config["r"], "alpha": config["lora_alpha"], **_file_facts(checkpoint.folder / ADAPTER),
        }  # fmt: skip
    return found


def _file_facts(path: Path) -> dict[str, Any]:
    metadata = read_header(path)[1]
    try:
        made_by = json.loads(metadata.get(MADE_BY_KEY, "null"))
    except ValueError:
        made_by = None
    return {"bytes": path.stat().st_size, "made_by": made_by}


def _link_all(folder: Path, work: Path) -> None:
    """Fill ``work`` with hard links to all that is no overlay."""

    def overlays(at: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(at) == folder and name in (ROUTER_HEAD, ADAPTER_FOLDER)]

    shutil.copytree(folder, work, symlinks=True, copy_function=_link, ignore=overlays, dirs_exist_ok=True)


def _link(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def _write_head(path: Path, head: Mapping[int, RouterHead], metadata: Mapping[str, str]) -> None:
    from safetensors.torch import save

    tensors = {}
    for layer, rows in sorted(head.items()):
        tensors[f"layers.{layer}.weight"] = rows.weight.detach().cpu().contiguous()
        if rows.bias is not None:
            tensors[f"layers.{layer}.bias"] = rows.bias.detach().cpu().contiguous()
    write_bytes(path, save(tensors, dict(metadata)))


def _copy_adapter(adapter: Path, work: Path, metadata: Mapping[str, str]) -> None:
    """Copy PEFT's two files, the fingerprint added to the metadata."""
    config, weights = adapter / Path(ADAPTER_CONFIG).name, adapter / Path(ADAPTER).name
    if not config.is_file() or not weights.is_file():
        what = f"lacks {(weights if config.is_file() else config).name}"
        raise CheckpointError(adapter, what, "give a folder that PEFT's save_pretrained wrote")
    pieces = [Piece.whole(entry) for entry in read_header(weights)[0].values()]
    (work / ADAPTER_FOLDER).mkdir()
    write_json(work / ADAPTER_CONFIG, read_json(config))
    write_tensors(work / ADAPTER, pieces, metadata)


def _check(work: Path, folder: Path) -> None:
    """Check what is to take the folder's name; errors name the files as the user will know them."""
    try:
        check_cut(Checkpoint.open(work))
    except LeapError as error:
        where = error.where.replace(str(work), str(folder))
        raise type(error)(where, error.what, error.remedy) from None


def _is_inside(path: Path, folder: Path) -> Path | None:
    return path.relative_to(folder) if path.is_relative_to(folder) else None
