"""Charts as inline SVG: calm axes, direct labels, a title on every mark. Colours are classes of style.css.

A chart is drawn for a column of about 360 CSS pixels, so that its text has the same size on a phone and on a desk.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from leap_serve.report.model import Interval, Methods
from leap_serve.report.scale import Scale, figure, spread_apart

WIDTH, HEIGHT = 360, 260
LEFT, RIGHT, TOP, BOTTOM = 46, 14, 30, 40
LETTER = 6.4
"""Width of an average letter of a label."""


@dataclass(frozen=True, slots=True)
class Dot:
    """A model in a scatter plot; ``best``: nothing else is better in both."""

    x: Interval
    y: Interval
    name: str
    kind: Methods
    best: bool
    title: str


@dataclass(frozen=True, slots=True)
class Line:
    """A line with a band around it; ``style`` is the number of its colour, 0 for the agent's."""

    name: str
    points: Sequence[tuple[float, float]]
    style: int
    title: str
    band: Sequence[tuple[float, float, float]] = ()


def scatter(dots: Sequence[Dot], x_title: str, y_title: str, *, shares: bool = True) -> Markup:
    """Quality against a cost, with the steps of the Pareto front; cheaper is left.

    ``shares``: quality is a score in [0, 1], drawn from 0 to 100 %; otherwise a number of which less is better.
    """
    x = Scale.of([end for dot in dots for end in _ends(dot.x)], LEFT, WIDTH - RIGHT)
    values = [end for dot in dots for end in _ends(dot.y)]
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP) if shares else Scale.of(values, HEIGHT - BOTTOM, TOP)
    front = sorted((dot.x.value, dot.y.value) for dot in dots if dot.best)
    parts = [_frame(x, y, x_title, y_title, percents=shares)]
    if len(front) > 1:
        path = f"M{x(front[0][0]):.1f} {y(front[0][1]):.1f}"
        path += "".join(f"H{x(at):.1f}V{y(value):.1f}" for at, value in front[1:])
        parts.append(Markup('<path class="front" d="{}"/>').format(path))
    taken = [(x(dot.x.value) - 5, y(dot.y.value) - 5, 10.0, 10.0) for dot in dots]
    for (left, low), (right, high) in itertools.pairwise(front):
        taken.append((x(left), y(low) - 1, x(right) - x(left), 2.0))
        taken.append((x(right) - 1, y(high), 2.0, y(low) - y(high)))
    for dot in sorted(dots, key=lambda dot: (not dot.best, dot.x.value)):
        parts.append(_mark(dot, x, y))
        place = _free(x(dot.x.value), y(dot.y.value), len(dot.name) * LETTER, taken)
        if place is not None:
            parts.append(_text(*place, dot.name, f"label {dot.kind}"))
    return _svg(parts, f"{y_title} against {x_title}: " + "; ".join(dot.title for dot in dots))


def lines(series: Sequence[Line], x_title: str, y_title: str, *, log_x: bool = False, shares: bool = False) -> Markup:
    """Lines over a common axis, each named at its right end; the agent's is drawn last, on top.

    ``shares``: y is in [0, 1], drawn from 0 to 100 %.
    """
    margin = 16 + min(118.0, max(len(line.name) for line in series) * LETTER)
    xs = [at for line in series for at, _ in line.points]
    right = WIDTH - margin
    x = Scale(1.0, max(2.0, *xs), LEFT, right, log=True) if log_x else Scale(0.0, max(xs), LEFT, right)
    values = [value for line in series for _, value in line.points]
    y = Scale(0.0, 1.0, HEIGHT - BOTTOM, TOP) if shares else Scale.of(values, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x, y, x_title, y_title, percents=shares)]
    ends = spread_apart([y(line.points[-1][1]) for line in series], 13, TOP, HEIGHT - BOTTOM)
    for line, at in sorted(zip(series, ends, strict=True), key=lambda pair: pair[0].style == 0):
        parts += _line(line, x, y, at, right)
    return _svg(parts, f"{y_title} over {x_title}: " + "; ".join(line.title for line in series))


def ranges(
    rows: Sequence[tuple[str, Interval, Methods, str]], x_title: str, *, shares: bool = True, limit: float | None = None
) -> Markup:
    """One row each: a value as a dot, its interval as a line; rows are (name, value, kind, title).

    ``shares``: values in [0, 1], drawn from 0 to 100 %. ``limit``: where a line is drawn that should not be crossed.
    """
    step, left = 24, 20 + min(170.0, max(len(name) for name, *_ in rows) * LETTER * 1.1)
    height = 24 + step * len(rows) + 34
    x = Scale(0.0, 1.0, left, WIDTH - RIGHT)
    if not shares:
        values = [end for _, value, *_ in rows for end in (value.value, value.low, value.high) if end is not None]
        x = Scale.of([0.0, *values, *([limit] if limit else [])], left, WIDTH - RIGHT, zero=min(values) >= 0)
    parts = []
    for tick in x.ticks():
        parts.append(_rule(x(tick), 16, x(tick), height - 34))
        parts.append(_text(x(tick), height - 20, f"{100 * tick:.0f}" if shares else figure(tick), "tick middle"))
    if limit is not None:
        parts.append(Markup('<path class="limit" d="M{:.1f} 10V{}"/>').format(x(limit), height - 34))
    parts.append(_text((left + WIDTH - RIGHT) / 2, height - 5, x_title, "axis middle"))
    for number, (name, value, kind, title) in enumerate(rows):
        middle = 30 + step * number
        parts.append(_text(left - 10, middle + 4, name, f"label end {kind}"))
        if value.low is not None and value.high is not None:
            whisker = Markup('<path class="whisker {}" d="M{:.1f} {}H{:.1f}"/>')
            parts.append(whisker.format(kind, x(value.low), middle, x(value.high)))
        parts.append(_shape(x(value.value), middle, kind, True, title))
    return _svg(parts, f"{x_title}: " + "; ".join(title for *_, title in rows), height)


def heat(saliency: Sequence[float], marks: Sequence[float], titles: Sequence[str], boundary: int) -> Markup:
    """One layer as a row of cells, in the order given: shade by saliency, below it a mark where one is retained.

    Args:
        saliency: [E], of any scale.
        marks: [E], height of the mark in (0, 1], 0 where the expert is dropped.
        titles: [E], what each cell says.
        boundary: how many cells the ranking alone would have kept; a line is drawn behind them, none at 0.

    The row stretches to the width that it is given, so it holds no text.
    """
    most = max(saliency, default=0.0) or 1.0
    parts = []
    for number, (value, mark, title) in enumerate(zip(saliency, marks, titles, strict=True)):
        shade = Markup('<rect class="cell" x="{}" width="1" height="10" fill-opacity="{:.2f}"/>').format(
            number, 0.05 + 0.8 * (value / most) ** 0.5
        )
        kept = Markup('<rect class="kept" x="{:.1f}" y="11.5" width="0.8" height="{:.1f}"/>')
        parts.append(
            Markup("<g>{}{}<title>{}</title></g>").format(
                shade, kept.format(number + 0.1, max(0.6, 8 * mark)) if mark else "", title
            )
        )
    if 0 < boundary < len(titles):
        parts.append(Markup('<path class="boundary" d="M{} 0V19.5"/>').format(boundary))
    head = Markup('<svg class="heat" viewBox="0 0 {} 20" preserveAspectRatio="none" role="img" aria-label="{}">')
    label = f"{sum(map(bool, marks))} of {len(titles)} experts retained"
    return head.format(len(titles), label) + Markup("").join(parts) + Markup("</svg>")


def bars(rows: Sequence[tuple[str, float, float, str]], most: float, x_title: str) -> Markup:
    """One bar per layer: retained experts, with a tick at top_k; rows are (name, count, top_k, title)."""
    step = 16 if len(rows) <= 24 else 8
    height = 10 + step * len(rows) + 34
    x = Scale(0.0, most, LEFT, WIDTH - RIGHT)
    parts = [_rule(x(tick), 6, x(tick), height - 34) for tick in x.ticks()]
    parts += [_text(x(tick), height - 20, figure(tick), "tick middle") for tick in x.ticks()]
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, height - 5, x_title, "axis middle"))
    for number, (name, count, top_k, title) in enumerate(rows):
        top = 10 + step * number
        if step == 16 or number % 4 == 0:
            parts.append(_text(LEFT - 8, top + step - 4, name, "tick end"))
        parts.append(
            Markup(
                '<g><rect class="bar" x="{}" y="{}" width="{:.1f}" height="{}"/>'
                '<rect class="topk" x="{:.1f}" y="{}" width="2" height="{}"/><title>{}</title></g>'
            ).format(LEFT, top, x(count) - LEFT, step - 3, x(top_k) - 1, top, step - 3, title)
        )
    return _svg(parts, x_title, height)


def _frame(x: Scale, y: Scale, x_title: str, y_title: str, *, percents: bool = False) -> Markup:
    """Rules at the ticks, their numbers, and both titles: y's above its axis, so that nobody turns the head."""
    parts = []
    for tick in y.ticks():
        parts.append(_rule(x.start, y(tick), x.end, y(tick)))
        parts.append(_text(LEFT - 7, y(tick) + 4, f"{100 * tick:.0f}" if percents else figure(tick), "tick end"))
    for tick in x.ticks():
        parts.append(Markup('<path class="rule" d="M{:.1f} {:.1f}v4"/>').format(x(tick), y.start))
        parts.append(_text(x(tick), y.start + 16, figure(tick), "tick middle"))
    parts.append(_text(4, 14, y_title, "axis"))
    parts.append(_text((x.start + x.end) / 2, y.start + 34, x_title, "axis middle"))
    return Markup("").join(parts)


def _line(line: Line, x: Scale, y: Scale, label_y: float, right: float) -> list[Markup]:
    parts = []
    if line.band:
        there = " ".join(f"{x(at):.1f},{y(high):.1f}" for at, _, high in line.band)
        back = " ".join(f"{x(at):.1f},{y(low):.1f}" for at, low, _ in reversed(line.band))
        parts.append(Markup('<polygon class="band s{}" points="{} {}"/>').format(line.style, there, back))
    places = [(x(at), y(value)) for at, value in line.points]
    drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    parts.append(
        Markup('<polyline class="line s{}" points="{}"><title>{}</title></polyline>').format(
            line.style, drawn, line.title
        )
    )
    if len(places) == 1:
        parts.append(Markup('<circle class="dot s{}" cx="{:.1f}" cy="{:.1f}" r="3.5"/>').format(line.style, *places[0]))
    elif abs(label_y - places[-1][1]) > 3 or places[-1][0] < right - 1:
        leader = f"M{places[-1][0] + 1:.1f} {places[-1][1]:.1f}L{right + 8:.1f} {label_y:.1f}"
        parts.append(Markup('<path class="leader" d="{}"/>').format(leader))
    parts.append(_text(right + 10, label_y + 4, line.name, f"label t{line.style}"))
    return parts


def _mark(dot: Dot, x: Scale, y: Scale) -> Markup:
    """A dot with the whiskers of its intervals."""
    at, up = x(dot.x.value), y(dot.y.value)
    parts = []
    if dot.x.low is not None and dot.x.high is not None:
        parts.append(f"M{x(dot.x.low):.1f} {up:.1f}H{x(dot.x.high):.1f}")
    if dot.y.low is not None and dot.y.high is not None:
        parts.append(f"M{at:.1f} {y(dot.y.low):.1f}V{y(dot.y.high):.1f}")
    whiskers = Markup('<path class="whisker {}" d="{}"/>').format(dot.kind, "".join(parts)) if parts else Markup("")
    return whiskers + _shape(at, up, dot.kind, dot.best, dot.title)


def _shape(x: float, y: float, kind: Methods, filled: bool, title: str) -> Markup:
    """Circle for cuts, square for full models: told apart without colour."""
    style = f"mark {kind}{'' if filled else ' hollow'}"
    if kind == "full":
        shape = Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="8" height="8">').format(style, x - 4, y - 4)
        return shape + Markup("<title>{}</title></rect>").format(title)
    shape = Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="4.5">').format(style, x, y)
    return shape + Markup("<title>{}</title></circle>").format(title)


def _free(
    x: float, y: float, width: float, taken: list[tuple[float, float, float, float]]
) -> tuple[float, float] | None:
    """Where a label fits beside a mark (its left end, its baseline), or None; remembers the place as taken."""
    for left, base in ((x + 9, y + 4), (x + 7, y + 16), (x - 7 - width, y - 7), (x - 9 - width, y + 4),
                       (x + 7, y - 7), (x - 7 - width, y + 16), (x - width / 2, y - 10), (x - width / 2, y + 19)):  # fmt: skip
        box = (left, base - 10, width, 12.0)
        inside = left >= LEFT and left + width <= WIDTH and base > 22 and base < HEIGHT - BOTTOM + 2
        if inside and not any(_overlap(box, other) for other in taken):
            taken.append(box)
            return left, base
    return None


def _overlap(a: tuple[float, float, float, float], b: tuple[float, float, float, float]) -> bool:
    return a[0] < b[0] + b[2] and b[0] < a[0] + a[2] and a[1] < b[1] + b[3] and b[1] < a[1] + a[3]


def _ends(value: Interval) -> list[float]:
    return [end for end in (value.value, value.high) if end is not None]


def _rule(x1: float, y1: float, x2: float, y2: float) -> Markup:
    return Markup('<path class="rule" d="M{:.1f} {:.1f}L{:.1f} {:.1f}"/>').format(x1, y1, x2, y2)


def _text(x: float, y: float, text: str, style: str) -> Markup:
    return Markup('<text class="{}" x="{:.1f}" y="{:.1f}">{}</text>').format(style, x, y, text)


def _svg(parts: Sequence[Markup], label: str, height: float = HEIGHT) -> Markup:
    head = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(WIDTH, height, label)
    return head + Markup("").join(parts) + Markup("</svg>")
