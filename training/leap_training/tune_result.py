"""What a tuning run leaves: whether the tuned router stays, the overlays beside the cut, and tune.json."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from leap_serve.adapter import RouterHead, write_overlays
from leap_serve.files import write_json
from leap_serve.provenance import made_by, versions
from leap_training.adapters import save
from leap_training.tune import Tuner
from leap_training.whole import write_whole

REPORT = "tune.json"
SIGNIFICANT = 0.05
FLIPS = 10_000

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
    """Write a whole checkpoint with the tuned experts and routers in their places: see write_whole, which can refuse."""
    tuner.agent.close()
    with torch.no_grad():
        for head in tuner.agent.heads:
            head.router.weight.copy_(head.weight)
            if head.bias is not None:
                head.router.bias.copy_(head.bias)
    write_whole(tuner.base, source, out, (REPORT, report), force)
