"""vLLM's own Triton kernel as a second oracle; in the interpreter where there is no GPU (test_interpreter.py)."""

from __future__ import annotations

import os

import pytest
import torch

from leap_kernels import fused_moe
from leap_kernels.config import KernelConfig, Tile

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
pytestmark = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(),
    reason="needs a GPU, or TRITON_INTERPRET=1: test_interpreter.py runs this file so, in a process of its own",
)


def vllm_moe(
    x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """vLLM's two launches of fused_moe_kernel, one block per slot (its assignment for small batches)."""
    from vllm.model_executor.layers.fused_moe.fused_moe import invoke_fused_moe_triton_kernel
    from vllm.triton_utils import tl

    (tokens, top_k), width = ids.shape, w2.shape[2]
    config = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 16, "BLOCK_SIZE_K": 16, "GROUP_SIZE_M": 1}
    padded = torch.tensor([tokens * top_k * 16], dtype=torch.int32, device=DEVICE)
    kind = {torch.float32: tl.float32, torch.float16: tl.float16}[x.dtype]

    def product(a: torch.Tensor, b: torch.Tensor, weigh: bool, k: int) -> torch.Tensor:
        out = torch.empty(tokens, top_k, b.shape[1], dtype=x.dtype, device=DEVICE)
        invoke_fused_moe_triton_kernel(
            a, b, out, None, None, weights, None, ids.flatten(), padded, weigh, k, config, kind,
            use_fp8_w8a8=False, use_int8_w8a8=False, use_int8_w8a16=False, use_int4_w4a16=False,
            per_channel_quant=False,
        )  # fmt: skip
        return out

    h = product(x, w13, False, top_k).flatten(0, 1)
    h = torch.nn.functional.silu(h[:, :width]) * h[:, width:]
    return product(h, w2, True, 1).sum(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_we_agree_with_vllms_kernel(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    tokens, experts, top_k, hidden, width = 5, 6, 2, 40, 24
    x = torch.randn(tokens, hidden).to(DEVICE, dtype)
    w13 = (torch.randn(experts, 2 * width, hidden) / hidden**0.5).to(DEVICE, dtype)
    w2 = (torch.randn(experts, hidden, width) / width**0.5).to(DEVICE, dtype)
    weights, ids = torch.softmax(torch.randn(tokens, experts), 1).topk(top_k)
    weights, ids = weights.to(DEVICE), ids.to(DEVICE, torch.int32)
    config = KernelConfig(16, 1, Tile(16, 16, 1, 1), Tile(16, 16, 1, 1))
    ours = fused_moe(x, w13, w2, topk_ids=ids, topk_weights=weights, config=config)
    # On tensor cores vLLM's kernel multiplies fp32 as TF32, ten bits a factor; ours never does.
    exact = dtype == torch.float32 and INTERPRETED
    torch.testing.assert_close(ours, vllm_moe(x, w13, w2, ids, weights), rtol=0, atol=1e-5 if exact else 4e-3)
