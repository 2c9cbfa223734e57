"""What tuning laid beside a cut, served: merged at load, exported, and unmerged in transformers + PEFT agree."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cut.export import export
from leap_serve.cut.write import cut
from leap_serve.plan import LayerPlan, Plan
from parity import CONTROL, TOLERANCE, largest_difference, prompts, reference_layers, task_prompts, uneven_plan
from reference import reference_logprobs
from serving import Job, Served, serve
from tuning import logprobs_of, tune_at_random

pytestmark = pytest.mark.e2e
# One family of each layout: a tensor per expert under either set of names, fused, fused and transposed. That the
# merged tensors are PEFT's own is shown for every family in tests/leap_serve/weights/test_merge.py.
FAMILIES = ("qwen3_moe", "mixtral", "llama4_text", "gpt_oss")
PROMPTS = prompts(160)[:4]
EXPORTED = ("gpt_oss",)


class Tuned:
    """A cut with random overlays, what transformers + PEFT answer unmerged, and what the cut answers without them."""

    def __init__(self, full: Path, plan: Plan, work: Path, asked: list[list[int]]) -> None:
        self.folder, self.plain, self.asked = work / "cut", work / "plain", asked
        cut(full, plan, self.folder)
        self.unmerged = logprobs_of(tune_at_random(full, plan, self.folder, work / "adapter"), asked)
        self.untuned = reference_logprobs(full, reference_layers(plan), asked)

    def job(self, folder: Path, **args: Any) -> Job:
        return Job(str(folder), self.asked, args)

    def check(self, got: Served) -> None:
        assert not got.error, f"{got.error}: {got.message}"
        assert largest_difference(got.logprobs, self.unmerged) <= TOLERANCE
        assert largest_difference(got.logprobs, self.untuned) > CONTROL


def uniform_plan(folder: Path, count: int) -> Plan:
    source = Checkpoint.open(folder)
    layers = {layer: LayerPlan(tuple(range(3, 3 + 2 * count, 2)), source.top_k) for layer in source.moe_layers}
    return Plan(source.identity(), source.num_experts, layers)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """leap-tiny in fp32, 16 of 64 experts in every layer, tuned and exported."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    work, bundled = tmp_path_factory.mktemp("tiny"), resolve_model("leap-tiny")
    AutoModelForCausalLM.from_pretrained(bundled, dtype=torch.float32).save_pretrained(work / "full")
    AutoTokenizer.from_pretrained(bundled).save_pretrained(work / "full")
    made = Tuned(work / "full", uniform_plan(work / "full", 16), work, task_prompts(bundled))
    assert export(made.folder, made.plain).plugin is False
    return made


@pytest.fixture(scope="module")
def tuned(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tuned]:
    """Different |I|, top_k and τ in each layer; leap-tiny as it is shipped, in bf16."""
    work, bundled = tmp_path_factory.mktemp("tuned"), resolve_model("leap-tiny")
    found = {
        name: Tuned(family_checkpoint(name), uneven_plan(family_checkpoint(name)), work / name, PROMPTS)
        for name in FAMILIES
    }
    for name in EXPORTED:
        assert export(found[name].folder, found[name].plain).plugin is True
    return found | {"leap-tiny": Tuned(bundled, uneven_plan(bundled), work / "leap-tiny", task_prompts(bundled))}


@pytest.fixture(scope="module")
def served(tuned: dict[str, Tuned], tiny: Tuned) -> dict[str, Served]:
    jobs = {name: one.job(one.folder) for name, one in tuned.items()}
    jobs |= {f"{name} exported": tuned[name].job(tuned[name].plain) for name in EXPORTED}
    jobs["uniform"] = tiny.job(tiny.folder)
    return dict(zip(jobs, serve(list(jobs.values()), timeout_s=840), strict=True))


@pytest.mark.parametrize("name", [*FAMILIES, "leap-tiny"])
def test_merged_at_load_equals_unmerged_peft(tuned: dict[str, Tuned], served: dict[str, Served], name: str) -> None:
    tuned[name].check(served[name])


@pytest.mark.parametrize("name", EXPORTED)
def test_an_uneven_export_is_served_by_the_plugin(tuned: dict[str, Tuned], served: Any, name: str) -> None:
    tuned[name].check(served[f"{name} exported"])
    assert all(map(torch.equal, served[name].logprobs, served[f"{name} exported"].logprobs))


def test_a_uniform_export_needs_no_plugin(tiny: Tuned, served: dict[str, Served]) -> None:
    from transformers import AutoModelForCausalLM

    tiny.check(served["uniform"])
    plain, still_tuned = serve([tiny.job(tiny.plain), tiny.job(tiny.folder)], {"VLLM_PLUGINS": ""})
    tiny.check(plain)
    assert "LeapQwen3MoeForCausalLM" in still_tuned.message and "not supported" in still_tuned.message
    stock = AutoModelForCausalLM.from_pretrained(tiny.plain, dtype=torch.float32, attn_implementation="eager").eval()
    assert largest_difference(logprobs_of(stock, tiny.asked), tiny.unmerged) <= TOLERANCE


def test_tensor_parallel_two_merges_before_it_shards(tmp_path: Path) -> None:
    full = make_checkpoint("gpt_oss", tmp_path / "full", num_key_value_heads=2)
    made = Tuned(full, uneven_plan(full), tmp_path, PROMPTS)
    job = made.job(made.folder, tensor_parallel_size=2, distributed_executor_backend="mp")
    made.check(*serve([job], {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}, timeout_s=840))
