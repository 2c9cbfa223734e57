"""The engine that ``--engine`` names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leap_serve.torch_engine import TorchEngine
    from leap_serve.vllm_engine import VllmEngine


def open_engine(name: str, model: str, dtype: str) -> VllmEngine | TorchEngine:
    """Load a model into "vllm" (the engine that serves) or "torch" (the reference); only that one is imported."""
    if name == "vllm":
        from leap_serve.vllm_engine import VllmEngine

        return VllmEngine(model, dtype=dtype)
    from leap_serve.torch_engine import TorchEngine

    return TorchEngine(model, dtype=dtype)
