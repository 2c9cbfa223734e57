"""A tuned cut as a plain checkpoint: router head and adapter merged into the weights, on files.

What ``leap export`` writes is served like any cut: with a uniform plan by stock vLLM and stock transformers,
without plugin and without PEFT. The sum is computed in fp32 and rounded to the checkpoint's dtype (weights/merge.py),
exactly as the plugin merges when it loads the tuned cut. A cut without tuned parts is written as it is.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from leap_serve import provenance
from leap_serve.adapter import describe_overlays, plain_name
from leap_serve.checkpoint import INDEX, MANIFEST, Checkpoint, check_cut
from leap_serve.cut.write import check_destination, check_space, copy_others, whole_folder
from leap_serve.files import write_bytes, write_json
from leap_serve.weights.overlays import ADAPTER_FOLDER, ROUTER_HEAD, data_sha256

if TYPE_CHECKING:
    from leap_serve.weights.merge import Merge
    from leap_serve.weights.tensorfile import TensorEntry

REPLACED = (ROUTER_HEAD, ADAPTER_FOLDER, "run")


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote: where, its architecture, what was merged into how many tensors, bytes, seconds.

    ``plugin`` says whether serving it still needs the plugin, as a plan whose layers differ does.
    """

    out: str
    fingerprint: str
    architecture: str
    plugin: bool
    merged: tuple[str, ...]
    tensors: int
    changed: int
    weights_bytes: int
    left_out: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def export(
    folder: Path, out: Path, *, force: bool = False, progress: Callable[[int, int], None] | None = None
) -> ExportReport:
    """Write a tuned cut to ``out`` with its router head and adapter merged; the source is only read.

    The shards are copied as bytes; then every tensor that tuning changes is computed and takes its place, of the
    same size, one at a time. The result appears under ``out`` whole, or not at all. Its leap.json keeps plan and
    fingerprint and names what was merged, so that the same parts are refused if laid beside it once more.

    Args:
        folder: a cut with a router head, an adapter, both, or neither, as tuning leaves it where it gained nothing.
        out: the new folder; refused if it is not empty, unless ``force``.
        progress: called with (changed tensors done, changed tensors in all).

    Raises:
        CheckpointError, UnsupportedError, UsageError: before anything is written.
        LeapError: writing failed; nothing is left under ``out``.
    """
    from leap_serve.weights.merge import Merge

    began = time.monotonic()
    check_destination(folder, out)
    source = Checkpoint.open(folder)
    check_cut(source)
    assert source.plan is not None  # check_cut saw it
    check_space(out, source.weight_bytes)
    merge, architecture = Merge(source), plain_name(source)
    with whole_folder(out, force, source.weight_bytes) as work:
        _write_weights(work, source, merge, progress)
        left_out = copy_others(work, source, {layer: range(source.experts_in(layer)) for layer in _layers(source)})
        write_json(work / "config.json", {**copy.deepcopy(dict(source.config)), "architectures": [architecture]})
        write_json(work / MANIFEST, _manifest(source))
        _write_run(work, source)
    merged = tuple(path.relative_to(folder).as_posix() for path in source.overlays)
    return ExportReport(
        out=str(out), fingerprint=source.plan.fingerprint, architecture=architecture,
        plugin=architecture == source.family.leap_architecture, merged=merged, tensors=len(source.tensors),
        changed=len(merge.names), weights_bytes=source.weight_bytes,
        left_out=[name for name in left_out if name not in REPLACED], seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip


def _layers(source: Checkpoint) -> list[int]:
    return source.moe_layers + source.mtp_layers


def _write_weights(work: Path, source: Checkpoint, merge: Merge, progress: Callable[[int, int], None] | None) -> None:
    """Copy shards and index, then put the merged tensors where the old ones are."""
    for file in source.metadata:
        shutil.copyfile(source.folder / file, work / file)
    if (source.folder / INDEX).exists():
        shutil.copyfile(source.folder / INDEX, work / INDEX)
    names = sorted(merge.names)
    for done, name in enumerate(names, 1):
        entry = source.tensors[name]
        with (work / entry.file.name).open("r+b") as stream:
            stream.seek(entry.begin)
            stream.write(_merged_bytes(merge, entry))
        if progress is not None:
            progress(done, len(names))


def _merged_bytes(merge: Merge, entry: TensorEntry) -> bytes:
    import torch
    from safetensors import safe_open

    with safe_open(entry.file, "pt") as file:
        merged = merge.merged(entry.name, file.get_tensor(entry.name))
    return merged.contiguous().view(torch.uint8).numpy().tobytes()


def _manifest(source: Checkpoint) -> dict[str, Any]:
    """Return leap.json: the cut's own, and what was merged, if anything: without it the weights are still the base's."""
    manifest = copy.deepcopy(dict(source.manifest or {}))
    if not source.overlays:
        return manifest
    manifest.setdefault("checkpoint", {})["exported"] = {
        "merged": {path.relative_to(source.folder).as_posix(): data_sha256(path) for path in source.overlays},
        "tuned": describe_overlays(source),
        "made_by": provenance.made_by(),
    }
    return manifest


def _write_run(work: Path, source: Checkpoint) -> None:
    """Write run/run.yaml, which re-runs this export."""
    run = {
        "verb": "export", "command": provenance.command(), "checkpoint_folder": str(source.folder),
        "versions": provenance.versions(), "made_by": provenance.made_by(),
    }  # fmt: skip
    write_bytes(work / "run" / "run.yaml", yaml.safe_dump(run, sort_keys=False, allow_unicode=True).encode())
