"""The kernels against plain torch: on a GPU where there is one, else in Triton's interpreter (test_interpreter.py)."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from leap_kernels import fused_moe, reference_moe
from leap_kernels.config import KernelConfig, Reduction, Tile, default_config
from leap_kernels.fused_moe import _route_tokens

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1: test_interpreter.py runs this file so, in a process of its own",
)
SMALL = KernelConfig(16, 2, Tile(16, 16, 1, 1), Tile(16, 32, 1, 1))
TOLERANCE = {torch.float32: 3e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}
"""Of the largest output. The intermediate is rounded to the dtype; the interpreter truncates to bf16."""
F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16


@dataclass(frozen=True)
class Case:
    why: str
    tokens: int
    experts: int
    top_k: int
    hidden: int
    width: int
    dtype: torch.dtype = F32
    how: dict[str, Any] = field(default_factory=dict)

    def weights(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return x [T, H], w13 [E, 2·I, H] and w2 [E, H, I], scaled so that the output is of order 1."""
        torch.manual_seed(self.tokens * 1000 + self.experts)
        x = torch.randn(self.tokens, self.hidden)
        w13 = torch.randn(self.experts, 2 * self.width, self.hidden) / self.hidden**0.5
        w2 = torch.randn(self.experts, self.hidden, self.width) / self.width**0.5
        return (x.to(DEVICE, self.dtype), w13.to(DEVICE, self.dtype), w2.to(DEVICE, self.dtype))

    def logits(self) -> torch.Tensor:
        return torch.randn(self.tokens, self.experts).to(DEVICE)


CASES = [
    Case("nothing divides anything", 5, 6, 3, 40, 24),
    Case("one token", 1, 16, 4, 32, 16, F16),
    Case("as many experts as top_k", 6, 4, 4, 33, 17, F16),
    Case("most experts empty", 3, 40, 2, 32, 16),
    Case("one expert, top-1", 4, 1, 1, 32, 16),
    Case("routed by two kernels, |I| no power of two", 131, 20, 2, 24, 20),
    Case("bf16", 9, 8, 2, 32, 16, BF16),
    Case("no renormalising, temperature", 5, 8, 3, 32, 16, F32, {"renormalise": False, "temperature": 0.7}),
    Case("sigmoid and scale", 5, 8, 3, 32, 16, F32, {"scoring": "sigmoid", "scale": 2.5}),
    Case("Llama-4: sigmoid, top-1, weight on the input", 7, 5, 1, 32, 16, F16,
         {"scoring": "sigmoid", "weight_on_input": True, "renormalise": False}),
    Case("weight on the input, several experts", 4, 6, 2, 32, 16, F32, {"weight_on_input": True}),
]  # fmt: skip
WIDE = [
    Case("512 experts, top-8", 6, 512, 8, 32, 16),
    Case("|I| = 16 = k", 9, 16, 16, 48, 16, F16),
    Case("17 experts, top-10", 33, 17, 10, 64, 48),
    Case("two kernels, several steps a chunk", 300, 512, 1, 16, 16),
    Case("bf16, odd", 21, 12, 5, 72, 40, BF16),
    Case("two kernels, fp16, empty experts", 260, 24, 2, 16, 16, F16),
]


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Within the dtype's tolerance of the exact result, relative to its largest entry."""
    error = (actual.double() - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
    assert error <= TOLERANCE[actual.dtype], f"relative error {error:.2e} in {actual.dtype}"


def exact(x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, *args: torch.Tensor, **how: Any) -> torch.Tensor:
    """The reference in fp64."""
    return reference_moe(x.double(), w13.double(), w2.double(), *args, **how)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_layer_equals_the_reference(case: Case) -> None:
    x, w13, w2 = case.weights()
    logits = case.logits()
    out = fused_moe(x, w13, w2, logits, top_k=case.top_k, config=SMALL, **case.how)
    assert out.dtype == x.dtype and out.shape == x.shape
    close(out, exact(x, w13, w2, logits.double(), top_k=case.top_k, **case.how))


@pytest.mark.slow
@pytest.mark.parametrize("case", WIDE, ids=lambda case: case.why)
@pytest.mark.parametrize("reduction", ["rows", "by_expert", "atomic"])
def test_wide_sweep(case: Case, reduction: Reduction) -> None:
    x, w13, w2 = case.weights()
    logits = case.logits()
    out = fused_moe(x, w13, w2, logits, top_k=case.top_k, config=replace(SMALL, reduction=reduction))
    close(out, exact(x, w13, w2, logits.double(), top_k=case.top_k))
    close(fused_moe(x, w13, w2, logits, top_k=case.top_k), exact(x, w13, w2, logits.double(), top_k=case.top_k))


@pytest.mark.parametrize("reduction", ["by_expert", "atomic"])
@pytest.mark.parametrize("dtype", [F32, F16])
def test_every_reduction_gives_the_same(reduction: Reduction, dtype: torch.dtype) -> None:
    case = Case("", 19, 7, 3, 40, 24, dtype)
    x, w13, w2 = case.weights()
    logits = case.logits()
    out = fused_moe(x, w13, w2, logits, top_k=3, config=replace(SMALL, reduction=reduction))
    close(out, exact(x, w13, w2, logits.double(), top_k=3))


@pytest.mark.parametrize("reduction", ["rows", "by_expert"])
def test_given_ids_from_several_ranks(reduction: Reduction) -> None:
    """Ids are global, half of the experts live elsewhere, −1 is nobody, one token has the same expert twice."""
    case = Case("", 6, 4, 2, 32, 16)
    x, w13, w2 = case.weights()
    ids = torch.tensor([[0, 7], [3, 5], [5, 5], [-1, 1], [2, 4], [6, -1]], device=DEVICE)
    weights = torch.rand(6, 2).to(DEVICE)
    expert_map = torch.tensor([-1, 2, -1, 0, -1, 3, 1, -1], dtype=torch.int32, device=DEVICE)
    given = {"topk_ids": ids, "topk_weights": weights, "expert_map": expert_map}
    out = torch.full_like(x, float("nan"))
    result = fused_moe(x, w13, w2, **given, config=replace(SMALL, reduction=reduction), out=out)
    assert result is out
    close(out, exact(x, w13, w2, **given))
    assert not out[0].any() and not out[4].any(), "tokens whose experts are all elsewhere contribute nothing"


def test_top_1_token_without_an_expert_here_is_zero() -> None:
    x, w13, w2 = Case("", 3, 2, 1, 32, 16).weights()
    ids = torch.tensor([[1], [-1], [0]], dtype=torch.int32, device=DEVICE)
    out = torch.full_like(x, float("nan"))
    given = {"topk_ids": ids, "topk_weights": torch.ones(3, 1, device=DEVICE)}
    close(fused_moe(x, w13, w2, **given, config=SMALL, out=out), exact(x, w13, w2, **given))
    assert not out[1].any()


def test_the_bias_ranks_and_does_not_weigh() -> None:
    x, w13, w2 = Case("", 5, 8, 2, 32, 16).weights()
    logits = torch.randn(5, 8).to(DEVICE)
    bias = torch.tensor([3.0, -3.0, 0, 0, 0, 0, 2.0, -3.0], device=DEVICE)
    how: dict[str, Any] = {"top_k": 2, "scoring": "sigmoid", "bias": bias, "scale": 1.5}
    out = fused_moe(x, w13, w2, logits, config=SMALL, **how)
    close(out, exact(x, w13, w2, logits.double(), **how))
    without = exact(x, w13, w2, logits.double(), **{**how, "bias": None})
    assert (out.double() - without).abs().max() > 0.01, "the bias changed no choice: the case proves nothing"


def test_rows_may_lie_apart() -> None:
    x, w13, w2 = Case("", 5, 4, 2, 24, 16).weights()
    logits = torch.randn(5, 4).to(DEVICE)
    apart = torch.zeros(5, 40, device=DEVICE)[:, :24].copy_(x)
    wide = torch.zeros(4, 32, 31, device=DEVICE)[..., :24].copy_(w13)
    assert apart.stride(0) == 40 and wide.stride(1) == 31
    close(fused_moe(apart, wide, w2, logits, top_k=2, config=SMALL), exact(x, w13, w2, logits.double(), top_k=2))


def test_no_tokens() -> None:
    x, w13, w2 = Case("", 0, 4, 2, 32, 16).weights()
    assert fused_moe(x, w13, w2, torch.empty(0, 4, device=DEVICE), top_k=2).shape == (0, 32)


def route(logits: torch.Tensor, top_k: int, block_m: int = 16) -> Any:
    return _route_tokens(
        len(logits), logits.shape[1], top_k, block_m, logits, None, None, "softmax", 1.0, None, True, 1.0, None
    )


@pytest.mark.parametrize(("tokens", "experts", "top_k"), [(9, 6, 3), (131, 20, 2)], ids=["one kernel", "two kernels"])
def test_routing_sorts_stably_and_blocks_cover_every_row_once(tokens: int, experts: int, top_k: int) -> None:
    torch.manual_seed(0)
    routing = route(torch.randn(tokens, experts).to(DEVICE), top_k)
    flat = routing.ids.flatten().long()
    expected = torch.sort(flat, stable=True).indices
    assert torch.equal(routing.order.long(), expected)
    assert torch.equal(routing.rows[expected].long(), torch.arange(len(flat), device=DEVICE))
    assert torch.equal(
        routing.offsets.long(), torch.searchsorted(flat.sort().values, torch.arange(experts + 1).to(DEVICE))
    )
    covered = []
    for expert, first, end in routing.blocks.T.tolist():
        if expert >= 0:
            rows = list(range(first, min(first + 16, end)))
            assert rows and all(flat[routing.order[row]] == expert for row in rows)
            covered += rows
    assert sorted(covered) == list(range(len(flat)))


def test_masked_logits_still_give_distinct_experts() -> None:
    """With fewer live experts than top_k the rest weigh nothing, and no expert comes twice."""
    logits = torch.full((3, 8), float("-inf"), device=DEVICE)
    logits[:, 5] = 1.0
    routing = route(logits, 4)
    assert all(len(set(row)) == 4 and row[0] == 5 for row in routing.ids.tolist())
    assert torch.equal(routing.weights[:, 0], torch.ones(3, device=DEVICE)) and not routing.weights[:, 1:].any()


@pytest.mark.parametrize("reduction", ["rows", "by_expert"])
def test_many_runs_agree_in_every_bit(reduction: Reduction) -> None:
    """And a token's result does not depend on which tokens share its batch, as long as the launch is the same."""
    x, w13, w2 = Case("", 12, 5, 3, 40, 24, F16).weights()
    logits, config = torch.randn(12, 5).to(DEVICE), replace(SMALL, reduction=reduction)
    first = fused_moe(x, w13, w2, logits, top_k=3, config=config)
    for _ in range(4 if INTERPRETED else 200):
        assert torch.equal(first, fused_moe(x, w13, w2, logits, top_k=3, config=config))
    back = torch.arange(11, -1, -1, device=DEVICE)
    assert torch.equal(first[back], fused_moe(x[back], w13, w2, logits[back], top_k=3, config=config))


def test_default_launches_never_add_atomically() -> None:
    """Only fp32 atomics would make the last bits depend on the run; nothing but a configuration asks for them."""
    chosen = {
        default_config(tokens, 16, k, size).reduction for tokens in (1, 64, 4096) for k in (1, 8) for size in (2, 4)
    }
    assert chosen == {"rows"}


def test_one_operator_under_torch_compile() -> None:
    """The whole layer is traced without a graph break, for any number of tokens, and gives the same bits."""
    x, w13, w2 = Case("", 5, 4, 2, 32, 16, F16).weights()
    logits = torch.randn(5, 4).to(DEVICE)

    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return fused_moe(x * 2.0, w13, w2, logits, top_k=2, config=SMALL, out=torch.empty_like(x)) + 1.0

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 3):
        assert torch.equal(compiled(x[:tokens], logits[:tokens]), layer(x[:tokens], logits[:tokens]))


def test_the_operator_keeps_its_promises() -> None:
    """torch's own check: schema, fake tensors, dispatch; ids of several ranks."""
    x, w13, w2 = Case("", 6, 4, 2, 32, 16).weights()
    ids = torch.tensor([[0, 7], [3, 5], [5, 5], [-1, 1], [2, 4], [6, -1]], device=DEVICE)
    expert_map = torch.tensor([-1, 2, -1, 0, -1, 3, 1, -1], dtype=torch.int32, device=DEVICE)
    given = (x, w13, w2, None, ids, torch.rand(6, 2).to(DEVICE), 2, "softmax", 1.0, None, True, 1.0, False, expert_map)
    operator = torch.ops.leap_kernels.fused_moe.default
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    assert set(torch.library.opcheck(operator, (*given, SMALL.to_ints()), test_utils=checks).values()) == {"SUCCESS"}
    fake = torch.empty(0, 32, dtype=F16, device="meta")
    shaped = operator(fake, *(t.to(F16).to("meta") for t in (w13, w2)), None, *(t.to("meta") for t in given[4:6]),
                      2, "softmax", 1.0, None, True, 1.0, False, None, [])  # fmt: skip
    assert shaped.shape == (0, 32) and shaped.dtype == F16 and shaped.device.type == "meta"


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: CUDA graphs")
def test_replayed_from_a_cuda_graph() -> None:
    """Routing that differs from the captured one must come out right: no size was frozen."""
    x, w13, w2 = Case("", 64, 16, 8, 256, 128, BF16).weights()
    logits = torch.randn(64, 16, device=DEVICE)
    fused_moe(x, w13, w2, logits, top_k=8)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fused_moe(x, w13, w2, logits, top_k=8)
    for shift in (0.0, 3.0):
        logits.copy_(torch.randn_like(logits) + shift * torch.arange(16, device=DEVICE))
        graph.replay()
        close(out, exact(x, w13, w2, logits.double(), top_k=8))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: sizes the interpreter cannot hold")
@pytest.mark.parametrize("tokens", [1, 16, 128, 1000, 4096])
@pytest.mark.parametrize("experts", [8, 13, 32, 128])
def test_real_sizes(tokens: int, experts: int) -> None:
    """Qwen3-30B-A3B's layer with the default launch, in bf16."""
    case = Case("", tokens, experts, 8, 2048, 768, BF16)
    x, w13, w2 = case.weights()
    logits = case.logits()
    close(fused_moe(x, w13, w2, logits, top_k=8), reference_moe(x, w13, w2, logits, top_k=8).double())


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU: torch.compile for CUDA")
def test_inside_torch_compile() -> None:
    x, w13, w2 = Case("", 17, 8, 2, 128, 64, BF16).weights()
    logits = torch.randn(17, 8, device=DEVICE)

    @torch.compile(fullgraph=True)
    def layer(x: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return fused_moe(x * 1.0, w13, w2, logits, top_k=2) + 0.0

    close(layer(x, logits), exact(x, w13, w2, logits.double(), top_k=2))


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_on_a_gpu_that_is_not_the_current_one() -> None:
    x, w13, w2 = (tensor.to("cuda:1") for tensor in Case("", 17, 8, 2, 128, 64, BF16).weights())
    logits = torch.randn(17, 8, device="cuda:1")
    close(fused_moe(x, w13, w2, logits, top_k=2), exact(x, w13, w2, logits.double(), top_k=2))
    assert torch.cuda.current_device() == 0
