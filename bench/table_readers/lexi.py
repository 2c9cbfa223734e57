"""LExI's figures, dynamic skipping, and what methods hold in memory."""

from __future__ import annotations

from typing import Any

from table_readers.rows import BATCH, CLAIMS, EMPTY, TASKS, TINY, Row, Rows, Table, claimed, over_seeds, reason

RANDOM = "a random model whose weights are nearly all experts (bench_lexi.py), in vLLM"


def lexi_quality(rows: Rows) -> Table:
    """LExI's figures 2 and 4: throughput and quality of inter- and intra-pruning and of LExI.

    Rows of bench "lexi": model, method (base, inter, "inter, agent", intra, lexi), setting ("25 %" that are taken away),
    task, score, seed, flops_share, weights_share. Of bench "lexi-speed": method, setting, ratio_a_over_b.total_tok_s, cut
    over full.
    """
    found = rows.find("lexi", model=TINY)
    speeds = {(row["method"], row["setting"]): row for row in rows.find("lexi-speed")}
    body = []
    for method, setting in dict.fromkeys((row["method"], row["setting"]) for row in found):
        own = [row for row in found if (row["method"], row["setting"]) == (method, setting) and "score" in row]
        speed = speeds.get((method.partition(",")[0], setting))
        body.append([
            method, EMPTY if method == "base" else setting,
            *(over_seeds([row for row in own if row["task"] == task]) for task in TASKS),
            "1.00" if method == "base" else _ratio(speed, "total_tok_s"), *_shares(own),
        ])  # fmt: skip
    missing = [
        (row["method"], row["setting"])
        for row in speeds.values()
        if row["method"] in ("inter", "intra", "lexi", "inter + lexi", "skip", "merge")
    ]
    scored = {(row[0].partition(",")[0], row[1]) for row in body}
    body += [[method, setting, EMPTY, EMPTY, EMPTY, _ratio(speeds[method, setting], "total_tok_s"), EMPTY, EMPTY]
             for method, setting in missing if (method, setting) not in scored]  # fmt: skip
    return Table(
        "LExI, figures 2 and 4: quality against throughput",
        "Quality: leap-tiny, untuned, scores in % on test items; «inter» drops experts by REAP, «merge» is HC-SMoE, «inter + lexi» takes "
        "active experts away from REAP's subset, «skip» leaves out choices that weigh less than β times a token's highest (NAEE). Throughput: (input + output tokens) / E2EL over the full "
        f"model's at batch {BATCH} with the same share taken away, of {RANDOM}, in which it does not matter which experts or neighbours; FLOPs and weights are the scored model's.",
        ["method", "taken away", *TASKS, "throughput over full", "FLOPs, share", "weights, share"], body,
        reason(body, 6, "no row of bench lexi or lexi-speed; β_l of the scored model are not another model's") if body else ["Empty: no row of bench lexi."],
    )  # fmt: skip


def lexi_claims(rows: Rows) -> Table:
    """What LExI says of its models in words; none of them has been loaded here."""
    return Table(
        "LExI, section 4: what the paper says of its models", "Prose, not measured here: none of these models has been loaded.",
        ["model", *claimed(["quality and throughput"])], [[model, claim] for model, claim in CLAIMS["lexi_4"].items()], [],
    )  # fmt: skip


def lexi_sensitivity(rows: Rows) -> Table:
    """LExI's figure 3: D_l(k) by layer and top_k.

    Rows: {"bench": "lexi-sensitivity", "model", "layer", "top_k", "deviation", "std_error", "draws"}.
    """
    found = rows.find("lexi-sensitivity")
    ks = sorted({row["top_k"] for row in found})
    body = []
    for model, layer in dict.fromkeys((row["model"], row["layer"]) for row in found):
        cells = {row["top_k"]: f"{row['deviation']:.3g} ± {row['std_error']:.2g}" for row in found
                 if (row["model"], row["layer"]) == (model, layer)}  # fmt: skip
        body.append([model, str(layer), *(cells.get(k, EMPTY) for k in ks)])
    draws = (
        " and ".join(dict.fromkeys(f"{row['draws']} draws of {row['tokens']} tokens" for row in found)) or "the draws"
    )
    return Table(
        "LExI, figure 3: deviation D_l(k) by layer",
        f"Mean over {draws} of Gaussian inputs ± its standard error. The paper prints a picture, no numbers to set beside.",
        ["model", "layer", *(f"k = {k}" for k in ks)], body,
        [] if found else ["Empty: no row of bench lexi-sensitivity."],
    )  # fmt: skip


def skipping(rows: Rows) -> Table:
    """Dynamic skipping (NAEE, β) against the same cut without it."""
    wanted = [(row["setting"], row.get("active_experts"), row) for row in rows.find("lexi-speed", method="skip")]
    wanted += [
        ("top_k 1 in all layers instead", 1.0, row) for row in rows.find("lexi-speed", method="lexi", setting="75 %")
    ]
    body = [
        [name, EMPTY if used is None else f"{used:.2f}", f"{row['flops_share']:.2f}",
         *(_ratio(row, metric) for metric in ("tpot_ms", "ttft_ms", "total_tok_s"))]
        for name, used, row in wanted
    ]  # fmt: skip
    return Table(
        "Dynamic skipping: latency with it over latency without it",
        f"The same experts with and without skipping, interleaved, batch {BATCH}, of {RANDOM}. β = 1 leaves a token one expert "
        "of four, the most that can be skipped; β = 1e-6 skips nothing: the price of the mechanism. A skipped choice names the "
        "token's best expert and weighs 0: shapes are static and its products are made, but no expert is read for it.",
        ["skipping", "experts a token uses", "FLOPs that count, share", "TPOT, share", "TTFT, share", "throughput, share"], body,
        [] if body else ["Empty: no row of bench lexi-speed with method skip."],
    )  # fmt: skip


def memory(rows: Rows) -> Table:
    """Peak memory of methods and of loading the model, bench_memory.py."""
    found = rows.find("memory")
    loaded = {row["model_bytes"]: row["anonymous_bytes"] for row in found if row["method"] == "load"}
    body = [
        [row["method"], f"{row['tokens']:,}", _gib(row["model_bytes"]), _gib(row["inputs_bytes"]), _gib(row["anonymous_bytes"]),
         _gib(row["anonymous_bytes"] - loaded[row["model_bytes"]]) if row["model_bytes"] in loaded else EMPTY,
         _gib(row["peak_bytes"])]
        for row in found
    ]  # fmt: skip
    return Table(
        "Memory: what methods hold, beside the loaded model",
        "Anonymous memory of `leap search` (and of `leap profile --channels`, which moe-pruner and intra need) at most, asked for "
        "50 times a second, in a process of its own, float32 on a CPU, on a random model of 64 MoE layers; «load» is transformers "
        "with that model, once it is loaded. «inputs» is what the inputs of all layers would take if they were held; they lie "
        "on disk. The last column counts pages of mapped files, too, and what loading itself took for a moment."
        + _gram_matrices(found),
        ["method", "tokens", "model, GiB", "inputs, GiB", "held, GiB", "beyond the loaded model, GiB", "resident, GiB"], body,
        [] if body else ["Empty: no row of bench memory."],
    )  # fmt: skip


def _gram_matrices(found: list[Row]) -> str:
    """A sentence on the term that grows with the experts' square, which the rows' few experts hide."""
    if not found:
        return ""
    row = max(found, key=lambda one: int(one["tokens"] * one["experts"] ** 2))
    here, there = (8 * row["tokens"] * experts**2 for experts in (row["experts"], 128))
    return (
        f" NAEE and MoE-I² also hold one layer's Gram matrices, 8 bytes · tokens · experts²: {here / 2**20:.1f} MiB of these "
        f"{row['experts']} experts, {_gib(there)} GiB of 128 experts and as many tokens."
    )


def _gib(number: float) -> str:
    return f"{number / 2**30:.2f}"


def _ratio(row: Row | None, metric: str) -> str:
    """A cut's figure over the full model's, with the interval of the median of pairs."""
    if row is None:
        return EMPTY
    found: dict[str, Any] = row["ratio_a_over_b"][metric]
    return f"{found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _shares(found: list[Row]) -> list[str]:
    row = next((row for row in found if "flops_share" in row), None)
    return [f"{row['flops_share']:.2f}", f"{row['weights_share']:.2f}"] if row else [EMPTY, EMPTY]
