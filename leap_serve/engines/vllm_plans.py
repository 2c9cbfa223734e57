"""Plans in a running vLLM: many at once, each request routed by its own, or one applied to the layers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from leap_serve.errors import LeapError, UnsupportedError

if TYPE_CHECKING:
    from leap_serve.engines.vllm_engine import VllmEngine
    from leap_serve.plan import Plan

MAX_PLANS = 64
"""Plans that share the engine at one time."""


@dataclass(frozen=True, slots=True)
class Subset:
    """The plan of one request: the slot it was loaded into, and the salt that keeps its part of the prefix cache apart.

    Without the salt a prompt would find the keys and values that another plan's experts made.
    """

    slot: int
    salt: str | None


def load_plans(engine: VllmEngine, plans: Sequence[Plan]) -> list[Subset]:
    """Check plans and put them into slots 1, 2, …"""
    if len(plans) > MAX_PLANS:
        raise LeapError("plans", f"are {len(plans)}", f"load at most {MAX_PLANS} at a time")
    if engine._applied:
        raise UnsupportedError("plans", "another plan is applied to the layers", "restore them first")
    _check(engine, plans)
    engine._rpc("leap_load_plans", [_plain(plan) for plan in plans])
    # The fingerprint, not the slot: another plan may be in that slot tomorrow.
    return [Subset(slot, plan.fingerprint) for slot, plan in enumerate(plans, 1)]


def apply(engine: VllmEngine, plan: Plan) -> None:
    """Shrink the layers to a plan; keys and values of other experts leave the prefix cache."""
    _check(engine, [plan])
    restore(engine)
    engine._rpc("leap_apply", _plain(plan))
    engine._applied = True
    engine._llm.reset_prefix_cache()


def restore(engine: VllmEngine) -> None:
    """Make the layers whole again."""
    if engine._applied:
        engine._rpc("leap_restore")
        engine._applied = False
        engine._llm.reset_prefix_cache()


def _check(engine: VllmEngine, plans: Sequence[Plan]) -> None:
    import torch

    from leap_serve.engines.subsets import check_plans

    # On a GPU the workers know better: vLLM's V2 runner captures its graphs anew.
    if not engine.enforce_eager and not torch.cuda.is_available():
        raise UnsupportedError("plans", "the engine runs compiled graphs", "open it with enforce_eager=True")
    engine._identity = engine._identity or engine.checkpoint.identity()
    check_plans(engine.checkpoint, engine._identity, plans)


def _plain(plan: Plan) -> dict[int, tuple[list[int], int, float]]:
    """The plan as data that crosses processes."""
    return {index: (list(layer.retained), layer.top_k, layer.temperature) for index, layer in plan.layers.items()}
