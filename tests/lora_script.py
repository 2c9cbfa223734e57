"""Run by test_unmerged.py in a process of its own: adapters left to vLLM's LoRA path, on a CPU.

    python lora_script.py PROMPTS FOLDER…

vLLM reads the adapter, makes its own layout of it, keeps it in slots and maps requests to them, all as on a GPU; only
the products, for which it has CUDA kernels alone, are done in torch here. The last line printed is JSON: {FOLDER:
{"cut" | "tuned": log-probabilities [prompts, vocabulary] of the next token after each prompt, without and with it}}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch
from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.punica_wrapper.punica_cpu import PunicaWrapperCPU
from vllm.lora.request import LoRARequest
from vllm.model_executor.layers.fused_moe.experts.triton_moe import TritonExperts
from vllm.platforms import current_platform

from leap_serve.weights.unmerged import VARIABLE
from leap_vllm import experts
from leap_vllm.compat_experts import Chosen


class TorchPunica(PunicaWrapperCPU):
    """ΔW·x of each token by the slot of its request, from the buffers that vLLM filled."""

    def add_lora_w13(
        self, y: Any, x: Any, a: Any, b: Any, topk_ids: Any, topk_weights: Any, expert_map: Any, *_: Any, **__: Any
    ) -> tuple[None, None, None, None]:  # fmt: skip
        assert expert_map is None
        self.ids = topk_ids
        each = x.unsqueeze(1).expand(-1, topk_ids.shape[1], -1)
        y += torch.cat([self.delta(each, *factors) for factors in zip(a, b, strict=True)], dim=-1)
        return None, None, None, None

    def add_lora_w2(self, y: Any, x: Any, a: Any, b: Any, topk_weights: Any, *_: Any, **__: Any) -> None:
        y += self.delta(x, a[0], b[0]) * topk_weights.unsqueeze(-1)

    def delta(self, x: Any, a: Any, b: Any) -> Any:
        """[T, k, out] of x [T, k, in], A [slots, E, r, in] and B [slots, E, out, r]; slot -1 is no adapter."""
        slots = self.token_lora_indices[: len(x)].unsqueeze(1)
        products = torch.einsum("tkor,tkri,tki->tko", b[slots, self.ids], a[slots, self.ids], x)
        return products * (slots >= 0).unsqueeze(-1)


class TorchExperts(TritonExperts):
    """vLLM's class for a GPU, whose products are done in torch, the adapter's by the wrapper above."""

    def apply(
        self, output: Any, hidden_states: Any, w1: Any, w2: Any, topk_weights: Any, topk_ids: Any, *_: Any, **__: Any
    ) -> None:  # fmt: skip
        punica, ids = self._lora_context.punica_wrapper, topk_ids.long()
        context = self._lora_context
        inner = torch.einsum("tkoh,th->tko", w1[ids], hidden_states)
        punica.add_lora_w13(
            inner, hidden_states, context.w13_lora_a_stacked, context.w13_lora_b_stacked, ids, topk_weights, None
        )
        gate, up = inner.chunk(2, dim=-1)
        inner = torch.nn.functional.silu(gate) * up
        found = torch.einsum("tkhi,tki->tkh", w2[ids], inner) * topk_weights.unsqueeze(-1)
        punica.add_lora_w2(found, inner, context.w2_lora_a_stacked, context.w2_lora_b_stacked, topk_weights)
        output.copy_(found.sum(1))


def served(folder: str, prompts: list[list[int]]) -> dict[str, list[list[float]]]:
    """The cut's answers without its adapter and with it."""
    llm = LLM(
        folder, dtype="float32", max_model_len=32, max_num_seqs=8, enforce_eager=True, skip_tokenizer_init=True,
        kv_cache_memory_bytes=16 * 2**20, enable_prefix_caching=False, max_logprobs=-1, load_format="leap",
        enable_lora=True, enable_mixed_moe_lora_format=True, max_lora_rank=8,
    )  # fmt: skip
    wanted = SamplingParams(max_tokens=1, temperature=0.0, logprobs=-1, detokenize=False)
    found = {}
    for name, request in ("cut", None), ("tuned", LoRARequest("tuned", 1, f"{folder}/adapter", is_3d_lora_weight=True)):
        asked = [{"prompt_token_ids": ids} for ids in prompts]
        outputs = llm.generate(asked, wanted, lora_request=request, use_tqdm=False)
        rows = [output.outputs[0].logprobs[0] for output in outputs]
        found[name] = [[row[token].logprob for token in range(len(row))] for row in rows]
    del llm
    cleanup_dist_env_and_memory()
    return found


def main() -> None:
    os.environ[VARIABLE] = "1"
    type(current_platform).get_punica_wrapper = classmethod(lambda _: f"{__name__}.TorchPunica")
    experts._choose = lambda *_: Chosen(TorchExperts, "vllm", None, "a CPU has no kernel for adapters")
    prompts = json.loads(sys.argv[1])
    print(json.dumps({folder: served(folder, prompts) for folder in sys.argv[2:]}))


if __name__ == "__main__":
    main()
