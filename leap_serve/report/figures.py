"""From what is known to figures: a chart, one sentence on how to read it, and its numbers as a table."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from leap_serve.report import charts
from leap_serve.report.model import Curve, Interval, Learning, Methods, Model, Report, Score, Table
from leap_serve.report.scale import figure, percent

MARKS = (1, 10, 25, 50, 100, 250, 500, 1000, 2500, 5000, 10000)
"""Numbers of evaluations at which the tables of searches have a column."""
STYLES = {"leap": 0, "full": 8}
"""Lines of these kinds of models look the same in every chart (s0 and s8 of style.css)."""
EXACT = "exact answers, teacher-forced, %"
COLOURS = 7
"""Lines of one chart that have a colour of their own, the agent's included."""


@dataclass(frozen=True, slots=True)
class Figure:
    """A chart with its numbers; ``wide`` ones take the whole width of the page, ``first`` ones begin a row."""

    title: str
    chart: Markup
    table: Table
    caption: str = ""
    wide: bool = False
    first: bool = False


@dataclass(frozen=True, slots=True)
class Cost:
    """A cost of serving: how it is called, and what it is of a model (in the unit of the name)."""

    name: str
    of: Callable[[Model], Interval | None]


def compared(model: Model) -> bool:
    """Whether a model belongs into the comparison of all: it was scored or timed, and not for a bench of its own."""
    return bool(model.scores or model.tpot_ms) and not model.group


def bytes_unit(report: Report) -> tuple[str, float]:
    """GiB, or MiB where everything is small; and how many bytes that is."""
    largest = max((model.weights_bytes or 0 for model in report.models.values() if compared(model)), default=0)
    return ("GiB", 2.0**30) if largest >= 0.1 * 2**30 else ("MiB", 2.0**20)


def costs(report: Report) -> list[Cost]:
    """Latency at the largest batch that all timed models share, weights, and FLOPs per token."""
    unit, size = bytes_unit(report)
    timed = [set(model.tpot_ms) for model in report.models.values() if model.tpot_ms and model.scores]
    shared = set.intersection(*timed) if timed else set()
    found = [
        Cost(f"weights, {unit}", lambda m: Interval(m.weights_bytes / size) if m.weights_bytes else None),
        Cost("MFLOPs per token", lambda m: Interval(m.flops_per_token / 1e6) if m.flops_per_token else None),
    ]
    if shared:
        batch = max(shared)
        found.insert(0, Cost(f"TPOT ms at batch {batch}", lambda m: m.tpot_ms.get(batch)))
    return found


def tasks(report: Report) -> list[str]:
    """All tasks that something was scored on, in the order met."""
    return list(dict.fromkeys(task for model in report.models.values() for task in model.scores))


def trade_offs(report: Report) -> list[Figure]:
    """Quality against every cost, a chart per task and cost; only where two models can be compared."""
    figures: list[Figure] = []
    for task in tasks(report):
        begin = len(figures)
        for cost in costs(report):
            known = [
                (model, at, model.scores[task])
                for model in report.models.values()
                if task in model.scores and (at := cost.of(model)) is not None
            ]
            if len(known) > 1:
                figures.append(_trade_off(task, cost.name, known, len(figures) == begin))
    return figures


def _trade_off(task: str, cost: str, known: Sequence[tuple[Model, Interval, Score]], first: bool) -> Figure:
    """One chart: every model's quality and cost."""
    shares = known[0][2].share
    points = [(at.value, score.score.value if shares else -score.score.value) for _, at, score in known]
    best = [not any(_dominates(other, own) for other in points) for own in points]
    dots = [
        charts.Dot(at, score.score, _short(model), model.kind, front,
                   f"{model.name}: {written(score)}, {figure(at.value)} {cost}")
        for (model, at, score), front in zip(known, best, strict=True)
    ]  # fmt: skip
    metric = f"{task}, {known[0][2].metric}{', %' if shares else ''}"
    rows = tuple(
        (model.name, spread(score.score, _writer(score)), spread(at), "yes" if front else "no")
        for (model, at, score), front in zip(known, best, strict=True)
    )
    table = Table("", ("model", metric, cost, "on the front"), rows)
    return Figure(f"{task} against {cost}", charts.scatter(dots, cost, metric, shares=shares), table, first=first)


def score_ranges(report: Report) -> list[Figure]:
    """Every model's score on a task, with its interval."""
    figures = []
    for task in tasks(report):
        known = [(model, model.scores[task]) for model in report.models.values() if task in model.scores]
        shares = known[0][1].share
        rows = [(_short(m), s.score, m.kind, f"{m.name}: {spread(s.score, _writer(s))}") for m, s in known]
        table = Table(
            "", ("model", "score", "95 % interval", "less the full model", "loss, nats", "items"),
            tuple(
                (m.name, written(s), ends(s.score, _writer(s)), _difference(s.difference),
                 figure(s.loss) if s.loss is not None else "–", str(s.items or "–"))
                for m, s in known
            ),
        )  # fmt: skip
        x_title = f"{known[0][1].metric}{', %' if shares else ', less is better'}"
        figures.append(Figure(task, charts.ranges(rows, x_title, shares=shares), table))
    return figures


def gates(report: Report) -> list[Figure]:
    """What pruning cost outside of its task, against what was allowed."""
    figures = []
    for gate in report.gates:
        rows: list[tuple[str, Interval, Methods, str]] = []
        for one in gate.bounds:
            used = one.observed.over(one.bound if one.bound > 0 else 1.0)
            what = one.name.removeprefix("max ").removesuffix(" increase").removesuffix(" drop")
            name = f"{_clipped(one.check, 15)}: {what}"
            title = f"{one.check}, {one.name}: {spread(one.observed)}, allowed {figure(one.bound)}"
            rows.append((name, used, "leap" if one.kept else "broken", title))
        table = Table(
            "", ("check", "bound", "observed", "allowed", "verdict"),
            tuple((one.check, one.name, spread(one.observed), figure(one.bound), "kept" if one.kept else "broken")
                  for one in gate.bounds),
        )  # fmt: skip
        verdict = "passes the gate" if gate.passed else "is stopped at the gate"
        chart = charts.ranges(rows, "share of what is allowed", shares=False, limit=1.0)
        quoted = [f"{check}, {why}: «{text}»" for check, why, text in gate.examples]
        caption = f"Degenerate answers: {'; '.join(quoted)}." if quoted else ""
        figures.append(Figure(f"{gate.model} {verdict}", chart, table, caption))
    return figures


def latencies(report: Report) -> list[Figure]:
    """TPOT over the batch, where a group of models was timed at several batches."""
    figures = []
    for group in dict.fromkeys(model.group for model in report.models.values()):
        timed = [m for m in report.models.values() if m.group == group and len(m.tpot_ms) > 1]
        if len(timed) < 2:
            continue
        others = itertools.count(1)
        lines = []
        for model in timed:
            style = STYLES[model.kind] if model.kind in STYLES else min(next(others), COLOURS - 1)
            points = sorted((float(batch), ms.value) for batch, ms in model.tpot_ms.items())
            lines.append(charts.Line(_short(model), points, style, f"{model.name}: TPOT by batch"))
        batches = sorted({batch for m in timed for batch in m.tpot_ms})
        table = Table(
            "", ("model", *(f"batch {batch}" for batch in batches)),
            tuple((m.name, *(spread(m.tpot_ms[b]) if b in m.tpot_ms else "–" for b in batches)) for m in timed),
        )  # fmt: skip
        chart = charts.lines(lines, "requests decoded together", "TPOT, ms")
        title = f"TPOT by batch{', random weights (bench_batch.py)' if group else ''}"
        figures.append(Figure(title, chart, table))
    return figures


def learning(report: Report, agent: str) -> list[Figure]:
    """The agent's curves with those of its controls beside them, a figure per task and budget."""
    drawn = {"pruning": _searching, "routing": _tuning}[agent]
    return [
        Figure(one.title, *drawn(one), " ".join(one.notes)) for one in report.learning.values() if one.agent == agent
    ]


def _searching(one: Learning) -> tuple[Markup, Table]:
    """What searches go by, and below it what their plans did on test items, where a bench looked."""
    last = max(at for curve in one.curves for at, _ in curve.points)
    columns = [*(float(mark) for mark in MARKS if mark < last), last]
    chart, rows = Markup(""), []
    for what, curves, write, unit in (
        ("search loss", one.curves, figure, "nats"), ("test loss", one.held_out, figure, "nats"),
        ("test score", one.scores, percent, "%"),
    ):  # fmt: skip
        if curves:
            chart += _so_far(curves, what, write, unit, last)
            rows += [(name, what, *rest) for name, *rest in _numbers(curves, columns, write, stepped=True)]
    header = ("method", "what", "seeds", *(f"{figure(c, 9)} evaluations" for c in columns))
    return chart, Table("", header, tuple(rows))


def _so_far(curves: Sequence[Curve], what: str, write: Callable[[float], str], unit: str, last: float) -> Markup:
    """A chart of the best plan so far; of one-shot methods only the best, as a level."""
    shares = unit == "%"
    shots = {curve.name: curve.points[0][1] for curve in curves if len(curve.points) == 1}
    series = _lines([curve for curve in curves if curve.name not in shots], write, stepped=True)
    if shots:
        best = (max if shares else min)(shots, key=lambda name: shots[name])
        title = f"{best}, the best of {len(shots)} one-shot methods: {write(shots[best])}{'' if shares else ' nats'}"
        level = [(1.0, shots[best]), (max(last, 2.0), shots[best])]
        series.append(charts.Line(f"{best} (one-shot)", level, COLOURS, title))
    y_title = f"{what} of the best plan so far, {unit}"
    return charts.lines(series, "plans evaluated (logarithmic)", y_title, log_x=True, shares=shares)


def _tuning(one: Learning) -> tuple[Markup, Table]:
    """Validation loss, and below it the exact answers, where they are on record."""
    columns = sorted({at for curve in one.curves for at, _ in curve.points})
    chart = charts.lines(_lines(one.curves, figure), "labelled items", "validation loss, nats")
    rows = [(name, "loss, nats", *rest) for name, *rest in _numbers(one.curves, columns, figure)]
    if one.exact:
        chart += charts.lines(_lines(one.exact, percent), "labelled items", EXACT, shares=True)
        rows += [(name, "exact", *rest) for name, *rest in _numbers(one.exact, columns, percent)]
    header = ("method", "what", "seeds", *(f"{figure(c, 9)} labels" for c in columns))
    return chart, Table("", header, tuple(rows))


def _lines(curves: Sequence[Curve], write: Callable[[float], str], *, stepped: bool = False) -> list[charts.Line]:
    """Medians over the seeds with the range around them."""
    groups: dict[str, list[Curve]] = {}
    for curve in curves:
        groups.setdefault(curve.name, []).append(curve)
    lines: list[charts.Line] = []
    number = 0
    for name in sorted(groups, key=lambda name: (name != "agent", name)):
        own = groups[name]
        places = sorted({at for curve in own for at, _ in curve.points})
        begin = max(curve.points[0][0] for curve in own)
        at_each = [(at, [_value(curve, at, stepped) for curve in own]) for at in places if at >= begin]
        middle = [(at, statistics.median(values)) for at, values in at_each]
        band = [(at, min(values), max(values)) for at, values in at_each] if len(own) > 1 else []
        style = 0 if name == "agent" else (number := number + 1)
        seeds = f", median of {len(own)} seeds" if len(own) > 1 else ""
        title = f"{name}: {write(middle[-1][1])} at the end{seeds}"
        lines.append(charts.Line(name, _stairs(middle) if stepped else middle, min(style, COLOURS - 1), title,
                                 _stair_band(band) if stepped else band))  # fmt: skip
    return lines


def _value(curve: Curve, at: float, stepped: bool) -> float:
    """The curve at x: the last step before it, or on the straight line between two points."""
    before = [point for point in curve.points if point[0] <= at] or [curve.points[0]]
    after = [point for point in curve.points if point[0] > at]
    if stepped or not after:
        return before[-1][1]
    (x0, y0), (x1, y1) = before[-1], after[0]
    return y0 + (y1 - y0) * (at - x0) / (x1 - x0)


def _stairs(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A best so far holds until a better one comes: no slope between."""
    steps = [points[0]]
    for at, value in points[1:]:
        steps += [(at, steps[-1][1]), (at, value)]
    return steps


def _stair_band(band: Sequence[tuple[float, float, float]]) -> list[tuple[float, float, float]]:
    low, high = (_stairs([(row[0], row[1 + side]) for row in band]) if band else [] for side in (0, 1))
    return [(at, least, most) for (at, least), (_, most) in zip(low, high, strict=True)]


def _numbers(
    curves: Sequence[Curve], columns: Sequence[float], write: Callable[[float], str], *, stepped: bool = False
) -> Iterator[tuple[str, ...]]:
    """Of each method its name, its seeds, and its values at the columns; several seeds as median and range."""
    for name in dict.fromkeys(curve.name for curve in curves):
        own = [curve for curve in curves if curve.name == name]
        cells = []
        for column in columns:
            values = [_value(c, column, stepped) for c in own if c.points[0][0] <= column <= c.points[-1][0]]
            # One plan without any evaluation: it is there from the beginning.
            if stepped and len(own[0].points) == 1 and column == columns[0]:
                values = [own[0].points[0][1]]
            cells.append(_median(values, write))
        yield (name, str(len(own)), *cells)


def _median(values: Sequence[float], write: Callable[[float], str]) -> str:
    if not values:
        return "–"
    middle = write(statistics.median(values))
    return f"{middle} [{write(min(values))} – {write(max(values))}]" if len(values) > 1 else middle


def _dominates(one: tuple[float, float], other: tuple[float, float]) -> bool:
    """Whether a point is nowhere worse and somewhere better: cheaper (x) or better (y)."""
    return one[0] <= other[0] and one[1] >= other[1] and one != other


def _short(model: Model) -> str:
    """A model's name in a chart."""
    return "full" if model.kind == "full" else _clipped(model.name, 24)


def _clipped(text: str, most: int) -> str:
    """The end of a text, which is what tells folders apart."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _writer(score: Score) -> Callable[[float], str]:
    """How a score is written: shares in percent, perplexities as they are."""
    return percent if score.share else figure


def written(score: Score) -> str:
    """A score without its interval."""
    return _writer(score)(score.score.value)


def spread(value: Interval, write: Callable[[float], str] = figure) -> str:
    """A value with its interval in brackets."""
    return write(value.value) + (f" [{ends(value, write)}]" if value.low is not None else "")


def ends(value: Interval, write: Callable[[float], str] = figure) -> str:
    """The ends of an interval."""
    return f"{write(value.low)} – {write(value.high)}" if value.low is not None and value.high is not None else "–"


def _difference(value: Interval | None) -> str:
    return "–" if value is None else spread(value, lambda v: f"{100 * v:+.1f} points")
