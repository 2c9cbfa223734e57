"""What our engine asks of a vLLM worker, called by name through collective_rpc."""

from __future__ import annotations

import resource
from typing import Any

import torch


class LeapWorker:
    """Mixed into vLLM's worker class (worker_extension_cls). Names begin with ``leap_`` to stay clear of vLLM's own."""

    model_runner: Any

    def leap_memory(self) -> dict[str, int]:
        """Return bytes: {"weights": parameters, "kv_cache": cache, "peak": peak GPU memory, or resident set on CPU}."""
        model = self.model_runner.get_model()
        weights = {p.untyped_storage().data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
        cache = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(self.model_runner.kv_caches)
        }
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {"weights": sum(weights.values()), "kv_cache": sum(cache.values()), "peak": peak}


def _tensors(value: Any) -> list[torch.Tensor]:
    """Flatten the lists and tuples that hold cache tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []
