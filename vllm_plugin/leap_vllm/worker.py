"""What our engine asks of a vLLM worker, called by name through collective_rpc."""

from __future__ import annotations

import resource
from collections.abc import Sequence
from typing import Any

import torch

from leap_vllm import compat, compat_experts, compat_runners
from leap_vllm.esp import EspWorker
from leap_vllm.heads import read_heads
from leap_vllm.profiling import Recording
from leap_vllm.shrink import Shrunk
from leap_vllm.subsets import PlainPlan, Subsets


class LeapWorker(EspWorker):
    """Mixed into vLLM's worker class (worker_extension_cls). Names begin with ``leap_`` to stay clear of vLLM's own."""

    model_runner: Any
    leap_recording: Recording | None = None
    leap_subsets: Subsets | None = None
    leap_shrunk: Shrunk | None = None

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
        packed = compat.packed_elements(model) * self.model_runner.dtype.itemsize
        return {"weights": sum(weights.values()) + packed, "kv_cache": sum(cache.values()), "peak": peak}

    def leap_kernels(self) -> list[dict[str, Any]]:
        """Say which kernel each MoE layer runs, with which measured launches, and why."""
        return compat_experts.kernels_of(self.model_runner.get_model())

    def leap_start_profile(self, channels_of: str | None = None) -> None:
        """Begin to record the experts' statistics, with channel sums where the checkpoint's folder is given.

        Raises UnsupportedError where they cannot be seen.
        """
        self.leap_stop_profile()
        self.leap_recording = Recording(self.model_runner.get_model(), channels_of)

    def leap_read_profile(self) -> dict[int, dict[str, bytes]]:
        """Return {MoE layer: {statistic: float64 bytes}} since the start; the same on every rank."""
        assert self.leap_recording is not None, "leap_start_profile comes first"
        return self.leap_recording.read()

    def leap_stop_profile(self) -> None:
        """Take the hooks off; harmless without a recording."""
        if self.leap_recording is not None:
            self.leap_recording.remove()
            self.leap_recording = None

    def leap_load_plans(self, plans: Sequence[PlainPlan]) -> None:
        """Load plans into slots 1, 2, …, hooking the routers on first use; UnsupportedError where that cannot be."""
        self._leap_hooked().load(plans)

    def leap_put_plan(self, slot: int, plan: PlainPlan, head: bytes | None = None) -> int:
        """Load one plan into a slot that no request uses while requests of others run; returns the bytes it takes.

        The first call hooks the routers, so it comes before any request. ``head`` is a router_head.safetensors.
        Raises LeapError, and changes nothing, where plan or head do not fit the model.
        """
        heads = read_heads(head, plan, "router head") if head else {}
        return self._leap_hooked().put(slot, plan, heads)

    def leap_clear_plan(self, slot: int) -> None:
        """Empty a slot that no request uses any more."""
        if self.leap_subsets is not None:
            self.leap_subsets.clear(slot)

    def _leap_hooked(self) -> Subsets:
        if self.leap_subsets is None:
            self.leap_subsets = Subsets(self.model_runner)
            compat_runners.recapture(self.model_runner)
        return self.leap_subsets

    def leap_remove_plans(self) -> None:
        """Take the hooks off; harmless without any."""
        if self._leap_release_plans():
            compat_runners.recapture(self.model_runner)

    def leap_apply(self, plan: PlainPlan) -> None:
        """Shrink the layers to a plan, in place of one before; UnsupportedError where that cannot be."""
        changed = self._leap_release_plans() | self._leap_grow()
        try:
            self.leap_shrunk = Shrunk(self.model_runner, plan)
        finally:
            if changed or self.leap_shrunk is not None:
                compat_runners.recapture(self.model_runner)

    def leap_restore(self) -> None:
        """Make the layers whole again; harmless when they are."""
        if self._leap_grow():
            compat_runners.recapture(self.model_runner)

    def _leap_release_plans(self) -> bool:
        """Take the hooks off; returns whether there were any."""
        found, self.leap_subsets = self.leap_subsets, None
        if found is not None:
            found.remove()
        return found is not None

    def _leap_grow(self) -> bool:
        """Make the layers whole; returns whether they were not."""
        found, self.leap_shrunk = self.leap_shrunk, None
        if found is not None:
            found.restore()
        return found is not None


def _tensors(value: Any) -> list[torch.Tensor]:
    """Flatten the lists and tuples that hold cache tensors."""
    if isinstance(value, torch.Tensor):
        return [value]
    return [tensor for part in value for tensor in _tensors(part)] if isinstance(value, list | tuple) else []
