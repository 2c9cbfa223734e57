"""Private names of vLLM's two model runners: V1 (all that a CPU has without a Triton for it) and V2 (the GPU's default).

Part of compat.py, and read against the same releases: what tells a step's tokens apart by request, and
what captures CUDA graphs anew. R requests in a step, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from leap_serve.errors import UnsupportedError
from leap_vllm.compat import check_signatures, replace_method

V1_PROBES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner._prepare_inputs": ("scheduler_output", "num_scheduled_tokens"),
}
V2_PROBES: Mapping[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu.model_states.interface:ModelState.add_request": ("req_index", "new_req_data"),
    "vllm.v1.worker.gpu.model_states.interface:ModelState.prepare_inputs": ("input_batch", "req_states"),
    "vllm.v1.worker.gpu.input_batch:InputBatch": ("idx_mapping_np", "num_scheduled_tokens"),
    "vllm.v1.worker.gpu.model_runner:GPUModelRunner.capture_model": (),
    "vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager.needs_capture": (),
    "vllm.compilation.cuda_graph:CUDAGraphWrapper.clear_all_graphs": (),
    "vllm.compilation.breakable_cudagraph:BreakableCUDAGraphWrapper.clear_all_graphs": (),
}
"""Callable in vLLM → parameters that we rely on."""
SlotOf = Callable[[Mapping[str, Any]], int]
"""A request's extra_args → its slot, 0 for none."""
BeforeStep = Callable[[npt.NDArray[np.int64], npt.NDArray[np.integer[Any]]], None]
"""Called with the slots [R] and token counts [R] of a step, in the batch's order, before its forward pass."""


def is_v2(runner: Any) -> bool:
    """Whether a model runner is of the second kind."""
    return hasattr(runner, "model_state")


def check_runner(runner: Any) -> None:
    """Raise UnsupportedError unless tokens of this model runner can be told apart by request, in every step."""
    v2 = is_v2(runner)
    check_signatures(V2_PROBES if v2 else V1_PROBES)
    if not v2 and not hasattr(runner, "_prepare_inputs"):
        raise UnsupportedError(
            "plans", f"{type(runner).__name__} is no model runner that we know", "serve on a CPU or a CUDA GPU"
        )
    parallel = runner.parallel_config
    if not runner.model_config.enforce_eager and not (v2 and torch.cuda.is_available()):
        raise UnsupportedError(
            "plans", "the engine runs compiled graphs, which only vLLM's V2 runner on a GPU captures anew",
            "open it with enforce_eager=True",
        )  # fmt: skip
    if parallel.use_ubatching:
        raise UnsupportedError("plans", "micro-batches overlap (DBO)", "start the engine without enable_dbo")
    if runner.speculative_config is not None:
        raise UnsupportedError("plans", "tokens are drafted by another model", "start without speculative decoding")
    if parallel.pipeline_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise UnsupportedError(
            "plans", f"pipeline parallel {parallel.pipeline_parallel_size}, prefill context parallel "
            f"{parallel.prefill_context_parallel_size}", "use tensor parallelism only",
        )  # fmt: skip
    if runner.cache_config.kv_sharing_fast_prefill:
        raise UnsupportedError(
            "plans", "later layers see fewer tokens (KV sharing)", "start without --kv-sharing-fast-prefill"
        )


def follow_requests(runner: Any, slot_of: SlotOf, before_step: BeforeStep) -> Callable[[], None]:
    """Call ``before_step`` before every forward pass; returns what ends that. Requests begun earlier have slot 0."""
    return (_follow_v2 if is_v2(runner) else _follow_v1)(runner, slot_of, before_step)


def _extra(request: Any) -> Mapping[str, Any]:
    """extra_args of a new request; pooling requests have no sampling parameters."""
    return (request.sampling_params.extra_args if request.sampling_params is not None else None) or {}


def _follow_v1(runner: Any, slot_of: SlotOf, before_step: BeforeStep) -> Callable[[], None]:
    stock, named = runner._prepare_inputs, dict[str, int]()

    def prepare_inputs(scheduler_output: Any, num_scheduled_tokens: Any, *args: Any, **kwargs: Any) -> Any:
        prepared = stock(scheduler_output, num_scheduled_tokens, *args, **kwargs)
        if scheduler_output.scheduled_new_reqs:
            # Only now may anything have to be forgotten, so that steps without news cost next to nothing.
            for ended in named.keys() - runner.requests.keys():
                del named[ended]
            named.update({request.req_id: slot_of(_extra(request)) for request in scheduler_output.scheduled_new_reqs})
        # Afterwards, since the batch may be reordered while its inputs are prepared.
        slots = np.fromiter((named.get(name, 0) for name in runner.input_batch.req_ids), np.int64)
        before_step(slots, num_scheduled_tokens)
        return prepared

    return replace_method(runner, "_prepare_inputs", prepare_inputs)


def _follow_v2(runner: Any, slot_of: SlotOf, before_step: BeforeStep) -> Callable[[], None]:
    """Hook the two methods that vLLM gives a model's own ModelState (``get_model_state_cls``), on the one that is live.

    A class of ours would have to be in place before the model is loaded, and stock architectures have none.
    """
    state, slots = runner.model_state, np.zeros(runner.max_num_reqs, dtype=np.int64)
    add, prepare = state.add_request, state.prepare_inputs

    def add_request(req_index: int, new_req_data: Any) -> None:
        slots[req_index] = slot_of(_extra(new_req_data))
        add(req_index, new_req_data)

    def prepare_inputs(input_batch: Any, req_states: Any) -> Any:
        before_step(slots[input_batch.idx_mapping_np], input_batch.num_scheduled_tokens)
        return prepare(input_batch, req_states)

    hooks = {"add_request": add_request, "prepare_inputs": prepare_inputs}
    undo = [replace_method(state, name, hook) for name, hook in hooks.items()]

    def take_off() -> None:
        for one in undo:
            one()

    return take_off


def copy_to(buffer: torch.Tensor, values: npt.NDArray[np.int64]) -> None:
    """Write values [n] over the first n elements of a buffer on any device, in the order of its stream."""
    from vllm.utils.torch_utils import async_tensor_h2d

    async_tensor_h2d(values, out=buffer[: len(values)])


def captures_graphs(runner: Any) -> bool:
    """Whether steps may be replays of CUDA graphs, in which no Python of ours runs."""
    return not runner.model_config.enforce_eager


def recapture(runner: Any) -> None:
    """Capture a V2 runner's CUDA graphs anew, with the routers and experts as they are now; nothing where there are none.

    Should it fail, steps run without graphs: slower, and right.
    """
    manager = getattr(runner, "cudagraph_manager", None)
    if manager is None or not captures_graphs(runner) or not manager.needs_capture():
        return
    from vllm.compilation.breakable_cudagraph import BreakableCUDAGraphWrapper
    from vllm.compilation.cuda_graph import CUDAGraphWrapper
    from vllm.config import set_current_vllm_config

    torch.cuda.synchronize()
    # PyTorch may not reuse a memory pool that its last graph has left: the old ones live until there are new ones.
    held = [
        dict(manager.graphs),
        *(dict(wrapper.concrete_cudagraph_entries) for wrapper in CUDAGraphWrapper._all_instances),
        *(dict(wrapper.entries) for wrapper in BreakableCUDAGraphWrapper._all_instances),
    ]
    manager.graphs.clear()
    manager._graphs_captured = False
    CUDAGraphWrapper.clear_all_graphs()
    BreakableCUDAGraphWrapper.clear_all_graphs()
    with set_current_vllm_config(runner.vllm_config):
        runner.capture_model()
    held.clear()
