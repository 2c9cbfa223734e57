"""bench/tables.py: our cells are our rows, claims stay in their columns, what is missing is said."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from leap_serve.report import write_report
from reports import ROOT, Page

Tables = dict[str, dict[str, Any]]


def tune_row(method: str, seed: int, score: float, labels: int = 10_240, **more: Any) -> dict[str, Any]:
    return {
        "bench": "tune", "model": "leap-tiny", "task": "toy-gsm", "experts": 8, "method": method, "labels": labels,
        "seed": seed, "score": score, **more,
    }  # fmt: skip


def make(folder: Path, rows: list[dict[str, Any]]) -> Tables:
    """Write rows, run the script, and return its tables by the first words of their titles."""
    (folder / "tune.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = [sys.executable, str(ROOT / "bench" / "tables.py"), "--results", str(folder)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    tables = json.loads((folder / "tables.json").read_text())["tables"]
    return {table["title"].partition(":")[0]: table for table in tables}


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tables]:
    folder = tmp_path_factory.mktemp("results")
    rows = [tune_row("leap", seed, score) for seed, score in enumerate((0.90, 0.94, 0.92))]
    rows += [tune_row("no-rl-router", seed, score) for seed, score in enumerate((0.91, 0.93, 0.95))]
    rows += [tune_row("full-model", 0, 1.0, labels=0, experts=64)]
    rows += [tune_row("leap", 0, score, labels) for labels, score in ((1024, 0.80), (2048, 0.85), (4096, 0.91))]
    rows += [tune_row("no-active-learning", 0, score, labels) for labels, score in ((1024, 0.70), (4096, 0.84))]
    return folder, make(folder, rows)


def test_a_cell_is_median_interval_and_seeds(tables: tuple[Path, Tables]) -> None:
    parts = {row[0]: row for row in tables[1]["LEAP, table 7"]["rows"]}
    assert parts["all parts"][1] == "92.0 [87.0, 97.0] (3)"
    # Paired by seed: +1, −1, +3 points.
    assert parts["without RL router"][1:3] == ["93.0 [88.0, 98.0] (3)", "1.0 [-4.0, 6.0] (3)"]
    assert parts["without LoRA"][1:3] == ["–", "–"]
    assert any("bench_tune.py --what parts" in note for note in tables[1]["LEAP, table 7"]["notes"])


def test_labels_needed_and_levels_that_are_not_reached(tables: tuple[Path, Tables]) -> None:
    rows = tables[1]["LEAP, table 6"]["rows"]
    assert all(row[3] == "–" for row in rows)
    assert [row[1:3] for row in rows] == [
        ["3,637 (1 seed)", "1,510 (1 seed)"],  # in log labels: 1,024 · 4^(12.8 / 14) and 1,024 · 2^(2.8 / 5)
        ["not reached with 4,096: 84.0 % (1 seed)", "3,525 (1 seed)"],
        [
            "not reached with 4,096: 84.0 % (1 seed)",
            "not reached with 10,240: 91.0 % (1 seed)",
        ],  # the seed that has all
        ["not reached with 4,096: 84.0 % (1 seed)", "not reached with 10,240: 91.0 % (1 seed)"],
    ]


def test_no_number_of_a_paper_stands_in_a_column_of_ours(tmp_path: Path) -> None:
    claims = json.loads((ROOT / "bench" / "paper_claims.json").read_text())
    printed = {cell for name in claims if name.startswith("leap_") for row in claims[name].values() for cell in row}
    claimed = 0
    for table in make(tmp_path, []).values():
        for row in table["rows"]:
            for name, cell in list(zip(table["header"], row, strict=True))[1:]:
                claimed += "claim" in name and cell in printed
                # Shares follow from the checkpoint's headers, the full model's being 1.00.
                assert "claim" in name or "share" in name or cell not in printed, (table["title"], name)
    assert claimed > 100


def test_markdown_and_report_show_the_same(tables: tuple[Path, Tables], tmp_path: Path) -> None:
    markdown = (tables[0] / "TABLES.md").read_text()
    assert "| all parts | 92.0 [87.0, 97.0] (3) | reference | 56.8 | 68.9 | 41.7 |" in markdown
    write_report([tables[0]], tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text())
    (shown,) = page.table_with("configuration", "paper's claim: GSM8K")
    assert shown[1:] == tables[1]["LEAP, table 7"]["rows"]


def methods_row(method: str, task: str, seed: int, score: float, tuning: str = "none", **more: Any) -> dict[str, Any]:
    return {
        "bench": "methods", "model": "leap-tiny", "task": task, "experts": 8, "method": method, "seed": seed,
        "tuning": tuning, "score": score, "retained": [8] * 4, "flops_share": 0.95, "weights_share": 0.21, **more,
    }  # fmt: skip


def speed_row(method: str, setting: str, median: float) -> dict[str, Any]:
    ratio = {"median": median, "low": median - 0.1, "high": median + 0.1}
    metrics = ("total_tok_s", "tpot_ms", "ttft_ms")
    return {"bench": "lexi-speed", "method": method, "setting": setting, "flops_share": 0.5, "weights_share": 1.0,
            "ratio_a_over_b": dict.fromkeys(metrics, ratio)}  # fmt: skip


def test_methods_stand_in_table_2_with_their_tuning_and_their_own_costs(tmp_path: Path) -> None:
    short = "400 steps, 1,000 items"
    tables = make(
        tmp_path,
        [
            *(methods_row("naee", "toy-gsm", seed, 0.1 * seed, named="naee-greedy") for seed in range(3)),
            methods_row("naee", "toy-gsm", 0, 0.7, short, named="naee-greedy"),
            methods_row("tsep", "toy-code", 0, 0.2), methods_row("tsep", "toy-code", 0, 0.9, "its own"),
            methods_row("lexi", "toy-xsum", 0, 0.4, retained=[64] * 4, flops_share=0.8, weights_share=1.0),
            methods_row("moe-i2", "toy-xsum", 0, 0.3, retained=[4, 12, 8, 8]),
            {"bench": "methods", "model": "leap-tiny", "task": "toy-gsm", "experts": 8, "method": "hc-smoe", "seed": 0,
             "tuning": short, "refused": "of our own form; not tuned here"},
            speed_row("lexi", "50 %", 0.6),
        ],
    )  # fmt: skip
    table = tables["LEAP, table 2"]
    rows = {(row[0], row[1]): row[2:] for row in table["rows"]}
    assert rows["NAEE-greedy (ours)", "none"][1] == "10.0 [0.0, 34.8] (3)"
    assert rows["NAEE-greedy (ours)", short][1] == "70.0 (1)"
    assert rows["TSEP", "none"][0] == "20.0 (1)"
    assert rows["TSEP", "its own: 400 steps while it prunes"][0] == "90.0 (1)"
    # LExI keeps all weights, and its TPOT is that of its own cut; nothing like MoE-I²'s uneven one was timed.
    assert rows["LExI (top-k)", "none"][2:6] == ["40.0 (1)", "0.80", "0.60 [0.50, 0.70]", "1.00"]
    assert rows["MoE-I²", "none"][2:6] == ["30.0 (1)", "0.95", "–", "0.21"]
    # A claim stands once: beside the row that got the most tuning, or the untuned one of what the paper did not tune.
    assert rows["NAEE-greedy (ours)", "none"][6:9] == ["47.8", "61.5", "33.3"]
    assert rows["NAEE-greedy (ours)", short][6:] == ["–"] * 6
    assert rows["TSEP", "its own: 400 steps while it prunes"][6:9] == ["46.3", "62.1", "35.6"]
    assert rows["TSEP", "none"][6:] == ["–"] * 6
    assert any("of our own form" in note for note in table["notes"])


def test_the_model_of_llama_4s_form_has_tables_of_its_own(tmp_path: Path) -> None:
    model = {"model": "bench/models/llama4-tiny"}
    rows = [methods_row("full-model", "toy-gsm", 0, 0.95, **model, weights_share=1.0) | {"experts": 64}]
    rows += [methods_row("leap", "toy-gsm", 0, 0.9, "400 steps, 1,000 items", **model)]
    tables = make(tmp_path, rows)
    scaling = {(row[0], row[1]): row for row in tables["LEAP, table 3"]["rows"]}
    assert scaling["64", "full model"][4] == "95.0 (1)" and scaling["8", "LEAP (agent)"][4] == "90.0 (1)"
    by_method = {row[0]: row for row in tables["LEAP, table 4"]["rows"]}
    assert by_method["LEAP (agent)"][3] == "90.0 (1)" and by_method["full model"][3] == "95.0 (1)"
    # Of leap-tiny there is nothing.
    assert {row[3] for row in tables["LEAP, table 2"]["rows"]} == {"–"}


def test_seeds_that_came_to_one_plan_are_no_interval_of_seeds(tmp_path: Path) -> None:
    same = {"plan": "a", "interval": [0.4, 0.6]}
    rows = [methods_row("naee", "toy-gsm", seed, 0.5, **same) for seed in range(3)]
    rows += [methods_row("naee", "toy-code", seed, 0.5, **same | {"plan": f"{seed}"}) for seed in range(3)]
    short = "400 steps, 1,000 items"
    rows += [methods_row("naee", "toy-gsm", seed, 1.0, short, **same) for seed in range(3)]
    found = {row[1]: row[2:] for row in make(tmp_path, rows)["LEAP, table 2"]["rows"] if row[0] == "NAEE"}
    assert found["none"][:2] == ["50.0 [50.0, 50.0] (3)", "50.0 [40.0, 60.0] (3, one plan)"]
    assert found[short][1] == "100.0 [100.0, 100.0] (3)"


def test_lexis_figures_join_quality_and_speed(tmp_path: Path) -> None:
    def scored(method: str, setting: str, task: str, seed: int, score: float) -> dict[str, Any]:
        return methods_row(method, task, seed, score) | {"bench": "lexi", "setting": setting}

    rows = [scored("lexi", "50 %", "toy-gsm", seed, 0.5) for seed in range(3)]
    rows += [scored("inter, agent", "75 %", "toy-code", 0, 0.25), scored("base", "0 %", "toy-gsm", 0, 1.0)]
    rows += [
        speed_row("lexi", "50 %", 1.5),
        speed_row("inter", "75 %", 2.0),
        speed_row("skip", "β = 1", 1.01) | {"active_experts": 1.25},
    ]
    rows += [{"bench": "memory", "method": name, "tokens": 4000, "experts": 8, "model_bytes": 2**30, "inputs_bytes": 2**29,
              "anonymous_bytes": held, "peak_bytes": 3 * 2**30}
             for name, held in (("load", 2 * 2**30), ("naee", 2.25 * 2**30))]  # fmt: skip
    tables = make(tmp_path, rows)
    figures = {(row[0], row[1]): row[2:] for row in tables["LExI, figures 2 and 4"]["rows"]}
    assert figures["lexi", "50 %"] == ["–", "50.0 [50.0, 50.0] (3)", "–", "1.50 [1.40, 1.60]", "0.95", "0.21"]
    assert figures["inter, agent", "75 %"][3] == "2.00 [1.90, 2.10]" and figures["base", "–"][3] == "1.00"
    assert tables["Dynamic skipping"]["rows"] == [["β = 1", "1.25", "0.50", *["1.01 [0.91, 1.11]"] * 3]]
    assert tables["Memory"]["rows"][1] == ["naee", "4,000", "1.00", "0.50", "2.25", "0.25", "3.00"]
    # 8 bytes · 4,000 tokens · experts²: 2,048,000 of 8 experts, 524,288,000 of 128.
    assert "2.0 MiB of these 8 experts, 0.49 GiB of 128 experts and as many tokens." in tables["Memory"]["caption"]
    assert "Gram" not in make(tmp_path, [])["Memory"]["caption"]
