"""Channel sums, MoE-Pruner and intra-expert pruning: by the definitions, on files, and in stock transformers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cut_blocks import ITEMS
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.remake import rounded, zeroed
from leap_serve.cut.verify import verify
from leap_serve.cut.write import cut
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import LeapError, PlanError, UnsupportedError
from leap_serve.flops import flops_per_token, parameters
from leap_serve.plan import LayerPlan, Plan
from leap_serve.profile import Profile
from leap_training.methods.intra import importance, intra
from leap_training.methods.moe_pruner import moe_pruner
from reference import reference_logprobs
from tiny_tokenizer import talking_copy

E, H, I = 8, 64, 32  # noqa: E741


@pytest.fixture(scope="module")
def profiled(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model and its profile with channel sums, on disk."""
    home = tmp_path_factory.mktemp("channels")
    model = talking_copy(family_checkpoint("qwen3_moe"), home / "m")
    engine = TorchEngine(model, dtype="float32", device="cpu")
    engine.profile(ITEMS, channels=True).save(home / "prof")
    assert engine.profile(ITEMS).layers[0].x2 is None
    engine.close()
    return model, home / "prof"


def matrices(model: Path, layer: int, expert: int) -> dict[str, torch.Tensor]:
    full = load_file(model / "model.safetensors")
    return {
        part: full[f"model.layers.{layer}.mlp.experts.{expert}.{part}_proj.weight"] for part in ("gate", "up", "down")
    }


def whole_plan(model: Path) -> Plan:
    checkpoint = Checkpoint.open(model)
    every = LayerPlan(tuple(range(E)), 2)
    return Plan(checkpoint.identity(), E, dict.fromkeys(checkpoint.moe_layers, every))


def test_the_sums_are_those_of_every_token_by_hand(profiled: tuple[Path, Path]) -> None:
    model, folder = profiled
    profile = Profile.load(folder)
    assert json.loads((folder / "profile.json").read_text())["format_version"] == 2
    engine = TorchEngine(model, dtype="float32", device="cpu")
    layer, seen = 2, []
    block = engine._model.model.layers[layer].mlp
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0][0].double()))
    with torch.no_grad():
        for item in ITEMS:
            engine._model(torch.tensor([engine.tokenize([item.prompt + item.answer])[0]]))
    x2, mid2 = torch.zeros(E, H, dtype=torch.float64), torch.zeros(E, I, dtype=torch.float64)
    for x in torch.cat(seen):
        p = (block.gate.weight.double() @ x).softmax(-1)
        values, ids = p.topk(2)
        for g, expert in zip(values / values.sum(), ids.tolist(), strict=True):
            w = {part: value.double() for part, value in matrices(model, layer, expert).items()}
            x2[expert] += (g * x) ** 2
            mid2[expert] += (g * torch.nn.functional.silu(w["gate"] @ x) * (w["up"] @ x)) ** 2
    found = profile.layers[layer]
    assert found.x2 is not None and found.mid2 is not None
    np.testing.assert_allclose(found.x2, x2.detach(), rtol=1e-4)
    np.testing.assert_allclose(found.mid2, mid2.detach(), rtol=1e-4)
    engine.close()


def test_scores_are_their_definitions(profiled: tuple[Path, Path]) -> None:
    model, folder = profiled
    profile, checkpoint = Profile.load(folder), Checkpoint.open(model)
    scores, channels = moe_pruner(profile, checkpoint), importance(profile, checkpoint)
    for layer, expert in ((0, 3), (3, 7)):
        w = {part: value.double().abs().numpy() for part, value in matrices(model, layer, expert).items()}
        x = np.sqrt(profile.layers[layer].x2[expert] / len(ITEMS))  # type: ignore[index]
        mid = np.sqrt(profile.layers[layer].mid2[expert] / len(ITEMS))  # type: ignore[index]
        expected = sum(float((w[part] * x).sum()) for part in ("gate", "up")) + float((w["down"] * mid).sum())
        assert scores[layer][expert] == pytest.approx(expected, rel=1e-6)
        own = [(w["gate"][c] * x).sum() + (w["up"][c] * x).sum() + (w["down"][:, c] * mid[c]).sum() for c in range(I)]
        np.testing.assert_allclose(channels[layer][expert], own, rtol=1e-6)


@pytest.mark.parametrize("share", [0.875, 0.75, 0.5])
def test_intra_really_narrows_and_stock_transformers_loads_it(
    profiled: tuple[Path, Path], tmp_path: Path, share: float
) -> None:
    from torch.utils.flop_counter import FlopCounterMode
    from transformers import AutoModelForCausalLM

    model, folder = profiled
    plan_file, out = tmp_path / "plan.json", tmp_path / "cut"
    assert (
        main(
            [
                "search",
                str(folder),
                "--model",
                str(model),
                "--method",
                "intra",
                "--budget",
                str(share),
                "-o",
                str(plan_file),
            ]
        )
        == 0
    )
    plan = Plan.load(plan_file)
    width = round(share * I)
    assert plan.is_uniform and {layer.width for layer in plan.layers.values()} == {width}
    assert main(["cut", str(model), str(plan_file), "-o", str(out)]) == 0
    report = verify(out, model)
    assert report.remade == 4 * E * 3
    assert json.loads((out / "config.json").read_text())["moe_intermediate_size"] == width
    scores = importance(Profile.load(folder), Checkpoint.open(model))
    for layer, expert in ((1, 0), (2, 5)):
        best = sorted(sorted(range(I), key=lambda c: -scores[layer][expert][c])[:width])
        assert list(plan.layers[layer].channels[expert]) == best
        old, new = matrices(model, layer, expert), matrices(out, layer, expert)
        assert torch.equal(new["gate"], old["gate"][best]) and torch.equal(new["up"], old["up"][best])
        assert torch.equal(new["down"], old["down"][:, best])

    # The same answers as the full model with the dropped channels' weights zeroed, in stock transformers.
    zero = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for index, layer in enumerate(zero.model.layers):
        for expert, kept in enumerate(plan.layers[index].channels):
            gone = sorted(set(range(I)) - set(kept))
            layer.mlp.experts.down_proj.data[expert][:, gone] = 0.0
    prompt = [5, 9, 130, 7, 7, 42, 3, 77]
    with torch.no_grad():
        wanted = zero(torch.tensor([prompt])).logits[0].log_softmax(-1)
    got = reference_logprobs(out, {}, [prompt])[0]
    assert (got - wanted).abs().max() <= 1e-5
    assert (got - reference_logprobs(model, {}, [prompt])[0]).abs().max() > 1e-3

    small = AutoModelForCausalLM.from_pretrained(out, attn_implementation="eager").eval()
    small.set_experts_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        small(torch.tensor([[7]]), use_cache=False)
    counted = counter.get_total_flops() - 4 * 2 * 2 * 2 * 32  # one token attends to itself alone
    assert counted == flops_per_token(Checkpoint.open(out)) == flops_per_token(Checkpoint.open(model), plan)
    assert parameters(Checkpoint.open(out)) == parameters(Checkpoint.open(model), plan)


def test_intra_on_a_subset_with_uneven_widths_needs_our_architecture(
    profiled: tuple[Path, Path], tmp_path: Path
) -> None:
    model, folder = profiled
    checkpoint, profile = Checkpoint.open(model), Profile.load(folder)
    base = Plan(checkpoint.identity(), E, {i: LayerPlan((0, 2, 3, 6 + i % 2), 2) for i in range(4)})
    plan = intra(profile, checkpoint, base, 0.5)
    assert all(len(layer.channels) == 4 for layer in plan.layers.values())
    wider = intra(profile, checkpoint, base, 0.75)
    uneven = Plan(plan.base, E, {**plan.layers, 3: wider.layers[3]})
    report = cut(model, uneven, tmp_path / "cut")
    assert report.architecture == "LeapQwen3MoeForCausalLM"
    assert verify(tmp_path / "cut", model).remade == 4 * 4 * 3
    assert json.loads((tmp_path / "cut" / "config.json").read_text())["moe_intermediate_size"] == 24
    assert parameters(Checkpoint.open(tmp_path / "cut")) == parameters(checkpoint, uneven)
    # A second cut would lose what the first recorded.
    again = Plan(Checkpoint.open(tmp_path / "cut").identity(), 4, {i: LayerPlan((0, 1), 2) for i in range(4)})
    with pytest.raises(UnsupportedError, match="second cut"):
        cut(tmp_path / "cut", again, tmp_path / "twice")
    far = {i: LayerPlan((0, 1), 2, channels=((0, 31), (4, 32))) for i in range(4)}
    with pytest.raises(PlanError, match="keeps channel 32 of an expert, the model's have 32"):
        cut(model, Plan(checkpoint.identity(), E, far), tmp_path / "far")
    assert not (tmp_path / "far").exists() and not (tmp_path / "twice").exists()


def test_zeroing_by_row_and_two_of_four() -> None:
    draw = np.random.default_rng(0)
    matrix, norms = draw.normal(size=(5, 12)).astype(np.float32), draw.exponential(size=12)
    found = zeroed(matrix, norms, "row", 0.25)
    for row, old in zip(found, matrix, strict=True):
        gone = set(np.argsort(np.abs(old) * norms, kind="stable")[:3].tolist())
        assert {int(j) for j in np.flatnonzero(row == 0)} == gone
        assert (row[row != 0] == old[row != 0]).all()
    paired = zeroed(matrix, norms, "2:4", 0.5).reshape(5, 3, 4)
    assert ((paired == 0).sum(-1) == 2).all()
    magnitudes = np.abs(matrix.reshape(5, 3, 4)) * norms.reshape(1, 3, 4)
    assert (np.where(paired != 0, magnitudes, np.inf).min(-1) >= np.where(paired == 0, magnitudes, 0).max(-1)).all()
    # An expert that nobody chose is zeroed by magnitude, not at random.
    assert (np.abs(zeroed(matrix, np.zeros(12), "row", 0.5)).sum() > np.abs(matrix).sum() / 2).all()


def test_the_unstructured_form_is_cut_and_says_what_it_does_not_save(
    profiled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = profiled
    out = tmp_path / "plan.json"
    command = ["search", str(folder), "--model", str(model), "--method", "moe-pruner", "-o", str(out), "--budget"]
    assert main([*command, "0.25", "--zero", "2:4"]) == 2 and not out.exists()
    assert main([*command, "0.5", "--zero", "2:4"]) == 0
    assert "neither memory nor time" in capsys.readouterr().out
    plan = Plan.load(out)
    assert plan.is_uniform
    cut(model, plan, tmp_path / "cut")
    assert verify(tmp_path / "cut", model).remade == 4 * E * 3
    profile = Profile.load(folder)
    old, new = matrices(model, 1, 4), matrices(tmp_path / "cut", 1, 4)
    mid2 = profile.layers[1].mid2
    assert mid2 is not None
    np.testing.assert_array_equal(new["down"], zeroed(old["down"].numpy(), np.sqrt(mid2[4]), "2:4", 0.5))
    assert all(float((value == 0).float().mean()) == 0.5 for value in new.values())
    # Another profile is not the one the plan speaks of.
    broken = (folder / "profile.json").read_text()
    (folder / "profile.json").write_text(broken.replace('tensors_sha256": "', 'tensors_sha256": "0'))
    with pytest.raises(LeapError, match="not the file"):
        verify(tmp_path / "cut", model)
    (folder / "profile.json").write_text(broken)


def test_several_budgets_show_what_tells_their_plans_apart(
    profiled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = profiled
    command = ["search", str(folder), "--model", str(model), "--budget", "0.5", "0.75", "--method"]
    assert main([*command, "moe-pruner", "--zero", "row", "-o", str(tmp_path / "zeroed"), "--json"]) == 0
    said = capsys.readouterr().out
    rows = json.loads((tmp_path / "zeroed" / "pareto.json").read_text())["plans"]
    assert json.loads(said.splitlines()[-1])["plans"] == rows and [row["share"] for row in rows] == [0.5, 0.75]
    for row, zeros in zip(rows, ("50%", "25%"), strict=True):
        (notice,) = row["notices"]
        assert notice.startswith(f"{zeros} of the experts' weights") and "neither memory nor time" in notice
        assert f"note ({row['plan']}): {notice}" in " ".join(said.split())
    assert main([*command, "intra", "-o", str(tmp_path / "narrow")]) == 0
    said = " ".join(capsys.readouterr().out.split())
    rows = json.loads((tmp_path / "narrow" / "pareto.json").read_text())["plans"]
    assert [row["share"] for row in rows] == [0.5, 0.75] and [row["retained"] for row in rows] == [32, 32]
    for row in rows:
        plan = Plan.load(tmp_path / "narrow" / row["plan"])
        assert row["flops_per_token"] == flops_per_token(Checkpoint.open(model), plan)
        assert f"{row['budget']} 32 {row['parameters']:,} {row['flops_per_token']:,} {row['plan']}" in said
        assert f"note ({row['plan']}): {row['notices'][0]}" in said

    base = tmp_path / "narrow" / "plan-0.5.json"
    assert main([*command, "intra", "-o", str(tmp_path / "twice"), "--on", str(base)]) == 2
    assert f"{base}: narrows experts; give a plan that only chooses experts" in capsys.readouterr().err


def test_the_expert_form_keeps_the_highest_and_refusals(
    profiled: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, folder = profiled
    out = tmp_path / "plan.json"
    command = ["search", str(folder), "--model", str(model), "-o", str(out), "--method"]
    assert main([*command, "moe-pruner", "--experts", "3"]) == 0
    scores = moe_pruner(Profile.load(folder), Checkpoint.open(model))
    for index, layer in Plan.load(out).layers.items():
        assert set(layer.retained) == set(np.argsort(-scores[index], kind="stable")[:3].tolist())
    out.unlink()
    for flags, said in (
        (["intra", "--experts", "3"], "give --budget"), (["intra", "--budget", "1.5"], "not a fraction"),
        (["intra", "--budget", "0.5", "--top-k", "1"], "--top-k"), (["intra", "--budget", "0.5", "--zero", "row"], "--zero"),
        (["moe-pruner", "--budget", "0.5", "--zero", "row", "--on", "x"], "--on"),
        (["moe-pruner", "--budget", "0.5", "--zero", "row", "--temperature", "2"], "--temperature"),
        (["intra", "--budget", "0.5", "--on", "x", "--temperature", "2"], "--temperature"),
    ):  # fmt: skip
        assert main([*command, *flags]) == 2
        assert said in capsys.readouterr().err and not out.exists()
    engine = TorchEngine(model, dtype="float32", device="cpu")
    engine.profile(ITEMS).save(tmp_path / "plain")
    engine.close()
    assert main(["search", str(tmp_path / "plain"), "--method", "intra", "--budget", "0.5", "-o", str(out)]) == 2
    assert "profile again with --channels" in capsys.readouterr().err


def test_experts_in_one_tensor_with_the_weight_on_the_input(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = talking_copy(family_checkpoint("llama4_text"), tmp_path / "m")
    engine = TorchEngine(model, dtype="float32", device="cpu")
    engine.profile(ITEMS, channels=True).save(tmp_path / "prof")
    profile, checkpoint = Profile.load(tmp_path / "prof"), Checkpoint.open(model)
    layer, seen = checkpoint.moe_layers[-1], []
    block = engine._model.model.layers[layer].feed_forward
    block.register_forward_pre_hook(lambda _, args: seen.append(args[0].reshape(-1, args[0].shape[-1]).double()))
    with torch.no_grad():
        for item in ITEMS:
            engine._model(torch.tensor([engine.tokenize([item.prompt + item.answer])[0]]))
    engine.close()
    full = load_file(model / "model.safetensors")
    at = f"model.layers.{layer}.feed_forward."
    both, down = full[f"{at}experts.gate_up_proj"].double(), full[f"{at}experts.down_proj"].double()
    experts, hidden, width = both.shape[0], both.shape[1], both.shape[2] // 2
    x2, mid2 = torch.zeros(experts, hidden, dtype=torch.float64), torch.zeros(experts, width, dtype=torch.float64)
    for x in torch.cat(seen):
        score, expert = (full[f"{at}router.weight"].double() @ x).max(0)
        inside = score.sigmoid() * x
        x2[expert] += inside**2
        mid2[expert] += (
            torch.nn.functional.silu(inside @ both[expert, :, :width]) * (inside @ both[expert, :, width:])
        ) ** 2
    found = profile.layers[layer]
    assert found.x2 is not None and found.mid2 is not None
    np.testing.assert_allclose(found.x2, x2, rtol=1e-4)
    np.testing.assert_allclose(found.mid2, mid2, rtol=1e-4)
    # |W| summed over outputs, times what comes in: gate and up read the input, down the intermediate.
    x, mid = (x2 / len(ITEMS)).sqrt(), (mid2 / len(ITEMS)).sqrt()
    expected = (both.abs().sum(2) * x).sum(1) + (down.abs().sum(2) * mid).sum(1)
    np.testing.assert_allclose(moe_pruner(profile, checkpoint)[layer], expected, rtol=1e-4)

    out = tmp_path / "plan.json"
    command = ["search", str(tmp_path / "prof"), "--model", str(model), "-o", str(out), "--method"]
    for flags, said in (
        (["moe-pruner", "--budget", "0.5", "--zero", "row"], "fused in one tensor"),
        (["intra", "--budget", "0.5"], "shared expert"),
    ):
        assert main([*command, *flags]) in (1, 2)
        assert said in capsys.readouterr().err and not out.exists()
    assert main([*command, "moe-pruner", "--experts", "2"]) == 0
    cut(model, Plan.load(out), tmp_path / "cut")


def test_families_whose_channels_cannot_be_seen_are_refused(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = talking_copy(family_checkpoint("gpt_oss"), tmp_path / "m")
    engine = TorchEngine(model, dtype="float32", device="cpu")
    with pytest.raises(UnsupportedError, match="SiLU experts of one gate, up and down"):
        engine.profile(ITEMS, channels=True)
    engine.close()


def test_rounding_to_bfloat16_is_torchs() -> None:
    value = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    ours = torch.from_numpy(rounded(value.numpy(), "BF16").view(np.int16)).view(torch.bfloat16)
    assert torch.equal(ours, value.bfloat16())
