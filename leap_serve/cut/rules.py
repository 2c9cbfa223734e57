"""Whether a plan fits a model, and which bytes of it the cut consists of."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from leap_serve.architectures import Role, role_of, text_config
from leap_serve.checkpoint import Checkpoint, check_cut, check_experts, check_rows, is_shared_scale, router_tail
from leap_serve.errors import CheckpointError, PlanError, UnsupportedError
from leap_serve.plan import Plan
from leap_serve.weights.tensorfile import Made, Piece, TensorEntry, read_header

Retained = Mapping[int, Sequence[int]]
"""Layer, MTP layers included → retained ids in the source."""
OURS: Mapping[str, tuple[str, str]] = {
    "counts": ("retains more experts in some layers than in others", "retain equally many (--allocation uniform)"),
    "top_k": ("has a higher top_k in some layers than in others", "have the same in all"),
    "widths": ("narrows experts more in some layers than in others", "keep equally many channels in all"),
    "τ": ("has a router temperature other than 1", "leave --temperature out"),
    "skip": ("skips experts", "leave --skip out"),
    "merge": ("merges experts", "choose a --method that merges none"),
}
"""What only our architecture serves: what such a plan does, and what to do instead."""


def open_source(model: Path) -> Checkpoint:
    """Open a model to be cut and check that it is whole."""
    source = Checkpoint.open(model)
    if source.plan is None:
        check_experts(source)
        return source
    check_cut(source)
    check_untuned(source)
    return source


def check_untuned(source: Checkpoint) -> None:
    """Raise UnsupportedError where tuned parts lie beside the weights: what is cut from these, or tuned, would lose them."""
    if source.overlays:
        raise UnsupportedError(
            source.overlays[0], "is tuned for the experts of this cut and would not fit another",
            "merge it with leap export first, or cut the model before it is tuned",
        )  # fmt: skip


def fit(source: Checkpoint, plan: Plan) -> tuple[Plan, Retained]:
    """Check that a plan fits a model; return the plan with the model's own τ in it, and the ids per layer with MTP."""
    _check_plan(source, plan)
    if source.plan is not None and any(
        layer.skip is not None or layer.merge is not None or layer.channels for layer in source.plan.layers.values()
    ):
        raise UnsupportedError(
            source.folder,
            "skips, merges or narrows experts, which a second cut would lose",
            "cut the full model instead",
        )
    if source.plan is not None:
        before = source.plan.layers
        layers = {
            index: replace(layer, temperature=layer.temperature * before[index].temperature)
            for index, layer in plan.layers.items()
            if index in before
        }
        plan = replace(plan, layers={**plan.layers, **layers})
    retained: dict[int, Sequence[int]] = {index: layer.retained for index, layer in plan.layers.items()}
    last = plan.layers[source.moe_layers[-1]].retained
    retained |= {index: last for index in source.mtp_layers if index not in retained}
    for index, ids in retained.items():
        held = source.experts_in(index)
        if ids[-1] >= held:
            what = f"layer {index} retains expert {ids[-1]}, but the model's layer holds {held}"
            raise PlanError("plan", what, "search again on this model")
    check_groups(source, plan)
    return plan, retained


def _check_plan(source: Checkpoint, plan: Plan) -> None:
    identity = source.identity()
    if plan.base.sha256 != identity.sha256:
        raise PlanError(
            "plan", f"was made for {plan.base.id} ({plan.base.sha256[:12]}…), not for {identity.id} "
            f"({identity.sha256[:12]}…)", "give the model it was made for, or search again",
        )  # fmt: skip
    if plan.num_experts != source.num_experts:
        what = f"says {plan.num_experts} experts, the model has {source.num_experts}"
        raise PlanError("plan", what, "search again on this model")
    unplanned = [layer for layer in source.moe_layers if layer not in plan.layers]
    unknown = [layer for layer in plan.layers if layer not in source.moe_layers + source.mtp_layers]
    if unplanned or unknown:
        what = (
            f"leaves MoE layers {unplanned} unplanned"
            if unplanned
            else f"plans layers {unknown}, which hold no experts"
        )
        raise PlanError("plan", what, f"plan the MoE layers {source.moe_layers}")
    for index, layer in plan.layers.items():
        before = source.plan.layers[index].top_k if source.plan and index in source.plan.layers else source.top_k
        if layer.top_k > before:
            what = f"layer {index} has top_k {layer.top_k}, the model's is {before}"
            raise PlanError("plan", what, f"set top_k[{index}] to {min(before, len(layer.retained))}")


def check_groups(source: Checkpoint, plan: Plan) -> None:
    """Raise PlanError unless group-limited routing still works: equally many retained experts in every group.

    A group is E / n_group consecutive experts; the router first chooses topk_group of the groups.
    """
    if source.family.group_keys is None:
        return
    text = text_config(source.config)
    groups, chosen = (text.get(key) or 1 for key in source.family.group_keys)
    if groups <= 1 or text.get("topk_method") == "greedy":
        return
    # With a correction bias, a group is ranked by the sum of its two best experts.
    least = 2 if source.family.router_kind == "sigmoid-bias" else 1
    for index, layer in plan.layers.items():
        size = source.experts_in(index) // groups
        held = [sum(1 for i in layer.retained if i // size == group) for group in range(groups)]
        if len(layer.retained) % groups:
            what = f"layer {index} retains {len(layer.retained)} experts, which {groups} routing groups do not divide"
        elif len(set(held)) > 1:
            what = f"layer {index} retains {held} experts of its {groups} routing groups, not equally many of each"
        elif chosen * held[0] < layer.top_k:
            what = f"layer {index} retains {held[0]} per group: too few for top_k {layer.top_k} from {chosen} groups"
        elif held[0] < least:
            what = f"layer {index} retains {held[0]} per group, and a group is ranked by its two best"
        else:
            continue
        raise PlanError("plan", what, "retain equally many experts of every group, and enough for top_k")


def architecture_of(source: Checkpoint, plan: Plan) -> str:
    """Return the architecture name of the cut; raise UnsupportedError where nobody could serve it.

    Equal counts and top_k and every τ = 1: a stock engine holds it, so the stock name. Otherwise our
    name, so that a stock engine refuses instead of misreading.
    """
    family = source.family
    stated = str((source.config.get("architectures") or [family.architecture])[0])
    if plan.is_uniform:
        return family.architecture if stated == family.leap_architecture else stated
    check_served(source, beyond_stock(plan))
    return family.leap_architecture


def beyond_stock(plan: Plan) -> tuple[str, ...]:
    """Return what of a plan no stock engine holds, keys of OURS; nothing of a uniform plan."""
    layers = plan.layers.values()
    found = {
        "counts": len({len(layer.retained) for layer in layers}) > 1,
        "top_k": len({layer.top_k for layer in layers}) > 1,
        "widths": len({layer.width for layer in layers}) > 1,
        "τ": any(layer.temperature != 1.0 for layer in layers),
        "skip": any(layer.skip is not None for layer in layers),
        "merge": any(layer.merge is not None for layer in layers),
    }
    return tuple(form for form in OURS if found[form])


def check_served(source: Checkpoint, forms: Collection[str], remedy: str | None = None) -> None:
    """Raise UnsupportedError where no engine serves a model cut by a plan of these forms (keys of OURS).

    Searches ask before they load the model. ``remedy``: in place of what there is to do instead of each form.
    """
    family = source.family
    stated = str((source.config.get("architectures") or [family.architecture])[0])
    if not forms or (family.vllm is not None and stated in (family.architecture, family.leap_architecture)):
        return
    what = f"no engine serves {stated} ({family.model_type}) cut by a plan that "
    what += " and ".join(OURS[form][0] for form in forms)
    raise UnsupportedError(source.folder, what, remedy or ", and ".join(OURS[form][1] for form in forms))


def unfit_expert(source: Checkpoint, fits: Callable[[Role, TensorEntry], bool]) -> str:
    """Return which expert tensor of the MoE layers does not fit, with dtype and shape; nothing where all do."""
    for name, entry in source.tensors.items():
        role = source.role(name)
        if role.layer in source.moe_layers and role.kind in ("expert", "fused") and not fits(role, entry):
            return f"{name} ({entry.dtype} {list(entry.shape)})"
    return ""


def new_ids(retained: Retained) -> dict[int, dict[int, int]]:
    """Return layer → {id in the source: id in the cut}."""
    return {layer: {old: new for new, old in enumerate(ids)} for layer, ids in retained.items()}


def cut_pieces(source: Checkpoint, plan: Plan, retained: Retained) -> list[Piece | Made]:
    """Return every tensor of the cut, in the order of the source; raises where the plan's changes cannot be made."""
    from leap_serve.cut.remake import Remaker  # brings numpy, which looking at a checkpoint does without

    heads = source.head_tails()
    renamed = new_ids(retained)
    remaker = Remaker.of(source, plan)
    mapped = {index for index, layer in plan.layers.items() if layer.maps_router}
    pieces: list[Piece | Made] = []
    for name, entry in source.tensors.items():
        role = source.role(name)
        if role.kind == "expert":
            if role.expert in renamed[role.layer]:
                slot = renamed[role.layer][role.expert]
                pieces.append(remaker.piece(name, entry, role, slot) or Piece.whole(entry, role.renamed(slot)))
        elif role.kind == "fused" and not is_shared_scale(entry):
            pieces.append(remaker.piece(name, entry, role) or Piece.sliced(entry, retained[role.layer]))
        elif (
            role.kind == "router" and role.layer not in mapped and router_tail(source.family, name) in heads[role.layer]
        ):
            pieces.append(Piece.sliced(entry, retained[role.layer]))
        else:
            pieces.append(Piece.whole(entry))
    return pieces


def optimizer_pieces(source: Checkpoint, path: Path, retained: Retained) -> list[Piece]:
    """Return the tensors of the cut optimizer state.

    Its names hold parameter names (``exp_avg.<name>``, ``<name>.exp_avg``), per expert or fused, whatever
    the layout of the checkpoint; a scalar (``<name>.step``) of fused experts is kept.
    """
    heads = source.head_tails()
    renamed = new_ids(retained)
    pieces: list[Piece] = []
    experts = 0
    for name, entry in read_header(path)[0].items():
        role = _optimizer_role(source, name)
        if (role.kind != "other" and role.layer not in renamed) or role.expert >= source.experts_in(role.layer):
            raise CheckpointError(path, f"{name} is of an expert that the model does not have", "give its own state")
        experts += role.kind in ("expert", "fused")
        if role.kind == "expert":
            if role.expert in renamed[role.layer]:
                pieces.append(Piece.whole(entry, role.renamed(renamed[role.layer][role.expert])))
        elif entry.elements > 1 and (
            role.kind == "fused" or (role.kind == "router" and _of_head(source, name, heads[role.layer]))
        ):
            check_rows(entry, role, source.experts_in(role.layer))
            pieces.append(Piece.sliced(entry, retained[role.layer]))
        else:
            pieces.append(Piece.whole(entry))
    if not experts:
        raise CheckpointError(path, "holds no state of any expert", "give the optimizer state of this model")
    return pieces


def _optimizer_role(source: Checkpoint, name: str) -> Role:
    # transformers 5 holds Mixtral's block as ``mlp`` in memory, where a state takes its names from.
    for family in (source.family, replace(source.family, block="mlp")):
        role = role_of(family, name, source.num_hidden_layers)
        if role.kind != "other":
            return role
    if ".experts." in name:
        raise UnsupportedError(source.folder, f"cannot tell whose expert {name} is", "name it as the model does")
    return role


def _of_head(source: Checkpoint, name: str, head: frozenset[str]) -> bool:
    """Whether a router's state belongs to the affine head that has one row per expert."""
    tail = name.rpartition(f".{source.family.router}.")[2]
    return any(tail == wanted or tail.startswith(f"{wanted}.") for wanted in head)
