"""Plans under vLLM's V2 model runner, the GPU's default; on a CPU Triton's interpreter runs the runner's kernels."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from families import make_checkpoint
from leap_serve.engines.torch_engine import TorchEngine
from parity import CONTROL, TOLERANCE, uneven_plan
from tiny_tokenizer import add_tokenizer, talking_copy
from v2_script import ITEMS

pytestmark = pytest.mark.e2e
TESTS = Path(__file__).parents[1]
SETTINGS: dict[str, Any] = dict(
    dtype="float32", kv_cache_gib=0.05, max_model_len=256, max_num_batched_tokens=128, max_num_seqs=16,
    long_prefill_token_threshold=24, enable_prefix_caching=True,
)  # fmt: skip
INTERPRETED = {
    "VLLM_USE_V2_MODEL_RUNNER": "1", "TRITON_INTERPRET": "1", "TRITON_DEFAULT_BACKEND": "cpu", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(TESTS / "fixtures" / "triton_cpu"),
}  # fmt: skip
GPU_TOLERANCE = 0.3
"""Of a summed log-likelihood in float32: Triton multiplies in TF32. Plans lie further apart than that (CONTROL of the GPU)."""


@dataclass(frozen=True)
class Case:
    """A model, two plans, and what transformers says of them: rows of ITEMS, [stock, plan, plan], and each plan's ESP."""

    model: Path
    plans: list[Path]
    reference: list[list[float]]
    esp: list[list[float]]


def case_of(model: Path, folder: Path) -> Case:
    plans = [uneven_plan(model, 1), uneven_plan(model, 2, (1.0,) * 4)]
    engine = TorchEngine(model, dtype="float32", device="cpu")
    rows = [engine.score(ITEMS), *engine.score_plans(plans, ITEMS, esp=True)]
    engine.close()
    files = [folder / f"{number}.json" for number in range(len(plans))]
    for plan, path in zip(plans, files, strict=True):
        plan.save(path)
    esp = [[score.esp or 0.0 for score in row] for row in rows[1:]]
    return Case(model, files, [[score.logprob for score in row] for row in rows], esp)


def run(case: Case, environment: dict[str, str], **settings: Any) -> dict[str, Any]:
    """Run v2_script.py; returns what it found."""
    command = [sys.executable, str(TESTS / "v2_script.py"), json.dumps({**SETTINGS, **settings})]
    done = subprocess.run(
        [*command, str(case.model), *map(str, case.plans)], capture_output=True, text=True, timeout=550, check=False,
        env={**os.environ, "PYTHONSAFEPATH": "1", **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def apart(ours: Sequence[Sequence[float]], theirs: Sequence[Sequence[float]]) -> float:
    """Largest difference between two tables of numbers."""
    return max(abs(a - b) for row, other in zip(ours, theirs, strict=True) for a, b in zip(row, other, strict=True))


def first_token(ours: dict[str, float], theirs: dict[str, float]) -> float:
    """Largest difference over the likeliest tokens; infinite where these are others."""
    both = set(ours) & set(theirs)
    return max((abs(ours[t] - theirs[t]) for t in both), default=float("inf")) if len(both) > 10 else float("inf")


def check(found: dict[str, Any], case: Case, tolerance: float, control: float) -> None:
    """Mixed = alone = applied = transformers behind masks; requests without a plan are stock vLLM's; salts are needed."""
    stock, masked = case.reference[:1], case.reference[1:]
    assert min(apart(stock, masked[:1]), apart(stock, masked[1:]), apart(masked[:1], masked[1:])) > control
    assert apart([found["stock"]], stock) <= tolerance
    for name in ("mixed", "alone", "applied", "again"):
        assert apart(found[name], masked) <= tolerance, name
    assert apart([found["unnamed"]], stock) <= tolerance
    assert apart(found["esp"], case.esp) <= min(tolerance, 0.02) and apart(found["esp"], case.esp[::-1]) > 0.02
    assert apart([found["restored"]], stock) <= tolerance
    assert first_token(found["salted"], found["right"]) <= tolerance
    assert first_token(found["poisoned"], found["right"]) > tolerance, "another plan's keys should have been found"
    assert found["hooked"] == ["add_request", "prepare_inputs"] and found["left"] == []


@pytest.fixture(scope="module")
def case(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("v2")
    return case_of(talking_copy(family_checkpoint("qwen3_moe"), folder / "model"), folder)


def test_real_v2_runner_with_its_kernels_interpreted(case: Case) -> None:
    found = run(case, INTERPRETED)
    assert found["runner"] == "vllm.v1.worker.cpu.model_runner", "this is V2's"
    check(found, case, TOLERANCE, CONTROL)
    assert found["unnamed"] == found["restored"] == found["stock"], "bit for bit: the stock routing ran"
    assert found["decoded"] == found["decoded_alone"]
    assert len({tuple(tokens) for tokens in found["decoded"]}) > 3, "plans should say different things"
    assert [text.split(":")[0] for text in found["refusals"]] == ["plans"] * 3
    for text, word in zip(found["refusals"], ("DBO", "prefill context parallel 2", "KV sharing"), strict=True):
        assert word in text
    tokens, counts = found["profile"]
    assert counts == [2 * tokens] * 4, "every token was seen, K times, in every layer"


def test_both_runners_are_those_we_know() -> None:
    from leap_vllm.compat import check_signatures
    from leap_vllm.compat_runners import V1_PROBES, V2_PROBES

    check_signatures(V1_PROBES)
    check_signatures(V2_PROBES)


@pytest.fixture(scope="module")
def gpu_case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Sizes that FlashAttention and the fused Triton kernels have."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    folder = tmp_path_factory.mktemp("v2_gpu")
    sizes = dict(hidden_size=128, head_dim=64, intermediate_size=128, moe_intermediate_size=64)
    return case_of(add_tokenizer(make_checkpoint("qwen3_moe", folder / "model", **sizes)), folder)


@pytest.mark.gpu
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_v2_runner_on_a_gpu(gpu_case: Case, eager: bool) -> None:
    more: dict[str, Any] = dict(attention_config={"backend": "TRITON_ATTN"}, moe_backend="triton")
    found = run(gpu_case, {}, enforce_eager=eager, kv_cache_gib=0.5, **more)
    assert found["runner"] == "vllm.v1.worker.gpu.model_runner"
    check(found, gpu_case, GPU_TOLERANCE, 2 * GPU_TOLERANCE)
    assert (found["graphs"] == 0) is eager


@pytest.mark.gpu
def test_a_cuda_graph_of_the_routing_follows_its_tables() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    from leap_vllm.compat import Choosing
    from leap_vllm.subsets import LayerTable, route

    device, tokens, experts, top_k = torch.device("cuda"), 64, 16, 4
    router = create_fused_moe_router(top_k, experts, renormalize=True)
    table = LayerTable(experts, top_k, device, fixed=True)
    slots = torch.zeros(tokens, dtype=torch.long, device=device)
    logits = torch.randn(tokens, experts, device=device, generator=torch.Generator(device).manual_seed(0))

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        return route(
            table, slots, logits, Choosing(top_k, True),
            lambda z: router._compute_routing(z, z, None, input_ids=None),
        )  # fmt: skip

    def dense(weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(tokens, experts, device=device).scatter_add_(1, ids.long(), weights.float())

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = step()
    for plans in ([(list(range(0, experts, 2)), 3, 0.5), ([1, 2, 5, 7], 2, 1.0)], [(list(range(5)), 1, 1.5)]):
        table.load(plans)
        slots.copy_(torch.arange(tokens, device=device) % (len(plans) + 1))
        expected = dense(*step())
        graph.replay()
        assert (dense(*recorded) - expected).abs().max() < 1e-5
        assert all((expected[slots == 1][:, e] == 0).all() for e in range(experts) if e not in plans[0][0])
