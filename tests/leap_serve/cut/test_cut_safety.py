"""What the cut refuses, and that whatever happens, it leaves a whole checkpoint or none."""

from __future__ import annotations

import json
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cutting import EVEN, UNEVEN, plan_of
from leap_serve.checkpoint import Checkpoint, check_cut
from leap_serve.cli import main
from leap_serve.cut.rules import beyond_stock
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError, PlanError, UnsupportedError, UsageError
from leap_serve.files import sha256_of
from leap_serve.plan import BaseModel, LayerPlan, Merge, Plan
from synthetic import make, qwen_config, qwen_tensors, read_all, read_safetensors, write_safetensors


def tree(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(model: Path, plan: Plan, kind: type[LeapError] = PlanError, **more: Any) -> str:
    """Cut, expect an error of a kind, see that nothing was written, and return its sentence."""
    root = model.parents[1]
    out = more.pop("out", root / "out")
    before = tree(root)
    with pytest.raises(kind) as caught:
        cut(model, plan, out, **more)
    assert tree(root) == before
    assert not list(root.glob(".*partial*")) and not list(out.parent.glob(".*partial*"))
    return str(caught.value)


# --- plans that do not fit --------------------------------------------------------------------------------


def test_a_plan_of_another_model(model: Path) -> None:
    plan = replace(plan_of(model), base=BaseModel("org/other", "0" * 64))
    assert "plan: was made for org/other (000000000000…), not for m (" in refused(model, plan)


@pytest.mark.parametrize(
    ("layers", "experts", "message"),
    [
        ({0: LayerPlan((0, 2), 2)}, 8, "leaves MoE layers [1] unplanned; plan the MoE layers [0, 1]"),
        ({**UNEVEN, 2: LayerPlan((0, 2), 2)}, 8, "plans layers [2], which hold no experts"),
        ({**UNEVEN, 0: LayerPlan((0, 2, 5), 3)}, 8, "layer 0 has top_k 3, the model's is 2; set top_k[0] to 2"),
        (UNEVEN, 16, "says 16 experts, the model has 8"),
    ],
)
def test_a_plan_that_does_not_fit(model: Path, layers: dict[int, LayerPlan], experts: int, message: str) -> None:
    assert message in refused(model, replace(plan_of(model, layers), num_experts=experts))


@pytest.mark.parametrize(
    ("ids", "top_k", "message"),
    [
        ((0, 1, 4), 2, "layer 1 retains 3 experts, which 2 routing groups do not divide"),
        ((0, 1, 2, 4), 2, "layer 1 retains [3, 1] experts of its 2 routing groups, not equally many of each"),
        ((0, 4), 2, "layer 1 retains 1 per group: too few for top_k 2 from 1 groups"),
        ((0, 4), 1, "layer 1 retains 1 per group, and a group is ranked by its two best"),
        ((0, 1, 4, 5), 2, None),
    ],
)
def test_routing_groups_must_stay_equal(tmp_path: Path, ids: tuple[int, ...], top_k: int, message: str | None) -> None:
    config = qwen_config(architectures=["Glm4MoeForCausalLM"], model_type="glm4_moe", n_group=2, topk_group=1)
    config["n_routed_experts"] = config.pop("num_experts")
    model = make(tmp_path / "src" / "m", qwen_tensors(), config)
    plan = plan_of(model, {0: LayerPlan((0, 3, 5, 6), 2), 1: LayerPlan(ids, top_k)})
    if message is None:
        cut(model, plan, tmp_path / "out")
        verify(tmp_path / "out", model)
    else:
        assert message in refused(model, plan)


def test_a_family_that_our_plugin_does_not_serve_is_cut_evenly_or_not_at_all(tmp_path: Path) -> None:
    config = qwen_config(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2")
    config["n_routed_experts"] = config.pop("num_experts")
    model = make(tmp_path / "src" / "m", qwen_tensors(), config)
    sentence = refused(model, plan_of(model), UnsupportedError)
    assert "no engine serves DeepseekV2ForCausalLM (deepseek_v2) cut by a plan that retains more experts in" in sentence
    assert (
        "and has a router temperature other than 1; retain equally many (--allocation uniform), and leave" in sentence
    )
    pairs = tuple(((2 * slot, 0.5), (2 * slot + 1, 0.5)) for slot in range(3))
    for more, remedy in (
        ({"skip": 0.5}, "cut by a plan that skips experts; leave --skip out"),
        ({"merge": Merge(pairs, pairs)}, "cut by a plan that merges experts; choose a --method that merges none"),
    ):
        uniform = {index: LayerPlan((0, 2, 4), 2, **more) for index in (0, 1)}
        assert remedy in refused(model, plan_of(model, uniform), UnsupportedError)
        assert beyond_stock(plan_of(model, uniform)) == tuple(more)
    fewer = {0: LayerPlan((0, 2, 5), 2), 1: LayerPlan((1, 3, 7), 1)}
    assert "top_k in some layers than in others; have the same in all" in refused(
        model, plan_of(model, fewer), UnsupportedError
    )
    assert not beyond_stock(plan_of(model, EVEN)) and plan_of(model, EVEN).is_uniform
    assert cut(model, plan_of(model, EVEN), tmp_path / "out").architecture == "DeepseekV2ForCausalLM"


def test_quantisation_patterns_with_expert_numbers(tmp_path: Path) -> None:
    config = qwen_config(quantization_config={"ignore": [r"re:.*\.experts\.(0|1)\..*"]})
    model = make(tmp_path / "src" / "m", qwen_tensors(), config)
    assert "names experts by number in the pattern" in refused(model, plan_of(model), UnsupportedError)


def test_a_tuned_checkpoint_is_not_cut(model: Path, tmp_path: Path) -> None:
    report = cut(model, plan_of(model), tmp_path / "src" / "first")
    first = tmp_path / "src" / "first"
    write_safetensors(
        first / "router_head.safetensors", {"layers.0.weight": ("F32", (3, 16))}, {"leap_fingerprint": report.fingerprint}
    )  # fmt: skip
    plan = Plan(Checkpoint.open(first).identity(), 4, {0: LayerPlan((0, 1), 2), 1: LayerPlan((0, 1), 2)})
    assert "cut the model before it is tuned" in refused(first, plan, UnsupportedError)


# --- destinations -----------------------------------------------------------------------------------------


def test_the_source_is_never_the_destination(model: Path) -> None:
    plan = plan_of(model)
    assert "lies in the source" in refused(model, plan, UsageError, out=model, force=True)
    assert "lies in the source" in refused(model, plan, UsageError, out=model / "cut", force=True)
    assert "holds the source" in refused(model, plan, UsageError, out=model.parent, force=True)
    (model.parent / "link").symlink_to(model)
    assert "lies in the source" in refused(model, plan, UsageError, out=model.parent / "link" / "x")


def test_a_full_destination_needs_force(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    assert "exists and is not empty" in refused(model, plan_of(model), UsageError)
    cut(model, plan_of(model), out, force=True)
    assert not (out / "precious").exists()
    verify(out, model)


def test_a_source_that_is_damaged_writes_nothing(model: Path) -> None:
    plan = plan_of(model)
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    assert "is truncated" in refused(model, plan, CheckpointError)


def test_a_disk_that_is_too_small_is_seen_before_writing(model: Path) -> None:
    plan = plan_of(model)
    # Sparse: 2**60 bytes of one tensor, on no disk at all.
    huge = {"dtype": "U8", "shape": [2**42], "data_offsets": [0, 2**42]}
    header = json.dumps({"lm_head.huge": huge}).encode()
    with (model / "huge.safetensors").open("wb") as stream:
        stream.write(len(header).to_bytes(8, "little") + header)
        stream.truncate(8 + len(header) + 2**42)
    names = dict.fromkeys(read_all(model), "model.safetensors") | {"lm_head.huge": "huge.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    plan = replace(plan, base=Checkpoint.open(model).identity())
    with pytest.raises(LeapError, match=r"needs 4096\.00 GiB, the disk has .* GiB free; make room"):
        cut(model, plan, model.parents[1] / "out")
    assert not (model.parents[1] / "out").exists()
    (model / "huge.safetensors").unlink()


def test_a_write_that_fails_midway_leaves_nothing(model: Path, tmp_path: Path) -> None:
    plan_of(model).save(tmp_path / "plan.json")
    out = tmp_path / "made" / "out"

    def limit_files_to_8_kib() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))

    argv = [sys.executable, "-m", "leap_serve.cli", "cut", str(model), str(tmp_path / "plan.json"), "-o", str(out)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, preexec_fn=limit_files_to_8_kib)
    assert done.returncode == 1
    assert f"leap cut: {out}: could not be written (File too large); nothing is left there; make room" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(out.parent.iterdir()) == []
    assert subprocess.run(argv, capture_output=True, timeout=60).returncode == 0
    verify(out, model)


# --- killed at any moment ---------------------------------------------------------------------------------

CHILD = """
import sys
from pathlib import Path
from leap_serve.cut.write import cut
from leap_serve.plan import Plan
cut(Path(sys.argv[1]), Plan.load(Path(sys.argv[2])), Path(sys.argv[3]), max_shard_bytes=20_000_000,
    progress=lambda done, total: print(done, flush=True))
print("done", flush=True)
"""


@pytest.mark.e2e
def test_killed_at_random_moments(tmp_path: Path) -> None:
    """SIGKILL 14 times during a cut of 200 MB: nothing or everything is there, and the next run succeeds."""
    tensors = qwen_tensors(experts=16, layers=range(4), hidden=512, inner=512)
    model = make(tmp_path / "m", tensors, qwen_config(experts=16, layers=4), shards=3)
    layers = {layer: LayerPlan(tuple(range(layer % 2, 16, 2)), 2) for layer in range(4)}
    Plan(Checkpoint.open(model).identity(), 16, layers).save(tmp_path / "plan.json")
    work = tmp_path / "work"
    work.mkdir()
    out = work / "out"
    total = sum(len(blob) for _, _, blob in read_all(model).values())
    assert total > 190e6
    rng = random.Random(0)
    outcomes = {"absent": 0, "whole": 0}
    for attempt in range(14):
        child = subprocess.Popen(
            [sys.executable, "-c", CHILD, model, tmp_path / "plan.json", out], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        # Spread over the whole run: after so many bytes, or, for the last few, around the final renaming.
        goal = rng.random() * 101e6 if attempt < 10 else 100e6
        for line in child.stdout:
            if line == "done\n" or int(line) >= goal:
                break
        if attempt >= 10:
            time.sleep(rng.random() * 0.1)
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
        child.stdout.close()
        if out.exists():
            check_cut(Checkpoint.open(out))
            assert verify(out, model).sliced == 4
            shutil.rmtree(out)
            outcomes["whole"] += 1
        else:
            outcomes["absent"] += 1
    assert outcomes["absent"] >= 8
    subprocess.run([sys.executable, "-c", CHILD, model, tmp_path / "plan.json", out], check=True, timeout=120)
    verify(out, model)
    assert [path.name for path in work.iterdir()] == ["out"]


# --- optimizer states -------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["{kind}.{name}", "{name}.{kind}"])
def test_optimizer_states_follow_their_experts(model: Path, tmp_path: Path, style: str) -> None:
    shapes: dict[str, Any] = {"model.embed_tokens.weight": (32, 16)}
    for layer in range(2):
        head = f"model.layers.{layer}.mlp."
        shapes |= {f"{head}experts.gate_up_proj": (8, 16, 16), f"{head}experts.down_proj": (8, 16, 8)}
        shapes |= {f"{head}gate.weight": (8, 16), f"{head}experts.4.up_proj.weight": (8, 16)}
        shapes |= {f"{head}experts.5.up_proj.weight": (8, 16)}
    state: dict[str, Any] = {
        style.format(kind=kind, name=name): ("F32", shape)
        for name, shape in shapes.items()
        for kind in ("exp_avg", "exp_avg_sq", "weight")
    }
    state |= {style.format(kind="step", name=name): ("F32", ()) for name in shapes}
    write_safetensors(tmp_path / "state.safetensors", state, {"step": "250"})
    report = cut(model, plan_of(model), tmp_path / "out", optimizer=tmp_path / "state.safetensors")
    before, after = (
        read_safetensors(tmp_path / "state.safetensors"),
        read_safetensors(tmp_path / "out/optimizer.safetensors"),
    )
    wanted = {}
    for name, (dtype, shape, blob) in before.items():
        layer = 0 if ".0.mlp" in name else 1
        ids = UNEVEN[layer].retained
        if ".experts.4." in name or ".experts.5." in name:
            old = 4 if ".experts.4." in name else 5
            if old in ids:
                wanted[name.replace(f".experts.{old}.", f".experts.{ids.index(old)}.")] = (dtype, shape, blob)
        elif ".mlp." in name and "step" not in name:
            row = len(blob) // 8
            rows = b"".join(blob[i * row : (i + 1) * row] for i in ids)
            wanted[name] = (dtype, (len(ids), *shape[1:]), rows)
        else:
            wanted[name] = (dtype, shape, blob)
    assert after == wanted
    assert report.optimizer_bytes == sum(len(blob) for _, _, blob in after.values())
    # It lies beside the weights and is not taken for weights.
    assert set(Checkpoint.open(tmp_path / "out").tensors) == set(read_all(tmp_path / "out"))
    header = (tmp_path / "out/optimizer.safetensors").read_bytes()[8:400].decode(errors="ignore")
    assert '"step":"250"' in header and report.fingerprint in header


def test_mixtral_optimizer_states_as_transformers_names_them(tmp_path: Path) -> None:
    tensors = {name.replace(".mlp.", ".block_sparse_moe."): spec for name, spec in qwen_tensors().items()}
    config = qwen_config(architectures=["MixtralForCausalLM"], model_type="mixtral")
    config["num_local_experts"] = config.pop("num_experts")
    model = make(tmp_path / "m", tensors, config)
    state = {f"exp_avg.model.layers.{k}.mlp.experts.gate_up_proj": ("F32", (8, 4)) for k in range(2)}
    write_safetensors(tmp_path / "state.safetensors", state)
    cut(model, plan_of(model), tmp_path / "out", optimizer=tmp_path / "state.safetensors")
    shapes = [shape for _, shape, _ in read_safetensors(tmp_path / "out/optimizer.safetensors").values()]
    assert sorted(shapes) == [(3, 4), (4, 4)]


STATES: dict[str, tuple[dict[str, Any], str]] = {
    "of nobody": ({"exp_avg.lm_head.weight": ("F32", (4,))}, "holds no state of any expert"),
    "of another expert": (
        {"exp_avg.model.layers.0.mlp.experts.8.up_proj.weight": ("F32", (4,))}, "is of an expert that the model does not"
    ),
    "of another layer": (
        {"exp_avg.model.layers.5.mlp.experts.1.up_proj.weight": ("F32", (4,))}, "is of an expert that the model does not"
    ),
    "of another width": (
        {"exp_avg.model.layers.0.mlp.experts.up_proj": ("F32", (9, 4))}, "has shape [9, 4], but layer 0 has 8 experts"
    ),
    "of another block": ({"exp_avg.model.layers.0.moe.experts.up_proj": ("F32", (8, 4))}, "cannot tell whose expert"),
}  # fmt: skip


@pytest.mark.parametrize("what", STATES)
def test_optimizer_states_of_another_model(model: Path, tmp_path: Path, what: str) -> None:
    state, message = STATES[what]
    write_safetensors(tmp_path / "state.safetensors", state)
    assert message in refused(model, plan_of(model), LeapError, optimizer=tmp_path / "state.safetensors")


# --- the command line -------------------------------------------------------------------------------------


def test_the_three_verbs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of(model).save(tmp_path / "plan.json")
    out = str(tmp_path / "out")

    def leap(*argv: str) -> dict[str, Any]:
        assert main([*argv, "--json"]) == 0
        return json.loads(capsys.readouterr().out.strip().splitlines()[-1])

    report = leap("cut", str(model), str(tmp_path / "plan.json"), "-o", out, "--max-shard-size", "4kB")
    assert report["retained"] == [3, 4] and report["shards"] > 2
    proof = leap("verify", out, "--base", str(model))
    assert proof["untouched"] + proof["renumbered"] + proof["sliced"] == report["tensors"]
    assert leap("verify", out)["fingerprint"] == report["fingerprint"]
    shown = leap("inspect", out)
    assert [layer["retained"] for layer in shown["layers"]] == [3, 4]
    assert [layer["temperature"] for layer in shown["layers"]] == [1.0, 2.0]
    assert (shown["problem"], shown["weights_bytes"]) == (None, report["weights_bytes"])
    assert leap("inspect", str(tmp_path / "plan.json"))["fingerprint"] == report["fingerprint"]
    assert leap("inspect", str(model))["kind"] == "model"

    assert main(["cut", str(model), str(tmp_path / "plan.json"), "-o", out]) == 2
    assert main(["cut", str(model), str(tmp_path / "plan.json"), "-o", out, "--max-shard-size", "huge"]) == 2
    assert main(["cut", str(model), str(tmp_path / "none.json"), "-o", out]) == 1
    assert main(["verify", str(model)]) == 1
    (tmp_path / "out" / "config.json").write_text(json.dumps(qwen_config()))
    assert "says 8 experts, leap.json says 4" in leap("inspect", out)["problem"]
    err = capsys.readouterr().err
    assert "Traceback" not in err
