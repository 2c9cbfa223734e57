"""Run by test_experts.py in a process of its own: the same prompts with our kernel in vLLM's layers and with vLLM's.

    python kernel_script.py MODEL…

The last line printed is JSON: {"ours" | "vllm": {model: {"kernels", "logprobs"}}}.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from vllm import LLM, SamplingParams
from vllm.distributed import cleanup_dist_env_and_memory

PROMPTS = [list(range(3, 14)), [7], [9, 4, 5]]


def served(model: str) -> dict[str, Any]:
    """Which kernels the engine says it has, and the log-probabilities of its next token after each prompt."""
    llm = LLM(
        model, dtype="float32", max_model_len=32, max_num_batched_tokens=32, max_num_seqs=4, enforce_eager=True,
        kv_cache_memory_bytes=16 * 2**20, skip_tokenizer_init=True, enable_prefix_caching=False, max_logprobs=-1,
        worker_extension_cls="leap_vllm.worker.LeapWorker",
    )  # fmt: skip
    net = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner.model
    built = [getattr(getattr(module, "quant_method", None), "moe_kernel", None) for module in net.modules()]
    classes = {type(kernel.fused_experts).__name__ for kernel in built if kernel is not None}
    kernels = llm.collective_rpc("leap_kernels")[0]
    assert {one["experts_class"] for one in kernels} == classes, "what is told is not what was built"
    wanted = SamplingParams(max_tokens=2, temperature=0.0, logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in PROMPTS], wanted, use_tqdm=False)
    rows = [[row[token].logprob for token in range(len(row))] for out in outputs for row in out.outputs[0].logprobs]
    cleanup_dist_env_and_memory()
    return {"kernels": kernels, "logprobs": rows}


def main() -> None:
    found: dict[str, Any] = {}
    for wanted in ("ours", "vllm"):
        os.environ["LEAP_KERNEL"] = wanted
        found[wanted] = {model: served(model) for model in sys.argv[1:]}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
