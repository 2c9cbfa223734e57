"""The scoped config overlay, the signature probes, the router temperature and the checks of parallelism."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leap_serve.architectures import family_of
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.errors import UnsupportedError
from leap_serve.plan import Plan
from parity import uneven_plan

pytestmark = pytest.mark.e2e


def test_overlay_restores_even_after_an_error() -> None:
    from leap_vllm.layers import overlay

    config = SimpleNamespace(num_experts=8, num_experts_per_tok=2)
    with pytest.raises(RuntimeError), overlay(config, {"num_experts": 3, "num_experts_per_tok": 1}):
        assert (config.num_experts, config.num_experts_per_tok) == (3, 1)
        raise RuntimeError
    assert (config.num_experts, config.num_experts_per_tok) == (8, 2)


def test_layers_are_wrapped_only_while_a_model_is_built() -> None:
    from vllm.model_executor.models import llama, qwen3_moe, utils

    from leap_vllm import compat

    stock = utils.make_layers
    with pytest.raises(RuntimeError), compat.build_layers_with(lambda layer: pytest.fail(f"built layer {layer}")):
        assert qwen3_moe.make_layers is llama.make_layers is not stock
        raise RuntimeError
    assert qwen3_moe.make_layers is llama.make_layers is utils.make_layers is stock


def test_signatures_of_the_installed_vllm() -> None:
    from leap_vllm import compat

    compat.check_signatures()
    path = "vllm.model_executor.models.utils:make_layers"
    with pytest.raises(UnsupportedError, match="no colour: this build of vLLM differs"):
        compat.check_signatures({path: ("prefix", "colour")})
    with pytest.raises(UnsupportedError, match="no vanished: this build of vLLM differs"):
        compat.check_signatures({"vllm.model_executor.models.utils:vanished": ()})


def routed(logits: torch.Tensor, temperature: float | None, top_k: int = 4, **router: Any) -> torch.Tensor:
    """Dense weights [T, E] that vLLM's router gives, in float64."""
    from vllm.model_executor.layers.fused_moe.router.router_factory import create_fused_moe_router

    from leap_vllm.router import apply_temperature

    made = create_fused_moe_router(top_k, logits.shape[1], **router)
    if temperature is not None:
        apply_temperature(made, temperature)
    weights, ids = made.select_experts(hidden_states=logits, router_logits=logits)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, ids.long(), weights.double())


def exact(logits: torch.Tensor, temperature: float, top_k: int = 4) -> torch.Tensor:
    """Softmax(z/τ) in float64, the top_k kept and renormalised."""
    weights, ids = (logits.double() / temperature).softmax(-1).topk(top_k, -1)
    return torch.zeros(logits.shape, dtype=torch.float64).scatter_(1, ids, weights / weights.sum(-1, keepdim=True))


@pytest.fixture(scope="module")
def gate() -> tuple[torch.Tensor, torch.Tensor]:
    """Hidden states [T, H] and router rows [E, H], fp32."""
    made = torch.Generator().manual_seed(0)
    return torch.randn(256, 64, generator=made), torch.randn(12, 64, generator=made) * 0.2


@pytest.mark.parametrize("temperature", [0.7, 1.3, 3.0])
def test_temperature_is_exact_in_fp32_and_once(gate: tuple[torch.Tensor, torch.Tensor], temperature: float) -> None:
    logits = gate[0] @ gate[1].T
    assert (routed(logits, temperature) - exact(logits, temperature)).abs().max() < 1e-6
    assert (routed(logits, None) - exact(logits, temperature)).abs().max() > 1e-2
    assert (routed(logits, temperature) - exact(logits, temperature**2)).abs().max() > 1e-2


@pytest.mark.parametrize("temperature", [0.7, 1.3, 3.0])
def test_temperature_in_bf16_is_exact_where_baking_rounds(
    gate: tuple[torch.Tensor, torch.Tensor], temperature: float
) -> None:
    hidden, rows = (x.bfloat16() for x in gate)
    logits = hidden @ rows.T
    wanted = exact(logits, temperature)
    run_time = (routed(logits, temperature) - wanted).abs().max()
    baked = (routed(hidden @ (rows.float() / temperature).bfloat16().T, None) - wanted).abs().max()
    print(f"τ {temperature}: error of a routing weight {run_time:.1e} at run time, {baked:.1e} baked into bf16")
    assert run_time < 1e-6
    assert baked > 1000 * run_time


def test_correction_bias_is_not_divided(gate: tuple[torch.Tensor, torch.Tensor]) -> None:
    logits, bias = gate[0] @ gate[1].T, torch.linspace(-1, 1, 12)
    got = routed(
        logits, 2.5, use_grouped_topk=True, num_expert_group=1, topk_group=1, scoring_func="sigmoid",
        e_score_correction_bias=bias, renormalize=False,
    )  # fmt: skip
    scores = (logits.double() / 2.5).sigmoid()
    ids = (scores + bias).topk(4, -1).indices
    wanted = torch.zeros_like(scores).scatter_(1, ids, scores.gather(1, ids))
    assert (got - wanted).abs().max() < 1e-6
    scaled = (scores + bias / 2.5).topk(4, -1).indices
    assert not torch.equal(scaled.sort(-1).values, ids.sort(-1).values)  # the bias decides, so the test can fail


def parallel(folder: Path, **args: Any) -> Any:
    """The config that vLLM makes for a checkpoint; what only a CUDA platform may ask for is set afterwards."""
    from vllm.engine.arg_utils import EngineArgs

    made = EngineArgs(str(folder), dtype="float32", skip_tokenizer_init=True).create_engine_config()
    for key, value in args.items():
        setattr(made.parallel_config, key, value)
    return made


@pytest.mark.parametrize(
    ("args", "sentence"),
    [
        ({"tensor_parallel_size": 2}, "--tensor-parallel-size: is 2, but a layer retains only 1 experts; use at most 1"),
        ({"enable_eplb": True}, r"--enable-eplb: needs equal expert counts in all layers, the plan has \[1, 4, 5, 7\]"),
        ({"enable_expert_parallel": True}, r"--enable-expert-parallel: is only served with equal expert counts, the plan has \[1, 4, 5, 7\]"),
    ],
)  # fmt: skip
def test_parallelism_that_the_counts_do_not_allow(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, args: dict[str, Any], sentence: str
) -> None:
    from leap_vllm.layers import check_parallel

    source = family_checkpoint("llama4_text")
    cut(source, uneven_plan(source), tmp_path / "cut")
    checkpoint = Checkpoint.open(tmp_path / "cut")
    plan = Plan.load(tmp_path / "cut" / "leap.json")
    check_parallel(plan, family_of(checkpoint.config, ""), parallel(tmp_path / "cut"))
    with pytest.raises(UnsupportedError, match=sentence):
        check_parallel(plan, family_of(checkpoint.config, ""), parallel(tmp_path / "cut", **args))
