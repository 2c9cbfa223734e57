"""HC-SMoE: clusters by brute force, weights by frequency, and a cut whose bytes are the sums."""

from __future__ import annotations

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cut_blocks import ITEMS, open_model
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError
from leap_serve.flops import flops_per_token, parameters
from leap_serve.plan import Plan
from leap_training.methods.blocks import LayerResults
from leap_training.methods.hc_smoe import clusters, hc_smoe
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing

E = 8


def test_clusters_are_those_of_average_linkage_by_brute_force() -> None:
    draw = np.random.default_rng(0)
    for _ in range(20):
        points = draw.normal(size=(E, 3))
        found = [[e] for e in range(E)]
        while len(found) > 3:
            pairs = {
                (i, j): np.mean([np.linalg.norm(points[a] - points[b]) for a in found[i] for b in found[j]])
                for i, j in itertools.combinations(range(len(found)), 2)
            }
            i, j = min(pairs, key=pairs.__getitem__)
            found = [*found[:i], sorted(found[i] + found[j]), *found[i + 1 : j], *found[j + 1 :]]
        assert clusters(points, 3) == sorted(found)
    assert clusters(np.zeros((4, 2)), 2) == [[0, 1, 2], [3]], "ties go to the lowest ids"
    assert clusters(points, E) == [[e] for e in range(E)]


def test_distances_take_no_difference_of_all_pairs_at_once() -> None:
    experts, hidden = 64, 1024
    points = np.random.default_rng(0).normal(size=(experts, hidden))
    tracemalloc.start()
    clusters(points, experts // 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * (3 * experts * hidden + experts**2) * 8 < experts * experts * hidden * 8 / 10


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_merged_experts_are_the_sums_by_frequency(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, family: str
) -> None:
    model = open_model(family_checkpoint, family, tmp_path)
    ids, space = model.encode(ITEMS), PruningSpace.of(Routing.of(model.checkpoint), experts=3)
    path = tmp_path / "layers.json"
    plan = hc_smoe(model, ids, space, tmp_path / "x", LayerResults(path, {}))
    assert plan.counts == [3] * 4 and not plan.is_uniform

    # Means and frequencies of a layer, from the block's own experts on all tokens.
    layer, block = 1, model.layers[1].block
    captured = model.capture(ids, tmp_path / "again", [layer])
    x = torch.cat([captured.read(item, layer) for item in range(len(ids))])
    with torch.no_grad():
        one = torch.ones(len(x), 1)
        outputs = [block.experts(x, torch.full((len(x), 1), e), one).double().mean(0).numpy() for e in range(E)]
        chosen = getattr(block, model.family.router)(x)[2]
    counts = torch.bincount(chosen.flatten(), minlength=E)
    merge = plan.layers[layer].merge
    assert merge is not None and merge.applied == "ids"
    groups = [[e for e, _ in row] for row in merge.router]
    assert groups == clusters(np.stack(outputs), 3)
    for row in merge.experts:
        total = sum(int(counts[e]) for e, _ in row)
        assert [w for _, w in row] == pytest.approx([int(counts[e]) / total if total else 1 / len(row) for e, _ in row])

    out = tmp_path / "cut"
    report = cut(model.checkpoint.folder, plan, out)
    assert report.architecture == model.family.leap_architecture
    full, made = load_file(model.checkpoint.folder / "model.safetensors"), load_file(out / "model.safetensors")
    assert {name: value.shape for name, value in made.items() if ".gate.weight" in name or ".router." in name} == {
        name: value.shape for name, value in full.items() if ".gate.weight" in name or ".router." in name
    }, "the router keeps all its rows"
    for slot, row in enumerate(merge.experts):
        if family == "gpt_oss":
            for part in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"):
                name = f"model.layers.1.mlp.experts.{part}"
                expected = sum(w * full[name][e].double() for e, w in row)
                torch.testing.assert_close(made[name][slot].double(), expected, rtol=0, atol=1e-6)
        else:
            for part in ("gate", "up", "down"):
                name = "model.layers.1.mlp.experts.{}." + f"{part}_proj.weight"
                expected = sum(w * full[name.format(e)].double() for e, w in row)
                torch.testing.assert_close(made[name.format(slot)].double(), expected, rtol=0, atol=1e-6)
    proof = verify(out, model.checkpoint.folder)
    assert proof.remade == (4 * 4 if family == "gpt_oss" else 4 * 3 * 3) and proof.sliced == 0
    cut_open = Checkpoint.open(out)
    assert parameters(cut_open) == parameters(model.checkpoint, plan)
    assert flops_per_token(cut_open) == flops_per_token(model.checkpoint), "top_k and router stay"

    # A flipped bit of a sum is seen.
    name, entry = next(
        (n, e) for n, e in cut_open.tensors.items() if ".experts." in n and n.endswith(("weight", "proj"))
    )
    with entry.file.open("r+b") as stream:
        stream.seek(entry.begin)
        byte = stream.read(1)[0]
        stream.seek(entry.begin)
        stream.write(bytes([byte ^ 1]))
    with pytest.raises(CheckpointError, match=f"tensor {name} differs"):
        verify(out, model.checkpoint.folder)
    # What was known is not computed again.
    known = LayerResults(path, {})
    known.put(2, {"clusters": [[0, 1, 2, 3, 4, 5], [6], [7]], "counts": [1.0] * E})
    assert hc_smoe(model, ids, space, tmp_path / "no", LayerResults(path, {})).layers[2].retained == (0, 6, 7)
    assert not (tmp_path / "no").exists()


def test_the_command(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    out = tmp_path / "plan.json"
    command = ["search", str(model.checkpoint.folder), "--method", "hc-smoe", "--budget", "0.25", "--task", "toy-gsm"]
    assert main([*command, "--allocation", "global", "-o", str(out)]) == 2 and not out.exists()
    assert main([*command, "--items", "2", "-o", str(out)]) == 0
    assert Plan.load(out).counts == [2] * 4
