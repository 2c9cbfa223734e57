"""Latency for the search's reward: measured on a sample of plans in the engine, predicted in between, measured at the end.

What a decode step of B tokens costs under a plan: c experts retained in a layer and k chosen per token read

    D(c, k, B) = c · (1 − (1 − k/c)^B)

DISTINCT experts on average, if all are equally likely (methods: §9); each is read once, and B·k products are
computed. So Latency/Latency_full is fitted by a + b·ΣD + d·Σk, non-negative, or by one b per layer where that
predicts better. Machines drift: every plan is measured between two measurements of the full model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from leap_serve.engine import Engine, Progress
from leap_serve.errors import LeapError, PlanError
from leap_serve.files import read_json, write_json
from leap_serve.measure import Ratio, ratio
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import hardware, made_by, versions
from leap_serve.workload import Workload
from leap_training.pruning_space import PruningSpace

Array = npt.NDArray[np.float64]
DECODE = Workload("decode", input_tokens=16, output_tokens=32, batch=16)
"""The workload whose TPOT is the latency of the reward, unless another is named."""
FORMAT_VERSION = 1


def distinct(count: int, top_k: int, batch: int) -> float:
    """Expected number of distinct experts that ``batch`` tokens choose, ``top_k`` of ``count`` each, uniformly."""
    return count * (1.0 - (1.0 - top_k / count) ** batch)


def _distinct_each(plan: Plan, batch: int) -> list[float]:
    return [distinct(len(layer.retained), layer.top_k, batch) for layer in plan.layers.values()]


def _chosen(plan: Plan) -> float:
    return float(sum(layer.top_k for layer in plan.layers.values()))


FORMS: Mapping[str, Callable[[Plan, int], list[float]]] = {
    "distinct": lambda plan, batch: [1.0, sum(_distinct_each(plan, batch)), _chosen(plan)],
    "distinct-per-layer": lambda plan, batch: [1.0, *_distinct_each(plan, batch), _chosen(plan)],
    "counts": lambda plan, _: [1.0, float(sum(plan.counts)), _chosen(plan)],
}
"""Name → features of a plan at a batch size; "counts" is the plain linear model, for comparison and where it is better."""
READS = ("distinct", "distinct-per-layer")
"""The forms in which an expert read has a price."""


@dataclass(frozen=True, slots=True)
class LatencyModel:
    """Predicts a plan's latency over the full model's, for one model, engine, machine and workload.

    Args:
        base_sha256: of the model's weights.
        workload: whose TPOT is meant.
        full_tpot_ms: the full model's, median.
        form: of FORMS, the one with the smallest leave-one-out error on the calibration plans.
        coefficients: non-negative, one per feature.
        mape: mean absolute error on the held-out plans, relative to the measured ratio, by form.
        calibrated, held_out: how many plans.
        made_by: provenance, and what was measured of each plan.
    """

    base_sha256: str
    workload: Workload
    full_tpot_ms: float
    form: str
    coefficients: tuple[float, ...]
    mape: Mapping[str, float]
    calibrated: int
    held_out: int
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, plan: Plan) -> float:
        """Latency(plan)/Latency(full), predicted. Raises PlanError for a plan of another model."""
        features = FORMS[self.form](plan, self.workload.batch)
        if plan.base.sha256 != self.base_sha256 or len(features) != len(self.coefficients):
            raise PlanError("latency", f"was measured on another model than {plan.base.id}", "calibrate on this one")
        return float(np.dot(features, self.coefficients))

    def of_reads(self, like: Plan) -> LatencyModel:
        """This model, or where its form is none of READS the better of these, fitted to the same measurements.

        Args:
            like: any plan of the model that was measured.

        Raises LeapError where this model does not hold what was measured.
        """
        if self.form in READS:
            return self
        try:
            measured = self.made_by["plans"]
            ratios = np.array([float(one["ratio"]) for one in measured])
            # Which experts a plan retains has no part in a form, so the first ones stand for them.
            plans = [
                Plan(like.base, like.num_experts, {
                    layer: LayerPlan(tuple(range(count)), top_k)
                    for layer, count, top_k in zip(like.layers, one["counts"], one["top_k"], strict=True)
                }) for one in measured
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError, PlanError) as error:
            what = f"does not hold the counts, top_k and ratio of each plan of this model ({error!r})"
            raise LeapError("latency model", what, "calibrate again") from None
        found = fit(plans, ratios, self.workload, self.full_tpot_ms, self.held_out, READS)
        return replace(found, made_by=self.made_by)

    def save(self, path: Path) -> None:
        """Write it as JSON, atomically."""
        write_json(path, {"format_version": FORMAT_VERSION, **asdict(self)})

    @classmethod
    def load(cls, path: Path) -> LatencyModel:
        """Read what :meth:`save` wrote; LeapError where it is something else."""
        value = read_json(path)
        try:
            version = value.pop("format_version")
            model = cls(
                **{**value, "workload": Workload(**value["workload"]), "coefficients": tuple(value["coefficients"])}
            )
            sound = version == FORMAT_VERSION and model.form in FORMS and all(map(math.isfinite, model.coefficients))
        except (AttributeError, KeyError, TypeError) as error:
            raise LeapError(path, f"is no latency model ({error!r})", "calibrate again") from None
        if not sound:
            raise LeapError(path, f"is a latency model of version {version}, form {model.form}", "calibrate again")
        return model


def calibrate(
    engine: Engine,
    plans: Sequence[Plan],
    workload: Workload = DECODE,
    *,
    rounds: int = 3,
    held_out: int | None = None,
    progress: Progress | None = None,
    **provenance: Any,
) -> LatencyModel:
    """Measure plans in the engine and fit the model; the last ``held_out`` (default: a quarter) only judge it.

    Args:
        engine: holds the full model; it is whole again at the end.
        plans: e.g. of :func:`sample_plans`; at least 6.
        rounds: measured per plan, after one of warm-up, and as many of the full model before and after it.
        provenance: what else ``made_by`` shall record.

    Raises LeapError on too few plans, or where the engine cannot apply one.
    """
    held_out = max(2, len(plans) // 4) if held_out is None else held_out
    _check_sizes(len(plans), held_out)
    ratios, full_ms = measure_plans(engine, plans, workload, rounds, progress)
    record = made_by(
        **provenance, rounds=rounds, engine=type(engine).__name__, hardware=hardware(), versions=versions()
    )
    return fit(plans, ratios, workload, full_ms, held_out, **record)


def fit(
    plans: Sequence[Plan], ratios: Array, workload: Workload, full_tpot_ms: float, held_out: int,
    forms: Iterable[str] = FORMS, **record: Any,
) -> LatencyModel:  # fmt: skip
    """Fit measured ratios [P] by the best of some forms.

    The last ``held_out`` plans take no part, neither in a fit nor in the choice of its form.
    """
    _check_sizes(len(plans), held_out)
    known = len(plans) - held_out
    tables = {name: np.array([FORMS[name](plan, workload.batch) for plan in plans]) for name in forms}
    form = min(tables, key=lambda name: _leave_one_out(tables[name][:known], ratios[:known]))
    fits = {name: nnls(table[:known], ratios[:known]) for name, table in tables.items()}
    mape = {name: _mape(table[known:] @ fits[name], ratios[known:]) for name, table in tables.items()}
    measured = [
        {"counts": plan.counts, "top_k": [layer.top_k for layer in plan.layers.values()], "ratio": float(found)}
        for plan, found in zip(plans, ratios, strict=True)
    ]
    return LatencyModel(
        plans[0].base.sha256, workload, full_tpot_ms, form, tuple(map(float, fits[form])), mape, known, held_out,
        {**record, "plans": measured},
    )  # fmt: skip


def _check_sizes(plans: int, held_out: int) -> None:
    if held_out < 1 or plans - held_out < 4:
        raise LeapError("latency", f"{plans} plans, {held_out} of them held out", "give 4 more than are held out")


def measure_plans(
    engine: Engine, plans: Sequence[Plan], workload: Workload, rounds: int, progress: Progress | None = None
) -> tuple[Array, float]:
    """Return TPOT(plan)/TPOT(full) of each plan [P], and the full model's median TPOT in ms.

    The order is full, plan, full, plan, …, full: a plan's medians are divided by the mean of its neighbours'.
    """
    found: list[float] = []
    states: list[Plan | None] = [None, *(state for plan in plans for state in (plan, None))]
    try:
        for number, state in enumerate(states):
            found.append(
                float(np.median(_tpots(engine, state, replace(workload, seed=workload.seed + number // 2), rounds)))
            )
            if progress is not None:
                progress(number + 1, len(states))
    finally:
        engine.restore()
    full, pruned = np.array(found[::2]), np.array(found[1::2])
    return 2.0 * pruned / (full[:-1] + full[1:]), float(np.median(full))


def compare(
    engine: Engine,
    states: Sequence[Plan | None],
    workload: Workload = DECODE,
    rounds: int = 12,
    progress: Progress | None = None,
) -> list[list[float]]:
    """TPOT in ms of each state (None: the full model) in every round, interleaved; the order turns with the rounds.

    The i-th of two states form a pair: same prompts, measured near one another.
    """
    found: list[list[float]] = [[] for _ in states]
    try:
        for number in range(rounds):
            load = replace(workload, seed=workload.seed + number)
            for place in range(len(states)) if number % 2 == 0 else reversed(range(len(states))):
                found[place] += _tpots(engine, states[place], load, 1)
            if progress is not None:
                progress(number + 1, rounds)
    finally:
        engine.restore()
    return found


def measured_ratio(
    engine: Engine, plan: Plan, workload: Workload = DECODE, rounds: int = 12, progress: Progress | None = None
) -> Ratio:
    """Latency(plan)/Latency(full) with its interval: what is reported of a search's final plan, never a prediction."""
    pruned, full = compare(engine, [plan, None], workload, rounds, progress)
    return ratio(pruned, full)


def _tpots(engine: Engine, state: Plan | None, workload: Workload, rounds: int) -> list[float]:
    """TPOT in ms of some rounds in a state, after one of warm-up."""
    if state is None:
        engine.restore()
    else:
        engine.apply(state)
    found = [one.tpot_ms for one in engine.measure(workload, rounds, warmup=1).samples]
    if not all(map(math.isfinite, found)):
        raise LeapError("workload", f"decodes {workload.output_tokens} token, which gives no TPOT", "decode 2 or more")
    return found


def sample_plans(space: PruningSpace, number: int, seed: int = 0) -> list[Plan]:
    """Random plans to calibrate on: at the space's budget, half and twice of it, even and uneven, some with fewer top_k.

    A model calibrated on them holds for neighbouring budgets, too. Experts are drawn uniformly.
    """
    draw = np.random.default_rng(seed)
    layers, experts = space.shape
    plans = []
    for index in range(number):
        fewer = index % 3 == 2
        floor = np.array([int(draw.integers(1, k + 1)) if fewer else k for k in space.top_k])
        total = int(np.clip(space.budget * (1.0, 0.5, 1.0, 2.0)[index % 4], floor.sum(), layers * experts))
        share = draw.dirichlet(np.full(layers, (0.3, 1.0, 5.0)[int(draw.integers(3))]))
        counts = floor.copy()
        while counts.sum() < total:
            counts[int(draw.choice(layers, p=_within(share, counts < experts)))] += 1
        chosen = {
            layer: LayerPlan(tuple(sorted(draw.choice(experts, count, replace=False).tolist())), int(k))
            for layer, count, k in zip(space.layers, counts.tolist(), floor, strict=True)
        }
        plans.append(Plan(space.routing.base, experts, chosen))
    return plans


def _within(share: Array, room: npt.NDArray[np.bool_]) -> Array:
    """Shares of what still has room, to a sum of 1."""
    left: Array = (share + 1e-9) * room
    return left / left.sum()


def nnls(features: Array, values: Array) -> Array:
    """Least squares with non-negative coefficients (Lawson & Hanson 1974): features [N, F], values [N] → [F]."""
    scale = np.maximum(np.linalg.norm(features, axis=0), 1e-300)
    a, x = features / scale, np.zeros(features.shape[1])
    free = np.zeros(len(x), bool)
    for _ in range(3 * len(x)):
        gradient = np.where(free, -np.inf, a.T @ (values - a @ x))
        if gradient.max() <= 1e-10:
            break
        free[gradient.argmax()] = True
        while True:
            best = np.zeros(len(x))
            best[free] = np.linalg.lstsq(a[:, free], values, rcond=None)[0]
            bad = free & (best <= 0)
            if not bad.any():
                break
            x = x + min(x[bad] / (x[bad] - best[bad])) * (best - x)
            free &= x > 1e-12
            x[~free] = 0.0
        x = best
    return np.asarray(x / scale, np.float64)


def _leave_one_out(features: Array, values: Array) -> float:
    """Mean absolute percentage error when each plan is predicted from all others."""
    rest = ~np.eye(len(values), dtype=bool)
    predicted = np.array([row @ nnls(features[keep], values[keep]) for row, keep in zip(features, rest, strict=True)])
    return _mape(predicted, values)


def _mape(predicted: Array, values: Array) -> float:
    return float(np.abs(predicted / values - 1.0).mean())
