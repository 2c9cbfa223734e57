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
    assert [row[1:3] for row in rows] == [
        ["4,096 (1 seed)", "2,048 (1 seed)"],
        ["not reached with 4,096: 84.0 % (1 seed)", "4,096 (1 seed)"],
        ["not reached with 4,096: 84.0 % (1 seed)", "not reached with 10,240: 92.0 % (1 seed)"],
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
