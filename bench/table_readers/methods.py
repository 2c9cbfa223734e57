"""LEAP's tables 2 to 5: methods at one budget, on leap-tiny and on the small model of Llama 4's form."""

from __future__ import annotations

from collections.abc import Sequence

from table_readers.rows import (
    BATCH,
    CLAIMS,
    EMPTY,
    LLAMA4,
    MOST_LABELS,
    NAMES,
    QUALITY,
    SHORT,
    TASKS,
    TINY,
    Row,
    Rows,
    Table,
    claimed,
    over_seeds,
    reason,
    sizes,
)

PAPER = claimed([*QUALITY, "FLOPs", "ms/token", "GB"])
LLAMA4_FORM = "A small trained model of Llama 4's form (sigmoid, top-1, shared expert, every other layer dense)"
FORMS = {"moe-i2": "uneven", "hc-smoe": "merge", "eep": "map"}
"""Methods whose cuts are neither even nor called by the method's name in bench_lexi.py."""
VANILLA, AS_FOUND = "vanilla", ("magnitude", "naee")
LLAMA4_TIMES = "TPOT at batch 16 is of a larger random model of that form, in which experts dominate (bench_lexi.py), over the full one's."
OF_THE_PAPERS = ("vanilla", "naee", "moe-i2", "moe-pruner", "tsep")


def comparison(rows: Rows) -> Table:
    """LEAP's table 2: all methods at an eighth of the experts; each row says which tuning it got."""
    body, notes = _methods(rows, TINY, CLAIMS["leap_2"])
    return Table(
        "LEAP, table 2: methods at an eighth of the experts",
        "leap-tiny, 8 of 64 experts in each layer, or the nearest of a method's own form: intra keeps an eighth of every "
        "expert's channels, LExI half of the active experts and all weights, MoE-I² 8 on average. Scores in % on test "
        f"items; FLOPs and weights over the full model's, TPOT at batch {BATCH} of bench_lexi.py's random model in "
        "which experts dominate (median of pairs and its 98 % interval). Scores stand on 128 or 256 test items, after `leap tune` "
        "on 1,024; those of toy-gsm of bench_lookahead.py (frequency, gate-mass, REAP, evolution, LEAP) are transformers'. Criteria come "
        "from 256 profiled items; naee, moe-i2 and hc-smoe calibrate on their default of 32, lexi draws 16 times 256 tokens of noise. "
        "MoE-Pruner is its scores summed by expert; the single weights that the paper zeroes save nothing in a dense kernel. "
        "Plans of equal counts and top_k have the same FLOPs, weights and TPOT, whatever the paper's columns say.",
        ["method", "tuning", *TASKS, "FLOPs, share", "TPOT, share", "weights, share", *PAPER],
        body,
        [*notes, *reason(body, 8, "no row in search_methods.jsonl, methods.jsonl, lookahead.jsonl, tune.jsonl or lexi.jsonl")],
    )  # fmt: skip


def llama4_methods(rows: Rows) -> Table:
    """LEAP's table 4, on the small model of Llama 4's form."""
    body, notes = _methods(rows, LLAMA4, CLAIMS["leap_4"])
    return Table(
        "LEAP, table 4: Llama 4 Maverick, methods", f"{LLAMA4_FORM}, 8 of 64 experts; scores in % on test items. {LLAMA4_TIMES}",
        ["method", "tuning", *TASKS, "FLOPs, share", "TPOT, share", "weights, share", *PAPER], body,
        [*notes, *reason(body, 8, "no row in methods.jsonl; TPOT was timed for equal counts only")],
    )  # fmt: skip


def llama4_scaling(rows: Rows) -> Table:
    """LEAP's table 3, on the small model of Llama 4's form."""
    body = []
    for name, claim in CLAIMS["leap_3"].items():
        experts = int(name)
        if experts == 64:
            found = rows.find("methods", model=LLAMA4, method="full-model")
            body.append([name, "full model", "none needed", *(over_seeds(rows.full(t, LLAMA4)) for t in TASKS),
                         "1.00", *_shares(found), *claim])  # fmt: skip
            continue
        tpot = _tpot(rows, "llama4 inter", experts)
        for method in ("leap", "reap"):
            found = rows.find("methods", model=LLAMA4, method=method, experts=experts)
            for tuning, scores in (("none", rows.untuned), (SHORT, rows.short)):
                cells = [over_seeds(scores(method, task, experts, LLAMA4)) for task in TASKS]
                paper = claim if (method, tuning) == ("leap", SHORT) else [EMPTY] * len(claim)
                if paper is claim or set(cells) != {EMPTY}:
                    body.append([name, NAMES[method], tuning, *cells, tpot, *_shares(found), *paper])
    return Table(
        "LEAP, table 3: Llama 4 Maverick, number of experts", f"{LLAMA4_FORM}; scores in % on test items. {LLAMA4_TIMES}",
        ["experts of 64", "method", "tuning", *TASKS, "TPOT, share", "FLOPs, share", "weights, share", *PAPER], body,
        reason(body, 9, "no row in methods.jsonl: bench_methods.py --model bench/models/llama4-tiny"),
    )  # fmt: skip


def agent_effect(rows: Rows) -> Table:
    """LEAP's table 5: the agent against heuristics, before and after the same plain fine-tuning."""
    body = []
    for experts in (16, 8):
        for method in ("leap", "evolution", "gate-mass", "reap", "frequency", "magnitude"):
            found = [rows.untuned(method, task, experts) for task in TASKS]
            claim = CLAIMS["leap_5"].get(method, (EMPTY,) * 4) if experts == 8 else (EMPTY,) * 4
            body.append([str(experts), NAMES.get(method, method), *map(over_seeds, found),
                         *(over_seeds(rows.short(method, task, experts)) for task in TASKS), *claim])  # fmt: skip
    return Table(
        "LEAP, table 5: what the pruning agent adds",
        "leap-tiny, equal counts in all layers; scores in % on test items of the plans as they were found, and after the "
        "same 400 steps of fine-tuning on 1,000 items, where there are both of the same plans. toy-gsm: bench_lookahead.py, "
        "scored in transformers, but evolution's first seed at 16. The paper's 16 of 128 stand beside our 8 of 64.",
        [
            "experts of 64",
            "method",
            *TASKS,
            *(f"{task}, fine-tuned" for task in TASKS),
            *claimed([*QUALITY, "ms/token"]),
        ],
        body,
        reason(body, 8, "no row in search_methods.jsonl, methods.jsonl or lookahead.jsonl"),
    )


def _methods(rows: Rows, model: str, claims: dict[str, list[str]]) -> tuple[list[list[str]], list[str]]:
    """Rows of every method that has any, in the order of the benches, then of those that only the paper has; and notes.

    A paper's claim stands beside the best-tuned row of its method, of those that it names without tuning beside the
    untuned one.
    """
    full = [over_seeds(rows.full(task, model)) for task in TASKS]
    body, notes = [["full model", "none needed", *full, "1.00", "1.00", "1.00", *claims["full-model"]]], []
    seen = [row["method"] for bench in ("search-methods", "methods", "tune") for row in rows.find(bench, model=model)
            if row["experts"] == 8 and row.get("allocation", "uniform") == "uniform" and row["method"] != "untuned"
            and row.get("labels", MOST_LABELS) == MOST_LABELS]  # fmt: skip
    for method in dict.fromkeys([*seen, *(name for name in claims if name != "full-model")]):
        found = rows.find("methods", model=model, experts=8, method="frequency" if method == VANILLA else method)
        own = [
            [_name(method, found), tuning, *map(over_seeds, scores), *_costs(rows, method, found, model)]
            for tuning, scores in _scores(rows, method, model)
            if any(scores)
        ] or [[_name(method, found), "not measured", *[EMPTY] * 6]]
        empty, beside = [EMPTY] * len(PAPER), own[0 if method in AS_FOUND else -1]
        body += [[*row, *(claims.get(method, empty) if row is beside else empty)] for row in own]
        refused = dict.fromkeys(
            f"{_name(method, found)}, tuning {row['tuning']}: {row['refused']}" for row in found if "refused" in row
        )
        notes += refused
    return body, notes


def _scores(rows: Rows, method: str, model: str) -> list[tuple[str, list[list[Row]]]]:
    """By tuning, the scores of a method's plans of 8 experts on every task.

    Plain fine-tuning of frequency's subset is what LEAP calls vanilla fine-tuning, a method of its own.
    """
    plans = {"frequency": "", VANILLA: "frequency"}.get(method, method)
    found = [("none", [rows.untuned(method, task, 8, model) for task in TASKS]),
             ("its own: 400 steps while it prunes", [rows.own(method, task, 8, model) for task in TASKS]),
             (SHORT, [rows.short(plans, task, 8, model) for task in TASKS])]  # fmt: skip
    if model == TINY:
        found.append(("10,240 labels, 400 steps", [rows.tuned(method, task, 8) for task in TASKS]))
    return found


def _name(method: str, found: Sequence[Row]) -> str:
    """A method as its plans call it: greedy NAEE is not NAEE. Vanilla fine-tuning has plans of another."""
    if method == VANILLA:
        return NAMES[method]
    named = next((row["named"] for row in found if row.get("named") in NAMES), method)
    return NAMES.get(named, named)


def _shares(found: Sequence[Row]) -> list[str]:
    """FLOPs and weights over the full model's, of the first row that has them."""
    row = next((row for row in found if "flops_share" in row), None)
    return [f"{row['flops_share']:.2f}", f"{row['weights_share']:.2f}"] if row else [EMPTY, EMPTY]


def _costs(rows: Rows, method: str, found: Sequence[Row], model: str) -> list[str]:
    """FLOPs, TPOT and weights over the full model's; TPOT of the random model of the same form, by bench_lexi.py."""
    even = all(set(row["retained"]) == {8} for row in found if "retained" in row) and method not in ("hc-smoe", "eep")
    flops, weights = _shares(found)
    if even and model == TINY and not found:
        flops, weights = sizes(8)
    if model == LLAMA4:
        return [flops, _tpot(rows, "llama4 inter", 8) if even else EMPTY, weights]
    # All forms by one bench: ratios of bench_batch's larger model are no figures to set beside these.
    form = "inter" if even else FORMS.get(method, method)
    return [flops, _tpot(rows, form, 32 if method == "lexi" else 8), weights]


def _tpot(rows: Rows, form: str, experts: int) -> str:
    """TPOT over the full model's of cuts of one form that leave so many of 64 experts' worth."""
    found = rows.find("lexi-speed", method=form, setting=f"{100 * (1 - experts / 64):g} %")
    ratios = [row["ratio_a_over_b"]["tpot_ms"] for row in found]
    return f"{ratios[-1]['median']:.2f} [{ratios[-1]['low']:.2f}, {ratios[-1]['high']:.2f}]" if ratios else EMPTY
