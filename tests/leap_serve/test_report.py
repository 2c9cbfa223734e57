"""The report: what it shows is what the files say, and the page needs nobody."""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
import math
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from leap_serve.adapter import RouterHead, write_overlays
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.errors import CheckpointError, LeapError
from leap_serve.files import write_json
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.report import write_report
from leap_serve.report.collect import collect
from leap_serve.report.figures import trade_offs
from leap_serve.report.read import tuning
from leap_serve.report.scale import Scale, figure, spread_apart
from leap_serve.statistics import wilson
from leap_training.pruning_agent import Agent, AgentConfig, search
from leap_training.saliency import scores
from leap_training.search_state import StateFolder, fingerprint
from pruning_oracle import Oracle, ledger, profile
from reports import Page, demo_row, gate_json, make_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan]:
    out = tmp_path_factory.mktemp("runs") / "my-run"
    plan = make_run(out)
    write_json(out / "gate.json", gate_json())
    return out, plan


@pytest.fixture(scope="module")
def page(run: tuple[Path, Plan]) -> Page:
    out = run[0].parent / "report.html"
    write_report([run[0]], out)
    return Page(out.read_text(encoding="utf-8"))


def test_every_part_has_a_figure_with_its_numbers(run: tuple[Path, Plan], page: Page, tmp_path: Path) -> None:
    result = write_report([run[0]], tmp_path / "r.html")
    assert result["left_out"] == []
    assert all(count > 0 for count in result["figures"].values())
    assert page.count("figure") == sum(result["figures"].values())
    # One folded up below each figure, and the one that compares all models.
    assert len(page.tables) == page.count("figure") + 1


def test_the_tables_say_what_was_measured(page: Page) -> None:
    measured = demo_row()["models"]
    (overview,) = page.table_with("model", "experts per layer")
    rows = {row[0]: dict(zip(overview[0], row, strict=True)) for row in overview[1:]}
    for name, found in measured.items():
        row = rows["leap-tiny (full)" if name == "full" else name]
        assert row["toy-gsm"] == f"{100 * found['scores']['toy-gsm']:.1f} %"
        assert float(row["TPOT ms, batch 8"]) == pytest.approx(found["tpot_ms"]["8"], rel=0.005)
        assert float(row["weights, MiB"]) == pytest.approx(found["weights_bytes"] / 2**20, rel=0.005)
    scored = page.table_with("score", "95 % interval")[0]
    assert next(row for row in scored if row[0] == "leap-16")[1:3] == ["63.0 %", "53.2 % – 71.8 %"]


def test_learning_curves(run: tuple[Path, Plan], page: Page) -> None:
    text = " ".join(page.text)
    assert "toy-gsm: 62 of 256 experts, any number in a layer" in text
    (curve,) = page.table_with("method", "60 evaluations")
    assert curve[0][3:] == [f"{n} evaluations" for n in (1, 10, 25, 50, 60)]
    assert curve[1] == ["agent", "search loss", "1", "4", "1.5", "1.5", "0.5", "0.5"]
    (tuned,) = page.table_with("method", "200 labels")
    assert tuned[0][1:3] == ["what", "seeds"]
    assert tuned[1] == ["agent", "loss, nats", "1", "1.2", "0.5", "0.25"]
    assert tuned[2] == ["agent", "exact", "1", "–", "50.0 %", "75.0 %"]
    assert text.count("exact answers, teacher-forced, %") == 1
    assert f"toy-gsm: 62 of 256 experts, any number in a layer (plan {run[1].fingerprint[:8]})" in text
    assert "so the sliced router stays" in text


def test_layers_and_experts(run: tuple[Path, Plan], page: Page) -> None:
    plan = run[1]
    tables = page.table_with("expert", "layer 3")
    for column, layer in enumerate(plan.layers.values(), 1):
        kept = {int(row[0]) for row in tables[0][1:] if "●" in row[column]}
        assert kept == set(layer.retained)
    shares = [float(row[1].split()[0]) for row in tables[0][1:]]
    assert sum(shares) == pytest.approx(100, abs=0.4)
    (counts,) = (
        table for table in page.table_with("layer", "retained", "top_k") if len({row[1] for row in table[1:]}) > 1
    )
    assert [int(row[1]) for row in counts[1:]] == plan.counts


def test_loads_after_the_cut_are_of_the_original_experts(run: tuple[Path, Plan]) -> None:
    after = Profile.load(run[0] / "profile-after")
    (ranked,) = (one for one in collect([run[0]]).maps if one.uniform and one.num_experts == 64)
    for layer in ranked.layers:
        counts = after.layers[layer.index].n
        assert layer.load == pytest.approx(dict(zip(layer.retained, counts / counts.sum(), strict=True)))
    assert ranked.loaded == "after the cut"


def test_loads_after_tuning_go_before_those_after_the_cut(run: tuple[Path, Plan], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(run[0] / "ranked", out / "checkpoint")
    shutil.copytree(run[0] / "ranked", out / "tuned")
    head = RouterHead(torch.ones(16, Checkpoint.open(out / "tuned").config["hidden_size"]))
    write_overlays(out / "tuned", router_head={0: head}, adapter=None, made_by={})
    before = Profile.load(run[0] / "profile-after")
    before.save(out / "before")
    after = {index: replace(layer, n=layer.n[::-1].copy()) for index, layer in before.layers.items()}
    replace(
        before,
        layers=after,
        made_by={"model": str(out / "tuned"), "argv": ["leap", "profile", "tuned", "--json"]},
    ).save(out / "after")
    report = collect([out])
    assert list(report.models) == ["run", "run, tuned"]
    assert "leap profile tuned" in [one.command for one in report.origins], "not as a program would ask for it"
    (found,) = report.maps
    assert found.loaded == "after tuning"
    counts = before.layers[0].n[::-1]
    assert list(found.layers[0].load.values()) == pytest.approx(list(counts / counts.sum()))


def test_the_gate_and_the_provenance(run: tuple[Path, Plan], page: Page) -> None:
    (gate,) = page.table_with("check", "verdict")
    assert [row[-1] for row in gate[1:]] == ["kept", "broken"]
    text = " ".join(page.text)
    assert "my-run is stopped at the gate" in text
    assert "leap demo --out runs/demo --force" in text
    assert shlex.join(word for word in run[1].made_by["argv"] if word != "--json") in text


def test_the_page_asks_nobody_for_anything(page: Page) -> None:
    asking = {"src", "href", "action", "data", "poster", "srcset", "xlink:href", "style"}
    named = [(tag, value) for tag, attributes in page.elements for name, value in attributes.items() if name in asking]
    assert named == [("link", "data:,")]
    assert not re.search(r"url\(|@import|https?:", page.raw["style"])
    assert not re.search(r"fetch|XMLHttp|import|https?:", page.raw["script"])
    (policy,) = (
        a["content"] for tag, a in page.elements if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None and policy.startswith("default-src 'none'")
    for text in page.raw.values():
        assert base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() in policy


def test_what_models_say_is_text(tmp_path: Path) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>"
    row = demo_row()
    row["models"][evil] = row["models"].pop("reap-16")
    row["made_by"]["argv"] = ["leap", evil]
    write_json(tmp_path / "demo.json", row)
    write_json(tmp_path / "gate.json", {**gate_json(evil), "model": evil})
    write_report([tmp_path], tmp_path / "out.html")
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    assert page.count("script") == 1
    assert page.count("img") == 0
    assert not any(name.startswith("on") for _, attributes in page.elements for name in attributes)
    assert any(evil in cell for table in page.tables for row in table for cell in row)


def test_a_search_that_goes_on_is_shown_from_its_state(tmp_path: Path) -> None:
    book = ledger(Oracle())
    prior = scores(profile(), "reap")
    made = Agent(profile(), prior, book, AgentConfig(episodes=72, batch=12, dreams=2, dream_episodes=16))
    for _ in range(2):
        made.step()
    StateFolder(tmp_path / "run" / "search", fingerprint(made, profile(), "c" * 64)).save(made)
    (learning,) = collect([tmp_path / "run"]).learning.values()
    expected = [(at, loss) for at, _, loss in book.improvements()]
    assert len(expected) > 1
    assert list(learning.curves[0].points[:-1]) == expected
    assert [loss for _, loss in expected] == sorted((loss for _, loss in expected), reverse=True)
    assert learning.notes == [f"The agent has evaluated {book.evaluations} of 72 plans so far."]


def test_a_plan_of_the_agent_carries_its_curve(tmp_path: Path) -> None:
    book = ledger(Oracle())
    config = AgentConfig(episodes=48, batch=12, dreams=2, dream_episodes=16)
    plan = search(profile(), scores(profile(), "reap"), book, config, task="toy-gsm").plan
    plan.save(tmp_path / "plan.json")
    (learning,) = collect([tmp_path / "plan.json"]).learning.values()
    assert learning.title == "toy-gsm: 3 of 6 experts in each layer"
    *steps, (end, loss) = learning.curves[0].points
    assert steps == [(at, found) for at, _, found in book.improvements()]
    assert (end, loss) == (48, plan.made_by["search_loss"])
    replace(plan, made_by={**plan.made_by, "warm_start": "16"}).save(tmp_path / "warm" / "plan.json")
    (learning,) = collect([tmp_path / "warm" / "plan.json"]).learning.values()
    assert [curve.name for curve in learning.curves] == ["agent, warm"]


def test_cold_and_warm_searches_and_both_curves_of_tuning_from_rows(tmp_path: Path) -> None:
    search = {
        "bench": "search-methods", "task": "toy-gsm", "method": "leap", "seed": 0, "allocation": "uniform",
        "retained": [[1, 2], [3, 4]], "evaluations": 9, "improvements": [[1, 0.2, 4.0], [5, 0.5, 1.0]], "warm": "",
        "points": {"5": {"held_out_loss": 1.5, "score": 0.25}, "9": {"held_out_loss": 1.25}}, "held_out_loss": 1.25, "score": 0.5,
    }  # fmt: skip
    warm = {**search, "warm": "tasks", "improvements": [[1, 0.5, 1.0]]}
    curve = [{"labels": 10, "validation_loss": 0.5, "validation_exact": 0.5}, {"labels": 20, "validation_loss": 0.4}]
    tuned = {
        "bench": "tune",
        "task": "toy-gsm",
        "method": "leap",
        "seed": 0,
        "experts": 2,
        "labels": 20,
        "curve": curve,
    }
    rows = [
        search,
        warm,
        tuned,
        {**tuned, "method": "full", "curve": [{**one, "validation_exact": 1.0} for one in curve]},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    searches, tuning = collect([tmp_path / "rows.jsonl"]).learning.values()
    assert [(line.name, line.points) for line in searches.curves] == [
        ("agent", ((1, 4.0), (5, 1.0), (9, 1.0))), ("agent from tasks", ((1, 1.0), (9, 1.0)))
    ]  # fmt: skip
    assert searches.held_out[0].points == ((5, 1.5), (9, 1.25)) and searches.scores[0].points == ((5, 0.25), (9, 0.5))
    write_report([tmp_path / "rows.jsonl"], tmp_path / "out.html")
    (shown,) = Page((tmp_path / "out.html").read_text(encoding="utf-8")).table_with("method", "9 evaluations")
    assert [row[:2] + row[-1:] for row in shown[1::2]] == [
        ["agent", "search loss", "1"], ["agent", "test loss", "1.25"], ["agent", "test score", "50.0 %"]
    ]  # fmt: skip
    assert [line.name for line in tuning.curves] == ["agent", "full fine-tuning"]
    # A run that does not tell it in every round has no curve of it.
    assert [(line.name, line.points) for line in tuning.exact] == [("full fine-tuning", ((10, 1.0), (20, 1.0)))]


def test_a_gate_that_a_run_recorded_is_shown_once(tmp_path: Path) -> None:
    gate = gate_json()
    write_json(tmp_path / "gate.json", gate)
    stages = {"gate": {"argv": ["eval", "checkpoint", "--gate", "g.yaml"], "result": gate}}
    write_json(tmp_path / "run.json", {"recipe": "r.yaml", "stages": stages, "made_by": {}})
    report = collect([tmp_path])
    assert len(report.gates) == 1
    assert [one.command for one in report.origins] == ["leap run r.yaml", "leap eval checkpoint --gate g.yaml"]


def test_an_export_s_tuning_is_its_origin_s(run: tuple[Path, Plan], tmp_path: Path) -> None:
    for name in ("tuned", "plain"):
        (tmp_path / "run" / name).mkdir(parents=True)
        shutil.copy(run[0] / "checkpoint" / "tune.json", tmp_path / "run" / name)
    (learning,) = collect([tmp_path / "run"]).learning.values()
    assert len(learning.curves) == len(learning.exact) == len(learning.notes) == 1


def test_the_front_holds_what_nothing_beats(tmp_path: Path) -> None:
    write_json(tmp_path / "demo.json", demo_row())
    figures = trade_offs(collect([tmp_path]))
    against_weights = next(one for one in figures if one.title == "toy-gsm against weights, MiB")
    front = {row[0]: row[-1] for row in against_weights.table.rows}
    # leap-16 weighs as much as reap-16 and scores more.
    assert front == {"leap-tiny (full)": "yes", "reap-16": "no", "leap-16": "yes"}


def test_eval_results_pair_with_the_full_model(tmp_path: Path) -> None:
    spread = {"mean": 0.5, "low": 0.4, "high": 0.6, "confidence": 0.95, "n": 40}
    found = {"metric": "exact match", "score": 0.5, "loss": 0.3, "items": 40, "interval": spread}
    text = {
        "metric": "perplexity",
        "score": 12.5,
        "loss": 2.5,
        "items": 9,
        "interval": {**spread, "low": 11, "high": 14},
    }
    result = {
        "model": "some/folder/mine", "tasks": {"toy-gsm": found, "perplexity": text},
        "vs": {"model": "leap-tiny", "tasks": {"toy-gsm": {**found, "score": 0.9}, "perplexity": text}},
        "differences": {"toy-gsm": {"score": {**spread, "mean": -0.4, "low": -0.5, "high": -0.3}}},
    }  # fmt: skip
    # As `leap eval --json > eval.json` leaves it: a table for people, then the result.
    (tmp_path / "eval.json").write_text("  task   score\n ──────\n" + json.dumps(result) + "\n")
    write_report([tmp_path / "eval.json"], tmp_path / "out.html")
    page = Page((tmp_path / "out.html").read_text(encoding="utf-8"))
    gsm, perplexity = page.table_with("score", "less the full model")
    assert gsm[1] == ["mine", "50.0 %", "40.0 % – 60.0 %", "-40.0 points [-50.0 points – -30.0 points]", "0.3", "40"]
    assert gsm[2][0] == "leap-tiny (full)"
    assert perplexity[1][1:3] == ["12.5", "11 – 14"]
    said = " ".join(page.text)
    assert (
        "Not here" in said
        and "Off-domain gate: needs leap eval --gate." in said
        and "Scores by task: needs" not in said
    )


def test_what_cannot_be_shown_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.json").write_text('{"a": 1}')
    out = tmp_path / "out.html"
    with pytest.raises(LeapError, match="holds nothing that a report shows"):
        write_report([tmp_path / "empty"], out)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        write_report([tmp_path / "nowhere"], out)
    (tmp_path / "empty" / "plan.json").write_text('{"retained"')
    with pytest.raises(CheckpointError, match=r"plan\.json: not valid JSON"):
        write_report([tmp_path / "empty"], out)
    broken = demo_row()
    broken["models"]["full"]["scores"]["toy-gsm"] = math.nan
    (tmp_path / "empty" / "plan.json").write_text(json.dumps(broken))
    with pytest.raises(CheckpointError, match="is incomplete or ill-formed"):
        write_report([tmp_path / "empty"], out)
    assert not out.exists()
    assert main(["report", str(tmp_path / "empty"), "-o", str(out)]) == 1
    assert "Traceback" not in capsys.readouterr().err
    out.write_text("mine")
    assert main(["report", str(tmp_path / "empty"), "-o", str(out)]) == 2
    assert out.read_text() == "mine"


def test_numbers_and_places() -> None:
    assert [figure(value) for value in (0, 1234567, 0.00012345, 98.4, 5.0, -0.5)] == [
        "0", "1,234,567", "0.000123", "98.4", "5", "-0.5"
    ]  # fmt: skip
    found = wilson(0.0, 100)
    assert (found.low, found.high) == (0.0, pytest.approx(0.0370, abs=1e-4))
    scale = Scale.of([0.3, 9.4], 0, 100)
    assert scale.ticks() == pytest.approx([0, 2.5, 5, 7.5, 10])
    assert (scale(0), scale(10), scale(2.5)) == pytest.approx((0, 100, 25))
    assert Scale(1, 500, 0, 90, log=True).ticks() == [1, 10, 100, 500]
    moved = spread_apart([50, 51, 10, 52], 13, 0, 100)
    ordered = sorted(moved)
    assert all(late - early >= 12.9 for early, late in itertools.pairwise(ordered))
    assert [sorted(moved).index(place) for place in moved] == [1, 2, 0, 3]


def test_a_run_that_changed_nothing_says_so(run: tuple[Path, Plan]) -> None:
    made = json.loads((run[0] / "checkpoint" / "tune.json").read_text())
    assert not any("emptied" in note or "changes nothing" in note for note in tuning(made, "one", None).notes)
    made |= {"best_round": 0, "router": made["router"] | {"adapters_kept": False}}
    notes = " ".join(tuning(made, "one", None).notes)
    assert "so they were emptied" in notes and "what was written changes nothing" in notes
