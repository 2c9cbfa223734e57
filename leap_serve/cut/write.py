"""Cut the planned experts out of a checkpoint, on files only: every retained expert is a list of byte ranges.

Experts and router rows lie on dimension 0 in every family (architectures.py), so nothing is computed with, and
what is retained stays bit-identical; but for plans that change the weights themselves (remake.py). τ is never baked into the weights: leap.json
records it and the plugin applies it at run time, once.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from leap_serve import provenance
from leap_serve.checkpoint import FINGERPRINT_KEY, INDEX, MANIFEST, OPTIMIZER, PICKLES, Checkpoint
from leap_serve.cut.config import cut_config, renumbered
from leap_serve.cut.rules import Retained, cut_pieces, fit, open_source, optimizer_pieces
from leap_serve.errors import LeapError, UsageError
from leap_serve.files import new_folder, read_json, write_bytes, write_json
from leap_serve.plan import Plan
from leap_serve.weights.tensorfile import Made, Piece, read_header, write_tensors

MAX_SHARD_BYTES = 5 * 10**9
MAX_OTHER_BYTES = 256 * 2**20
WEIGHT_PATTERNS = ("*.safetensors", "*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.index.json", *PICKLES)
TEMPLATES = "additional_chat_templates"
QUANT_FILE = "hf_quant_config.json"


@dataclass(frozen=True, slots=True)
class CutReport:
    """What a cut wrote: architecture name, experts per MoE layer, files, bytes, seconds, and what was not copied."""

    out: str
    fingerprint: str
    architecture: str
    num_experts: int
    retained: list[int]
    shards: int
    tensors: int
    base_bytes: int
    weights_bytes: int
    optimizer_bytes: int
    left_out: list[str]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Return a JSON object."""
        return asdict(self)


def cut(
    model: Path,
    plan: Plan,
    out: Path,
    *,
    force: bool = False,
    optimizer: Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> CutReport:
    """Write the cut of ``model`` to ``out``; the source is only read.

    Everything is checked before the first byte is written; the result appears under ``out`` whole, or
    not at all. A model that is itself a cut can be cut again: the plan then speaks of its ids, and the
    plan's τ multiplies its τ. MTP layers have no profile: those that the plan does not name retain the
    ids of the last main layer (ours), as leap.json records under checkpoint.mtp_retained.

    Args:
        model: checkpoint folder.
        plan: made for this very model (base.sha256 is its identity).
        out: the new folder; refused if it is not empty, unless ``force``.
        optimizer: safetensors optimizer state, cut alike into optimizer.safetensors.
        max_shard_bytes: largest shard; a larger tensor gets one of its own.
        progress: called with (bytes done, bytes in all).

    Raises:
        PlanError, CheckpointError, UnsupportedError, UsageError: before anything is written.
        LeapError: writing failed; nothing is left under ``out``.
    """
    began = time.monotonic()
    check_destination(model, out)
    source = open_source(model)
    given = plan
    plan, retained = fit(source, given)
    if optimizer and not all(layer.is_masking or layer.skip is not None for layer in plan.layers.values()):
        raise UsageError("--optimizer", "does not go with a plan that changes weights", "leave it out")
    config = cut_config(source, plan, retained)
    shards = _sharded(cut_pieces(source, plan, retained), max_shard_bytes)
    moments = optimizer_pieces(source, optimizer, retained) if optimizer else []
    weights_bytes = sum(piece.nbytes for shard in shards for piece in shard)
    optimizer_bytes = sum(piece.nbytes for piece in moments)
    total = weights_bytes + optimizer_bytes
    check_space(out, total)
    step = _counter(progress, total)
    with whole_folder(out, force, total) as work:
        _write_shards(work, source, plan, shards, step)
        if optimizer:
            metadata = read_header(optimizer)[1] | {FINGERPRINT_KEY: plan.fingerprint}
            write_tensors(work / OPTIMIZER, moments, metadata, step)
        left_out = copy_others(work, source, retained)
        write_json(work / "config.json", config)
        write_json(work / MANIFEST, _manifest(source, plan, retained))
        _write_run(work, source, given, {"optimizer": optimizer and str(optimizer), "max_shard_bytes": max_shard_bytes})
    return CutReport(
        out=str(out), fingerprint=plan.fingerprint, architecture=config["architectures"][0],
        num_experts=source.num_experts, retained=plan.counts, shards=len(shards), tensors=sum(map(len, shards)),
        base_bytes=source.weight_bytes, weights_bytes=weights_bytes, optimizer_bytes=optimizer_bytes,
        left_out=left_out, seconds=round(time.monotonic() - began, 3),
    )  # fmt: skip


@contextlib.contextmanager
def whole_folder(out: Path, force: bool, needed: int) -> Iterator[Path]:
    """Yield a folder that takes the name ``out`` when the block ends without an error; all of it is then durable.

    Where the disk refuses, LeapError says that nothing is left, and that ``needed`` bytes are needed if it was full.
    """
    try:
        with new_folder(out, force) as work:
            yield work
            _sync(*work.rglob("*"), work)
        _sync(out.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = f"make room for {needed / 2**30:.2f} GiB" if full else "check the folder and its rights"
        raise LeapError(
            out, f"could not be written ({error.strerror or error}); nothing is left there", remedy
        ) from None


def check_destination(model: Path, out: Path, flag: str = "--out") -> None:
    """Raise UsageError where writing ``out``, which ``flag`` gave, would touch the model."""
    source, target = model.resolve(), out.resolve()
    if target == source or source in target.parents:
        raise UsageError(out, f"lies in the source {model}, which is never written to", f"choose another {flag}")
    if target in source.parents:
        raise UsageError(out, f"holds the source {model}, which would be replaced", f"choose another {flag}")


def check_space(out: Path, needed: int) -> None:
    """Fail before the copying starts."""
    there = next(path for path in [out.absolute(), *out.absolute().parents] if path.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed:
        what = f"needs {needed / 2**30:.2f} GiB, the disk has {free / 2**30:.2f} GiB free"
        raise LeapError(out, what, "make room, or choose another --out")


def _sharded(pieces: Sequence[Piece | Made], limit: int) -> list[list[Piece | Made]]:
    """Fill shards in order up to the limit."""
    shards: list[list[Piece | Made]] = [[]]
    size = 0
    for piece in pieces:
        if shards[-1] and size + piece.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(piece)
        size += piece.nbytes
    return shards


def _counter(progress: Callable[[int, int], None] | None, total: int) -> Callable[[int], None] | None:
    if progress is None:
        return None
    done = 0

    def step(count: int) -> None:
        nonlocal done
        done += count
        progress(done, total)

    return step


def _write_shards(
    work: Path,
    source: Checkpoint,
    plan: Plan,
    shards: Sequence[Sequence[Piece | Made]],
    step: Callable[[int], None] | None,
) -> None:
    """Write the shards and their index."""
    known = {key: value for found in source.metadata.values() for key, value in found.items()}
    metadata = {"format": "pt", **known, FINGERPRINT_KEY: plan.fingerprint}
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        write_tensors(work / name, shard, metadata, step)
        weight_map |= {piece.name: name for piece in shard}
    total: dict[str, int] = {"total_size": sum(piece.nbytes for shard in shards for piece in shard)}
    before = _index_metadata(source).get("total_parameters")
    if type(before) is int:
        after = sum(piece.elements for shard in shards for piece in shard)
        total["total_parameters"] = before - sum(entry.elements for entry in source.tensors.values()) + after
    # Even one shard gets an index: vLLM reads every *.safetensors of a folder that has none, and others lie beside.
    write_json(work / INDEX, {"metadata": total, "weight_map": dict(sorted(weight_map.items()))})


def _index_metadata(source: Checkpoint) -> dict[str, Any]:
    path = source.folder / INDEX
    found = read_json(path).get("metadata") if path.exists() else None
    return found if isinstance(found, dict) else {}


def _manifest(source: Checkpoint, plan: Plan, retained: Retained) -> dict[str, Any]:
    """Return leap.json: the plan, and what this cut adds to it."""
    checkpoint: dict[str, Any] = {
        "architecture": (source.config.get("architectures") or [source.family.architecture])[0],
        "mtp_retained": {str(layer): list(ids) for layer, ids in retained.items() if layer not in plan.layers},
        "made_by": provenance.made_by(),
    }
    if source.manifest is not None:
        # The ids of a second cut are those of the first: this chain leads back to the full model's.
        checkpoint["origin"] = {key: value for key, value in source.manifest.items() if key != "scores"}
    return plan.to_json() | {"checkpoint": checkpoint}


def copy_others(work: Path, source: Checkpoint, retained: Retained) -> list[str]:
    """Copy tokenizer, templates, generation_config and the like; return the names of what was left out."""
    written = {"config.json", MANIFEST, INDEX}
    left_out = []
    for path in sorted([*source.folder.iterdir(), *(source.folder / TEMPLATES).glob("*")]):
        name = path.relative_to(source.folder).as_posix()
        if name in written or name == TEMPLATES or path.name in source.metadata:
            continue
        weights = any(path.match(pattern) for pattern in WEIGHT_PATTERNS)
        inside = _is_own(path, source.folder)
        if weights or path.name.startswith(".") or not inside or path.stat().st_size > MAX_OTHER_BYTES:
            left_out.append(name)
        elif name == QUANT_FILE:
            write_json(work / name, renumbered(read_json(path), source, retained))
        else:
            (work / name).parent.mkdir(exist_ok=True)
            shutil.copyfile(path, work / name)
    return left_out


def _is_own(path: Path, folder: Path) -> bool:
    """Whether a path is a regular file of this checkpoint: no link out of it, except into the Hub cache's own blobs."""
    target, home = path.resolve(), folder.resolve()
    roots = [home, home.parents[1] / "blobs"] if home.parent.name == "snapshots" else [home]
    return target.is_file() and any(root in target.parents for root in roots)


def _write_run(work: Path, source: Checkpoint, plan: Plan, settings: dict[str, Any]) -> None:
    """Write run/: the plan, and what re-runs this cut."""
    run = {
        "verb": "cut", "command": provenance.command(), "model": asdict(source.identity()),
        "model_folder": str(source.folder), "plan": "plan.json", "settings": settings,
        "versions": provenance.versions(), "made_by": provenance.made_by(),
    }  # fmt: skip
    (work / "run").mkdir()
    plan.save(work / "run" / "plan.json")
    write_bytes(work / "run" / "run.yaml", yaml.safe_dump(run, sort_keys=False, allow_unicode=True).encode())


def _sync(*paths: Path) -> None:
    """Make files and folders durable before they take their final name."""
    for path in paths:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
