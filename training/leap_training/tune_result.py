"""What a tuning run leaves: whether the tuned router stays, the overlays beside the cut, and tune.json."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import safe_open

from leap_serve.adapter import RouterHead, plain_name, write_overlays
from leap_serve.checkpoint import INDEX, MANIFEST, Checkpoint, check_cut
from leap_serve.cut.write import MAX_SHARD_BYTES, copy_others, whole_folder
from leap_serve.errors import LeapError
from leap_serve.files import write_json
from leap_serve.provenance import made_by, versions
from leap_training.adapters import save
from leap_training.tune import Tuner

REPORT = "tune.json"
SIGNIFICANT = 0.05
FLIPS = 10_000
DTYPES: Mapping[str, torch.dtype] = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}

Losses = npt.NDArray[np.float64]


def sign_flip_test(differences: Losses, seed: int = 0) -> float:
    """One-sided p-value that the sum of paired differences is above 0, by flipping their signs at random.

    Under «no difference» each pair is as likely either way round; p counts the flips that reach the observed sum,
    the observation itself among them (Phipson and Smyth 2010), so it is never 0.
    """
    random = np.random.default_rng(seed)
    reached, done = 1, 0
    while done < FLIPS:
        count = min(1000, FLIPS - done)
        signs = random.choice((-1.0, 1.0), size=(count, len(differences)))
        reached += int((signs @ differences >= differences.sum() - 1e-12).sum())
        done += count
    return reached / (FLIPS + 1)


def signed_ranks(differences: Losses) -> Losses:
    """The rank of each difference's size among all of them, ties their mean rank, with its sign; 0 where there is none."""
    sizes, places, counts = np.unique(np.abs(differences), return_inverse=True, return_counts=True)
    ends = np.cumsum(counts * (sizes > 0))
    return np.sign(differences) * (ends - (counts - 1) / 2)[places]


def keep_router(tuner: Tuner) -> dict[str, Any]:
    """Compare the tuned with the sliced routers on the validation part kept for this, and reset them if they lose.

    The adapters are the same in both; the tuned routers stay where their loss per answer token is lower in the mean, and a
    signed-rank test over items (Wilcoxon 1945) says so at 5 %. Ranks, because losses have a long tail: of 256 items
    one that got worse hid, from a test of the mean, 194 that got better (dev/LOG.md). Adapters that learned beside a router
    that goes are measured without it ("shipped_loss", on the items of the curve) and go as well where the cut is better.
    """
    items = tuner.data.router
    tuned, _ = tuner.item_losses(items)
    with tuner.agent.sliced():
        sliced, _ = tuner.item_losses(items)
    gain = sliced - tuned
    p = sign_flip_test(signed_ranks(gain), tuner.config.seed)
    kept = bool(gain.mean() > 0 and p < SIGNIFICANT)
    before, shipped = tuner.progress.before, None
    if not kept:
        tuner.agent.reset()
        shipped = float(tuner.item_losses(tuner.data.stopping)[0].mean())
    adapters = shipped is None or before is None or shipped <= before
    if not adapters:
        with torch.no_grad():
            for name, parameter in tuner.experts.items():
                if ".lora_B" in name:
                    parameter.zero_()
    return {
        "kept": kept, "shipped_loss": shipped, "adapters_kept": adapters, "items": len(items),
        "tuned_loss": float(tuned.mean()), "sliced_loss": float(sliced.mean()), "gain": float(gain.mean()), "p_value": p,
    }  # fmt: skip


def report_of(tuner: Tuner, router: Mapping[str, Any] | None, **more: Any) -> dict[str, Any]:
    """The content of tune.json: settings, labels, the curve, the router's test, and where it came from."""
    progress = tuner.progress
    return {
        "config": asdict(tuner.config), "labels": len(tuner.pool.labelled), "pool": len(tuner.pool),
        "data_sha256": tuner.data.sha256, "validation_loss_before": progress.before, "curve": progress.curve,
        "best_round": progress.best + 1, "stopped_early": progress.stopped, "router": router,
        "fingerprint": tuner.checkpoint.plan.fingerprint if tuner.checkpoint.plan else None,
        "processes": tuner.accelerator.num_processes,
        "made_by": made_by(**more), "versions": versions(),
    }  # fmt: skip


def write_tuned(tuner: Tuner, folder: Path, report: Mapping[str, Any]) -> None:
    """Put tune.json, the adapters and, if they stay, the tuned routers beside the cut in ``folder``.

    In this order: a kill in between leaves a cut without tuned parts, which the same command tunes again from its state.
    """
    moved = bool(report["router"] and report["router"]["kept"])
    head = {
        layer: RouterHead(rows["weight"].to(tuner.base.dtype), rows["bias"].to(tuner.base.dtype) if "bias" in rows else None)
        for layer, rows in tuner.agent.router_head().items()
    }  # fmt: skip
    write_json(folder / REPORT, dict(report))
    with tempfile.TemporaryDirectory() as scratch:
        adapter = Path(scratch) / "adapter" if tuner.config.experts == "lora" else None
        if adapter is not None:
            save(tuner.model, adapter)
        write_overlays(folder, router_head=head if moved else None, adapter=adapter, made_by=report["made_by"])


def write_plain(tuner: Tuner, source: Path, out: Path, report: Mapping[str, Any], force: bool) -> None:
    """Write a whole checkpoint with the tuned experts and routers in their places: a cut like ``source``.

    transformers writes what it holds, in fp32; each tensor then takes the place of the cut's own in a copy of its shards,
    in that one's dtype. So names, fingerprints and config stay the cut's, and so does what transformers does not read
    (MTP layers, a vision tower). The result appears under ``out`` whole and checked, or not at all.

    Raises:
        CheckpointError, LeapError: the cut is damaged, or transformers' tensors are not the cut's; nothing is left.
    """
    cut = Checkpoint.open(source)
    check_cut(cut)
    tuner.agent.close()
    with torch.no_grad():
        for head in tuner.agent.heads:
            head.router.weight.copy_(head.weight)
            if head.bias is not None:
                head.router.bias.copy_(head.bias)
    held = sum(parameter.nbytes for parameter in tuner.base.parameters())
    with whole_folder(out, force, cut.weight_bytes + held) as work:
        for file in cut.metadata:
            shutil.copyfile(source / file, work / file)
        if (source / INDEX).exists():
            shutil.copyfile(source / INDEX, work / INDEX)
        with tempfile.TemporaryDirectory(dir=work) as scratch:
            tuner.base.save_pretrained(scratch, max_shard_size=MAX_SHARD_BYTES)
            _fill(work, cut, sorted(Path(scratch).glob("*.safetensors")))
        copy_others(work, cut, {layer: range(cut.experts_in(layer)) for layer in cut.moe_layers + cut.mtp_layers})
        write_json(work / "config.json", {**cut.config, "architectures": [plain_name(cut)]})
        shutil.copyfile(source / MANIFEST, work / MANIFEST)
        write_json(work / REPORT, dict(report))
        check_cut(Checkpoint.open(work))


def _fill(work: Path, cut: Checkpoint, saved: Sequence[Path]) -> None:
    """Put the tensors of the files ``saved`` into the shards in ``work``, which lie there as they are in the cut."""
    left = {name for name in cut.tensors if cut.role(name).kind != "other" and cut.role(name).layer in cut.moe_layers}
    for path in saved:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118
                # A model of several modalities holds the text model, which alone is tuned, below this name.
                own = name if name in cut.tensors else f"language_model.{name}"
                entry, tensor = cut.tensors.get(own), file.get_tensor(name)
                if entry is None or entry.shape != tuple(tensor.shape) or entry.dtype not in DTYPES:
                    there = f"{entry.dtype} {list(entry.shape)}" if entry else "nothing of this name"
                    what = f"has {there} where transformers holds {name} {list(tensor.shape)}"
                    raise LeapError(cut.folder, what, "tune it without --baseline")
                with (work / entry.file.name).open("r+b") as shard:
                    shard.seek(entry.begin)
                    shard.write(tensor.to(DTYPES[entry.dtype]).contiguous().view(torch.uint8).numpy().tobytes())
                left.discard(own)
    if left:
        what = f"holds {min(left)} and {len(left) - 1} more, which transformers does not"
        raise LeapError(cut.folder, what, "tune it without --baseline")
