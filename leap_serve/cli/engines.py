"""The engine that ``--engine`` names, and the dtype that plans are compared in."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leap_serve.engine import Engine
    from leap_serve.engines.torch_engine import TorchEngine
    from leap_serve.engines.vllm_engine import VllmEngine


def open_engine(name: str, model: str, dtype: str) -> VllmEngine | TorchEngine:
    """Load a model into "vllm" (the engine that serves) or "torch" (the reference); only that one is imported."""
    if name == "vllm":
        from leap_serve.engines.vllm_engine import VllmEngine

        return VllmEngine(model, dtype=dtype)
    from leap_serve.engines.torch_engine import TorchEngine

    return TorchEngine(model, dtype=dtype)


def scoring_dtype(given: str | None) -> str:
    """The dtype to compare plans in: float32 on a CPU, where bfloat16 moves a plan's loss by up to 0.3 nats."""
    if given is not None:
        return given
    import torch

    return "auto" if torch.cuda.is_available() else "float32"


class LazyEngine:
    """An engine that is opened when it is first asked for, and again after it was closed."""

    def __init__(self, name: str, model: str, dtype: str) -> None:
        self._how = (name, model, dtype)
        self._engine: Engine | None = None

    def __enter__(self) -> LazyEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __call__(self) -> Engine:
        """The engine."""
        if self._engine is None:
            self._engine = open_engine(*self._how)
        return self._engine

    def close(self) -> None:
        """Free the model, if one is loaded."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None
