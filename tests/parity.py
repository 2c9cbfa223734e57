"""Parity of vLLM + plugin, serving a cut checkpoint, with transformers running the full model behind masked routers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer

from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.write import cut
from leap_serve.plan import LayerPlan, Merge, Plan
from leap_serve.tasks.registry import TASKS
from reference import Layer, reference_logprobs
from serving import Job, serve

TOLERANCE = 1e-4
"""Largest allowed difference of a log-probability, fp32, over the whole vocabulary and all positions."""
CONTROL = 1e-2
"""What a wrong reference must differ by at least: a hundred times the tolerance."""
COUNTS, TEMPERATURES = (5, 2, 7, 4), (1.0, 0.7, 1.3, 0.45)
LENGTHS = (1, 2, 7, 33, 60)


def uneven_plan(folder: Path, seed: int = 1, temperatures: Sequence[float] = TEMPERATURES) -> Plan:
    """Different |I|, top_k and τ in each layer; odd counts and |I| = top_k among them; random experts."""
    checkpoint, draw = Checkpoint.open(folder), random.Random(seed)
    k = checkpoint.top_k
    counts = [max(k, count * checkpoint.num_experts // 8) for count in COUNTS]
    counts[1] = k
    top_k = (k, k, max(1, k - 1), k)
    layers = {
        layer: LayerPlan(tuple(sorted(draw.sample(range(checkpoint.num_experts), counts[i]))), top_k[i], tau)
        for layer, i, tau in zip(checkpoint.moe_layers, range(4), temperatures, strict=False)
    }
    return Plan(checkpoint.identity(), checkpoint.num_experts, layers)


def merging_plan(full: Path, applied: Literal["ids", "probabilities"]) -> Plan:
    """Experts merged in pairs, unevenly: the last layer merges nothing, so it keeps all; temperatures of the uneven plan."""
    plan = uneven_plan(full)
    half = plan.num_experts // 2
    pairs = tuple(((e, 0.25), (e + half, 0.75)) for e in range(half))
    router = pairs if applied == "probabilities" else tuple(((e, 1.0), (e + half, 1.0)) for e in range(half))
    merged = {i: replace(layer, retained=tuple(range(half)), top_k=min(2, layer.top_k), merge=Merge(pairs, router, applied))
              for i, layer in plan.layers.items()}  # fmt: skip
    last = max(merged)
    whole = tuple(((e, 1.0),) for e in range(plan.num_experts))
    every = tuple(range(plan.num_experts))
    merged[last] = replace(merged[last], retained=every, merge=Merge(whole, whole, applied))
    return replace(plan, layers=merged)


def prompts(vocabulary: int, seed: int = 0) -> list[list[int]]:
    """Random token ids, one token long to sixty."""
    draw = random.Random(seed)
    return [[draw.randrange(3, vocabulary) for _ in range(length)] for length in LENGTHS]


def task_prompts(folder: Path) -> list[list[int]]:
    """Prompt and answer of a test item of each toy task, cut to 100 tokens, and a single token."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    items = [task().items("test", 1)[0] for task in TASKS.values()]
    encoded = [tokenizer.encode(item.prompt + item.answer, add_special_tokens=False).ids[:100] for item in items]
    return [*encoded, encoded[0][:1]]


def largest_difference(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Largest absolute difference over prompts, positions and vocabulary; shapes must agree."""
    assert [row.shape for row in ours] == [row.shape for row in theirs]
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def wrong_layers(plan: Plan) -> dict[str, dict[int, Layer]]:
    """References that parity must not hold against: no plan, and plans wrong in one thing each."""
    layers = reference_layers(plan)
    wrong: dict[str, dict[int, Layer]] = {"unpruned": {}}
    if any(layer.temperature != 1.0 for layer in plan.layers.values()):
        wrong["no temperature"] = {index: (ids, k, 1.0) for index, (ids, k, _) in layers.items()}
    for index, (ids, k, tau) in layers.items():
        dropped = sorted(set(range(plan.num_experts)) - set(ids))
        if dropped and "one other expert" not in wrong:
            wrong["one other expert"] = {**layers, index: (sorted([*ids[1:], dropped[0]]), k, tau)}
        if k > 1 and "other top_k" not in wrong:
            wrong["other top_k"] = {**layers, index: (ids, k - 1, tau)}
    return wrong


def reference_layers(plan: Plan) -> dict[int, Layer]:
    """The plan as the reference takes it."""
    return {index: (layer.retained, layer.top_k, layer.temperature) for index, layer in plan.layers.items()}


def measure(models: dict[str, tuple[Path, Plan]], work: Path, env: dict[str, str] | None = None, **args: Any) -> Any:
    """Cut every model, serve the cuts, return {name: {"max_diff", "controls": {…}, "retained", "top_k"}}."""
    asked = {
        name: task_prompts(folder) if (folder / "tokenizer.json").exists() else prompts(160)
        for name, (folder, _) in models.items()
    }
    for name, (folder, plan) in models.items():
        cut(folder, plan, work / name)
    served = serve([Job(str(work / name), asked[name], args) for name in models], env)
    rows = {}
    for (name, (folder, plan)), got in zip(models.items(), served, strict=True):
        assert not got.error, f"{name}: {got.error}: {got.message}"
        wrong = {
            what: largest_difference(got.logprobs, reference_logprobs(folder, layers, asked[name]))
            for what, layers in wrong_layers(plan).items()
        }
        right = reference_logprobs(folder, reference_layers(plan), asked[name])
        rows[name] = {
            "max_diff": largest_difference(got.logprobs, right), "controls": wrong, "retained": plan.counts,
            "top_k": [layer.top_k for layer in plan.layers.values()],
            "temperature": [layer.temperature for layer in plan.layers.values()],
        }  # fmt: skip
    return rows


def reap_plan(model: str, work: Path, budget: float = 0.25, items: int = 32) -> Plan:
    """A global REAP plan of a trained model, made with the commands that a user types."""
    profile = ["profile", model, "--task", "toy-gsm", "--limit", str(items), "--engine", "torch", "-o", f"{work}/prof"]
    search = ["search", f"{work}/prof", "--method", "reap", "--budget", str(budget), "--allocation", "global"]
    for argv in (profile, [*search, "-o", f"{work}/plan.json"]):
        assert main(argv) == 0, argv
    return Plan.load(work / "plan.json")
