"""Private names of vLLM's two model runners by which prompts can be watched. Part of compat.py, read against the same releases."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from leap_vllm.compat import check_signatures, replace_method
from leap_vllm.compat_runners import check_runner, is_v2

V1_PROBES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._get_prompt_logprobs_dict": (
        "hidden_states", "num_scheduled_tokens",
    ),
}  # fmt: skip
V2_PROBES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request": ("req_index", "new_req_data"),
    "vllm.v1.worker.gpu.sample.prompt_logprob:PromptLogprobsWorker.compute_prompt_logprobs": (
        "logits_fn", "hidden_states", "input_batch",
    ),
    "vllm.v1.worker.gpu.input_batch:InputBatch": (
        "idx_mapping_np", "num_scheduled_tokens", "query_start_loc_np", "num_computed_prefill_tokens_np",
    ),
}  # fmt: skip
"""Callable in vLLM → parameters that we rely on."""


class Prefilled(NamedTuple):
    """A request in one step: its prompt and extra_args, how many tokens came before, how many now, from which row on."""

    prompt: list[int]
    extra: Mapping[str, Any]
    start: int
    tokens: int
    row: int


See = Callable[[torch.Tensor, list[Prefilled]], None]
"""Called after every step with its hidden states [T, H] and requests, in the same order on all tensor-parallel ranks."""


def observe_prompts(runner: Any, see: See) -> Callable[[], None]:
    """Call ``see`` after every step; returns what ends that. Raises UnsupportedError as plans do."""
    check_runner(runner)
    v2 = is_v2(runner)
    check_signatures(V2_PROBES if v2 else V1_PROBES)
    return (_observe_v2 if v2 else _observe_v1)(runner, see)


def _observe_v1(runner: Any, see: See) -> Callable[[], None]:
    stock = runner._get_prompt_logprobs_dict

    def get_prompt_logprobs_dict(hidden_states: torch.Tensor, num_scheduled_tokens: Mapping[str, int]) -> Any:
        step = []
        for name, tokens in num_scheduled_tokens.items():
            request, at = runner.requests[name], runner.input_batch.req_id_to_index[name]
            extra = (request.sampling_params.extra_args if request.sampling_params is not None else None) or {}
            row = int(runner.query_start_loc.np[at])
            step.append(Prefilled(request.prompt_token_ids, extra, request.num_computed_tokens, tokens, row))
        see(hidden_states, step)
        return stock(hidden_states, num_scheduled_tokens)

    return replace_method(runner, "_get_prompt_logprobs_dict", get_prompt_logprobs_dict)


def _observe_v2(runner: Any, see: See) -> Callable[[], None]:
    state, worker = runner.model_state, runner.prompt_logprobs_worker
    add, compute = state.add_request, worker.compute_prompt_logprobs
    known: dict[int, tuple[list[int], Mapping[str, Any]]] = {}

    def add_request(req_index: int, new_req_data: Any) -> None:
        params = new_req_data.sampling_params
        known[req_index] = new_req_data.prompt_token_ids, (params.extra_args if params is not None else None) or {}
        add(req_index, new_req_data)

    def compute_prompt_logprobs(logits_fn: Any, hidden_states: torch.Tensor, input_batch: Any, *args: Any) -> Any:
        step = []
        for place, index in enumerate(input_batch.idx_mapping_np.tolist()):
            # Requests begun before the hook are not known, and none of theirs is asked for.
            prompt, extra = known.get(index, ([], {}))
            at = (
                input_batch.num_computed_prefill_tokens_np,
                input_batch.num_scheduled_tokens,
                input_batch.query_start_loc_np,
            )
            step.append(Prefilled(prompt, extra, *(int(values[place]) for values in at)))
        see(hidden_states, step)
        return compute(logits_fn, hidden_states, input_batch, *args)

    undo = [
        replace_method(state, "add_request", add_request),
        replace_method(worker, "compute_prompt_logprobs", compute_prompt_logprobs),
    ]

    def take_off() -> None:
        for one in undo:
            one()

    return take_off
