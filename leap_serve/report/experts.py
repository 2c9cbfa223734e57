"""Figures of plans: which experts are retained, and how many in each layer."""

from __future__ import annotations

from markupsafe import Markup

from leap_serve.report import charts
from leap_serve.report.figures import Figure
from leap_serve.report.model import ExpertMap, LayerMap, Report, Table
from leap_serve.report.scale import percent


def heat_maps(report: Report) -> list[Figure]:
    """Layers × experts, a figure per plan; experts of each layer from the most to the least salient."""
    return [_heat_map(plan) for plan in report.maps]


def _heat_map(plan: ExpertMap) -> Figure:
    rows = [_row(plan, layer) for layer in plan.layers]
    chart = Markup('<div class="heatmap">{}</div>').format(Markup("").join(rows))
    loads = any(layer.load for layer in plan.layers)
    kept = sum(len(layer.retained) for layer in plan.layers)
    caption = f"{kept} of {plan.num_experts * len(plan.layers)} experts retained."
    if plan.saliency:
        agreed = sum(len(set(_order(plan, la)[: len(la.retained)]) & set(la.retained)) for la in plan.layers)
        caption += f" Shade: {plan.saliency}; by this ranking alone {agreed} of them would be the same."
    if loads:
        caption += f" Height of the marks: share of the tokens that are routed there {plan.loaded}."
    header = ("expert", *(f"layer {layer.index}" for layer in plan.layers))
    body = tuple((str(expert), *(_cell(layer, expert) for layer in plan.layers)) for expert in range(plan.num_experts))
    what = f"Each expert's share of its layer by {plan.saliency}; " if plan.saliency else ""
    table = Table(
        "", header, body, f"{what}● retained{f', with its share of the tokens {plan.loaded}' if loads else ''}"
    )
    return Figure(plan.name, chart, table, caption, wide=True)


def _row(plan: ExpertMap, layer: LayerMap) -> Markup:
    order, retained = _order(plan, layer), set(layer.retained)
    titles = []
    for expert in order:
        text = f"layer {layer.index}, expert {expert}: {'retained' if expert in retained else 'dropped'}"
        text += f", {percent(layer.saliency[expert])} by {plan.saliency}" if layer.saliency else ""
        text += f", {percent(layer.load[expert])} of the tokens {plan.loaded}" if expert in layer.load else ""
        titles.append(text)
    most = max(layer.load.values(), default=0.0) or 1.0
    marks = [
        (layer.load[expert] / most if layer.load else 0.5) if expert in retained else 0.0 for expert in order
    ]  # fmt: skip
    shades = [layer.saliency[expert] if layer.saliency else 0.0 for expert in order]
    boundary = len(layer.retained) if layer.saliency else 0
    return Markup('<div class="layer">layer {}</div>{}').format(
        layer.index, charts.heat(shades, marks, titles, boundary)
    )


def _order(plan: ExpertMap, layer: LayerMap) -> list[int]:
    """Expert ids as they are drawn: by saliency, where it is known, else by number."""
    ids = list(range(plan.num_experts))
    return sorted(ids, key=lambda expert: -layer.saliency[expert]) if layer.saliency else ids


def _cell(layer: LayerMap, expert: int) -> str:
    parts = [percent(layer.saliency[expert], 2)] if layer.saliency else []
    if expert in layer.retained:
        parts.append("●")
        parts += [percent(layer.load[expert], 2)] if expert in layer.load else []
    return " ".join(parts) or "–"


def counts(report: Report) -> list[Figure]:
    """Retained experts and top_k of each layer, a chart per plan whose layers differ."""
    figures = []
    for plan in report.maps:
        rows = [
            (str(layer.index), float(len(layer.retained)), float(layer.top_k),
             f"layer {layer.index}: {len(layer.retained)} experts, top_k {layer.top_k}, τ {layer.temperature:g}")
            for layer in plan.layers
        ]  # fmt: skip
        table = Table(
            "", ("layer", "retained", "top_k", "τ"),
            tuple((str(la.index), str(len(la.retained)), str(la.top_k), f"{la.temperature:g}") for la in plan.layers),
        )  # fmt: skip
        chart = Markup("") if plan.uniform else charts.bars(rows, plan.num_experts, "experts retained, of "
                                                            f"{plan.num_experts}; the mark is top_k")  # fmt: skip
        first = plan.layers[0]
        same = (
            f"Each of the {len(plan.layers)} MoE layers retains {len(first.retained)} of {plan.num_experts} experts, "
            f"top_k {first.top_k}, τ {first.temperature:g}."
        )
        figures.append(Figure(plan.name, chart, table, same if plan.uniform else ""))
    return figures
