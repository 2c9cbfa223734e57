"""What engines share that score many plans on one loaded model."""

from __future__ import annotations

from collections.abc import Sequence

from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.rules import check_groups
from leap_serve.errors import LeapError, PlanError, UnsupportedError
from leap_serve.plan import BaseModel, Plan


def check_plans(checkpoint: Checkpoint, identity: BaseModel, plans: Sequence[Plan]) -> None:
    """Raise LeapError unless every plan speaks of this model, which must be whole or cut evenly.

    Args:
        checkpoint: the model that is loaded.
        identity: its checkpoint.identity(), which takes long to read for every plan anew.
        plans: any number.
    """
    if checkpoint.plan is not None and not checkpoint.plan.is_uniform:
        raise UnsupportedError(
            checkpoint.folder, "is cut unevenly, and plans are scored on the model they choose from",
            "open the full model",
        )  # fmt: skip
    experts, layers, top_k = checkpoint.num_experts, checkpoint.moe_layers, checkpoint.top_k
    for number, plan in enumerate(plans):
        where = f"plan {number}"
        if plan.base.sha256 != identity.sha256:
            raise PlanError(
                where, f"was made for {plan.base.id} ({plan.base.sha256[:12]}…), not for {identity.id} "
                f"({identity.sha256[:12]}…)", "open the model it was made for, or search again",
            )  # fmt: skip
        if plan.num_experts != experts or list(plan.layers) != layers:
            raise PlanError(
                where, f"plans {plan.num_experts} experts in layers {list(plan.layers)}, the model has "
                f"{experts} in {layers}", "search again on this model",
            )  # fmt: skip
        if not plan.is_masking:
            raise UnsupportedError(
                where, "skips experts or changes their weights, which a running engine's routers cannot do",
                "cut the model to it, and open that",
            )  # fmt: skip
        for index, layer in plan.layers.items():
            if layer.top_k > top_k:
                raise PlanError(
                    where, f"layer {index} has top_k {layer.top_k}, the model's is {top_k}",
                    f"set top_k[{index}] to {top_k}",
                )  # fmt: skip
        try:
            check_groups(checkpoint, plan)
        except LeapError as error:
            raise PlanError(where, error.what, error.remedy) from None
