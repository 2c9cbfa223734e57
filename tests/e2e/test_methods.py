"""Methods from search to serving: each plan is cut, verified, loaded by real vLLM and compared with transformers."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cut_blocks import ITEMS
from extras_reference import clustered_logprobs, extras_logprobs
from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.verify import verify
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.plan import LayerPlan, Merge, Plan
from parity import CONTROL, TOLERANCE, largest_difference, prompts
from reference import reference_logprobs
from serving import Job, serve
from tiny_tokenizer import talking_copy

pytestmark = pytest.mark.e2e
ASKED = prompts(160)


def searched(model: Path, home: Path) -> dict[str, Plan]:
    """What a user would type, on a model small enough for all of it."""
    engine = TorchEngine(model, dtype="float32", device="cpu")
    engine.profile(ITEMS, channels=True).save(home / "prof")
    engine.close()
    items = ["--task", "toy-gsm", "--items", "2"]
    commands = {
        "lexi": [str(model), "--method", "lexi", "--budget", "0.6", "--draws", "2"],
        "naee": [str(model), "--method", "naee", "--budget", "0.625", *items],
        "naee skipping": [str(model), "--method", "naee", "--budget", "1", "--skip", *items],
        "intra": [str(home / "prof"), "--model", str(model), "--method", "intra", "--budget", "0.75"],
        "hc-smoe": [str(model), "--method", "hc-smoe", "--budget", "0.5", *items],
    }
    plans = {}
    for name, command in commands.items():
        assert main(["search", *command, "-o", str(home / f"{name}.json")]) == 0, name
        plans[name] = Plan.load(home / f"{name}.json")
    return plans


def invented(model: Path, seed: int) -> Plan:
    """Merged experts under a router map, skipping and τ at once; every layer another."""
    checkpoint, draw = Checkpoint.open(model), random.Random(seed)
    layers = {}
    for place, index in enumerate(checkpoint.moe_layers):
        names = tuple(sorted(draw.sample(range(8), 3 + place % 2)))
        experts = tuple(tuple((e, draw.gauss(0.5, 0.3)) for e in sorted(draw.sample(range(8), 3))) for _ in names)
        router = tuple(tuple((e, draw.random()) for e in sorted({name, *draw.sample(range(8), 3)})) for name in names)
        layers[index] = LayerPlan(
            names, 2, (1.0, 1.7)[place % 2], (0.5, None)[place // 2], merge=Merge(experts, router)
        )
    return Plan(checkpoint.identity(), 8, layers)


def clustered(model: Path) -> Plan:
    """Every layer's eight experts in three clusters, averaged; the router's choices mapped to them."""
    checkpoint = Checkpoint.open(model)
    clusters = (((0, 1.0), (5, 1.0), (6, 1.0)), ((1, 1.0), (2, 1.0), (7, 1.0)), ((3, 1.0), (4, 1.0)))
    experts = tuple(tuple((e, 1 / len(row)) for e, _ in row) for row in clusters)
    layer = LayerPlan((0, 1, 3), checkpoint.top_k, merge=Merge(experts, clusters, "ids"))
    return Plan(checkpoint.identity(), 8, dict.fromkeys(checkpoint.moe_layers, layer))


def uneven_widths(plan: Plan) -> Plan:
    """Fewer channels in every other layer, and a skip where there was none."""
    layers = {
        index: replace(layer, channels=tuple(kept[: 8 + 8 * (index % 2)] for kept in layer.channels), skip=0.6)
        for index, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


@pytest.fixture(scope="module")
def rows(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """All plans, cut and served one after another by one process."""
    home = tmp_path_factory.mktemp("methods")
    made = make_checkpoint("qwen3_moe", home / "made", num_experts_per_tok=4)
    model = talking_copy(made, home / "qwen3_moe")
    plans = {name: (model, plan) for name, plan in searched(model, home).items()}
    plans["uneven widths"] = model, uneven_widths(plans["intra"][1])
    for family in ("qwen3_moe", "olmoe", "gpt_oss"):
        plans[f"merged {family}"] = family_checkpoint(family), invented(family_checkpoint(family), 3)
    for family in ("glm4_moe", "llama4_text"):
        plans[f"clusters {family}"] = family_checkpoint(family), clustered(family_checkpoint(family))
    for name, (folder, plan) in plans.items():
        plan.save(home / f"{name}.json")
        assert main(["cut", str(folder), str(home / f"{name}.json"), "-o", str(home / "cut" / name)]) == 0
        assert verify(home / "cut" / name, folder).bytes_compared > 0
    served = serve([Job(str(home / "cut" / name), ASKED) for name in plans], timeout_s=800)
    found = {}
    for (name, (folder, plan)), got in zip(plans.items(), served, strict=True):
        assert not got.error, f"{name}: {got.error}: {got.message}"
        if name.startswith("clusters"):
            wanted, used = clustered_logprobs(folder, plan, ASKED), 0.0
        else:
            wanted, used = extras_logprobs(folder, plan, ASKED)
        full = reference_logprobs(folder, {}, ASKED)
        found[name] = {
            "max_diff": largest_difference(got.logprobs, wanted), "used": used, "plan": plan,
            "unpruned": largest_difference(got.logprobs, full), "got": got.logprobs, "folder": folder,
        }  # fmt: skip
    return found


NAMES = [
    "lexi", "naee", "naee skipping", "intra", "hc-smoe", "uneven widths", "merged qwen3_moe", "merged olmoe",
    "merged gpt_oss", "clusters glm4_moe", "clusters llama4_text",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_what_is_served_is_the_plan(rows: dict[str, Any], name: str) -> None:
    row = rows[name]
    assert row["max_diff"] <= TOLERANCE, row["max_diff"]
    assert row["unpruned"] > CONTROL, "the plan must show"


@pytest.mark.parametrize("name", ["naee skipping", "uneven widths", "merged qwen3_moe", "merged olmoe"])
def test_skipping_is_part_of_it(rows: dict[str, Any], name: str) -> None:
    row = rows[name]
    plan: Plan = row["plan"]
    without = replace(plan, layers={index: replace(layer, skip=None) for index, layer in plan.layers.items()})
    other, used = extras_logprobs(row["folder"], without, ASKED)
    assert largest_difference(row["got"], other) > CONTROL
    assert row["used"] < used, "skipping leaves experts out"


def test_a_router_map_is_part_of_it(rows: dict[str, Any]) -> None:
    row = rows["merged qwen3_moe"]
    layers = {i: replace(layer, merge=Merge(layer.merge.experts)) for i, layer in row["plan"].layers.items()}
    other, _ = extras_logprobs(row["folder"], replace(row["plan"], layers=layers), ASKED)
    assert largest_difference(row["got"], other) > CONTROL
