"""leap-serve: find the experts a task needs, cut them out, serve them with vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leap_serve.framework import LEAPFramework, ModelConfig

__version__ = "0.1.0"
__all__ = ["LEAPFramework", "ModelConfig", "__version__"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: importing leap_serve stays instant.
    if name in ("LEAPFramework", "ModelConfig"):
        from leap_serve import framework

        return getattr(framework, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
