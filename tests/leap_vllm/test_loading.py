"""What is loaded: router heads, the load format leap, uniform cuts in stock vLLM, and nothing without the plugin."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from leap_serve.cut.write import cut
from leap_serve.plan import LayerPlan, Plan
from parity import CONTROL, TOLERANCE, largest_difference, prompts, reference_layers, uneven_plan
from reference import reference_logprobs
from serving import Job, Served, serve

pytestmark = pytest.mark.e2e
PROMPTS = prompts(160)[:4]


class Models:
    """A full model, an even and an uneven cut, the uneven one with a tuned router head, and that head's full model."""

    def __init__(self, full: Path, work: Path) -> None:
        self.full, self.work = full, work
        self.uneven = uneven_plan(full)
        layers = {layer: LayerPlan((0, 2, 3, 7), 2) for layer in self.uneven.layers}
        self.even = Plan(self.uneven.base, self.uneven.num_experts, layers)
        cut(full, self.uneven, work / "uneven")
        cut(full, self.even, work / "even")
        self.add_head()

    def add_head(self) -> None:
        """Tune layers 1 and 2 by chance; the full model "tuned" has the same rows where they came from."""
        made = torch.Generator().manual_seed(7)
        shutil.copytree(self.work / "uneven", self.work / "headed")
        shutil.copytree(self.full, self.work / "tuned")
        weights, head = load_file(self.full / "model.safetensors"), {}
        for layer in (1, 2):
            ids = list(self.uneven.layers[layer].retained)
            head[f"layers.{layer}.weight"] = torch.randn(len(ids), 64, generator=made) * 0.2
            weights[f"model.layers.{layer}.mlp.gate.weight"][ids] = head[f"layers.{layer}.weight"]
        metadata = {"leap_fingerprint": self.uneven.fingerprint}
        save_file(head, self.work / "headed" / "router_head.safetensors", metadata=metadata)
        save_file(weights, self.work / "tuned" / "model.safetensors", metadata={"format": "pt"})
        # A folder without an index, of which vLLM reads every *.safetensors, the head included.
        shutil.copytree(self.work / "headed", self.work / "headed-one-file")
        (self.work / "headed-one-file" / "model.safetensors.index.json").unlink()

    def reference(self, folder: Path, plan: Plan | None) -> list[torch.Tensor]:
        return reference_logprobs(folder, reference_layers(plan) if plan else {}, PROMPTS)


@pytest.fixture(scope="module")
def models(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(family_checkpoint("qwen3_moe"), tmp_path_factory.mktemp("loading"))


@pytest.fixture(scope="module")
def served(models: Models) -> dict[tuple[str, str], Served]:
    wanted = [
        ("headed", "auto"), ("headed", "leap"), ("headed-one-file", "auto"), ("even", "auto"), ("even", "leap"),
        ("full", "auto"), ("full", "leap"), ("uneven", "leap"),
    ]  # fmt: skip
    folders = {name: models.work / name for name, _ in wanted} | {"full": models.full}
    jobs = [Job(str(folders[name]), PROMPTS, {"load_format": load_format}) for name, load_format in wanted]
    return dict(zip(wanted, serve(jobs), strict=True))


@pytest.fixture(scope="module")
def stock(models: Models) -> dict[str, Served]:
    """The same vLLM with all plugins disabled."""
    jobs = [Job(str(models.work / name), PROMPTS) for name in ("even", "uneven")]
    jobs.append(Job(str(models.work / "even"), PROMPTS, {"load_format": "leap"}))
    return dict(zip(("even", "uneven", "flag"), serve(jobs, {"VLLM_PLUGINS": ""}), strict=True))


@pytest.mark.parametrize("case", [("headed", "auto"), ("headed", "leap"), ("headed-one-file", "auto")])
def test_router_head_takes_the_place_of_the_router(models: Models, served: Any, case: tuple[str, str]) -> None:
    got = served[case].logprobs
    assert largest_difference(got, models.reference(models.work / "tuned", models.uneven)) <= TOLERANCE
    assert largest_difference(got, models.reference(models.full, models.uneven)) > CONTROL


def test_load_format_leap_changes_nothing_else(models: Models, served: Any) -> None:
    assert (
        largest_difference(served["uneven", "leap"].logprobs, models.reference(models.full, models.uneven)) <= TOLERANCE
    )
    for name in ("full", "even"):
        assert all(map(torch.equal, served[name, "auto"].logprobs, served[name, "leap"].logprobs)), name


def test_uniform_cut_needs_no_plugin(models: Models, served: Any, stock: Any) -> None:
    assert largest_difference(stock["even"].logprobs, models.reference(models.full, models.even)) <= TOLERANCE
    assert largest_difference(stock["even"].logprobs, models.reference(models.full, None)) > CONTROL
    assert all(map(torch.equal, stock["even"].logprobs, served["even", "auto"].logprobs))


def test_without_the_plugin_vllm_refuses_what_it_would_misread(stock: Any) -> None:
    assert "LeapQwen3MoeForCausalLM" in stock["uneven"].message and "not supported" in stock["uneven"].message
    assert "Load format `leap` is not supported" in stock["flag"].message
