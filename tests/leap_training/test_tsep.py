"""TSEP: the rule by hand, training against the same steps on the cut, and a run that is killed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cut_blocks import ITEMS, open_model
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.verify import verify
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import CheckpointError, UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_training.batches import collate
from leap_training.finetune import FinetuneConfig, in_order
from leap_training.methods.blocks import BlockModel
from leap_training.methods.tsep import Tsep, TsepConfig, drop
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import Routing

CONFIG = TsepConfig(FinetuneConfig(items=3, steps=8, batch=2, lr=1e-3), beta=0.9, windows=2)


def run_of(model: BlockModel, state: Path | None = None, experts: int = 4, config: TsepConfig = CONFIG) -> Tsep:
    space = PruningSpace.of(Routing.of(model.checkpoint), experts=experts)
    return Tsep(model, space, ITEMS, config, state, {"n": 1})


def test_who_is_dropped_at_a_window() -> None:
    share = [0.4, 0.01, 0.3, 0.005, 0.285, 0.0]
    alive = (0, 1, 2, 3, 4)
    # 0.1 / 5 = 0.02: two are below.
    assert drop(share, alive, 2, 0.1, force=False) == (0, 2, 4)
    assert drop(share, alive, 4, 0.1, force=False) == (0, 1, 2, 4), "never below the target, the better one stays"
    assert drop(share, alive, 2, 0.1, force=True) == (0, 2)
    assert drop([0.2] * 5, alive, 2, 0.1, force=False) == alive
    assert drop([0.2] * 5, alive, 2, 0.1, force=True) == (0, 1), "ties go to the lower id"


def test_windows_end_by_half_of_the_steps() -> None:
    assert TsepConfig(FinetuneConfig(steps=400)).ends == tuple(range(20, 201, 20))
    assert TsepConfig(FinetuneConfig(steps=8), windows=10).ends == (1, 2, 3, 4)
    with pytest.raises(UsageError, match="1 steps"):
        TsepConfig(FinetuneConfig(steps=1)).check()


def test_experts_are_dropped_by_their_weight_and_the_tuned_model_is_the_cut(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    before = {name: value.clone() for name, value in model.model.named_parameters()}
    # What the first window must see: two steps of two items each; its first step by hand, on the untouched model.
    run, masses = run_of(model), []
    seen: list[torch.Tensor] = []

    def watch(done: int, _total: int) -> None:
        masses.append({index: value.clone() for index, value in run.mass.items()})

    handle = model.layers[1].router.register_forward_hook(lambda _m, _a, out: seen.append(out[0].detach().clone()))
    plan = run.run(watch, task="t")
    handle.remove()
    assert plan.counts == [4] * 4 and plan.made_by["method"] == "tsep" and plan.made_by["task"] == "t"
    p = seen[0].double().softmax(-1)
    values, ids = p.topk(2)
    dense = torch.zeros_like(p).scatter_(1, ids, values / values.sum(-1, keepdim=True))
    order = in_order(ITEMS, CONFIG.tuning)
    masks = [collate(model.tokenizer, items, prompt_weight=0.0).mask.bool() for items in order]
    torch.testing.assert_close(masses[0][1], dense[masks[0].flatten()].sum(0), rtol=1e-4, atol=1e-4)
    # A token's weights sum to 1, padding has none, and a window begins with nothing; after the last all is summed.
    assert not all(mask.all() for mask in masks[4:]), "some item is padded"
    assert float(masses[2][1].sum()) == pytest.approx(int(masks[2].sum()), rel=1e-4)
    assert float(masses[7][1].sum()) == pytest.approx(sum(int(mask.sum()) for mask in masks[4:]), rel=1e-4)
    assert [window["step"] for window in plan.made_by["windows"]] == [2, 4]
    changed = {name for name, value in model.model.named_parameters() if not torch.equal(value, before[name])}
    assert changed and all(".experts." in name or ".gate." in name for name in changed)

    run.save_tuned(tmp_path / "tuned", plan)
    assert {p.name for p in tmp_path.iterdir()} == {"qwen3_moe", "tuned"}
    written = Checkpoint.open(tmp_path / "tuned")
    assert written.plan == plan and written.trained["report"] == "tsep.json"
    assert json.loads((tmp_path / "tuned" / "tsep.json").read_text())["method"] == "tsep"
    assert verify(tmp_path / "tuned").fingerprint == plan.fingerprint
    with pytest.raises(CheckpointError, match=r"was trained \(tsep.json\).*no longer the base's"):
        verify(tmp_path / "tuned", tmp_path / "qwen3_moe")
    engine = TorchEngine(tmp_path / "tuned", dtype="float32", device="cpu")
    full = [ids for ids in model.encode(ITEMS)]
    from leap_serve.engines.torch_subsets import masked_routers

    with torch.no_grad(), masked_routers(model.model, model.family) as routers:
        routers.assign([plan])
        for one in full:
            wanted = model.model(torch.tensor([one])).logits
            got = engine._model(torch.tensor([one])).logits
            assert (got - wanted).abs().max() < 1e-3
    engine.close()


def test_a_run_that_is_killed_ends_as_one_that_is_not(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(done: int, _total: int) -> None:
        if done == 3:  # after the first window, whose state lies on the disk
            raise Killed

    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    whole = run_of(model)
    plan = whole.run()
    again = BlockModel(Checkpoint.open(model.checkpoint.folder))
    with pytest.raises(Killed):
        run_of(again, tmp_path / "state").run(kill)
    fresh = BlockModel(Checkpoint.open(model.checkpoint.folder))
    resumed = run_of(fresh, tmp_path / "state")
    steps: list[int] = []
    assert resumed.run(lambda done, _: steps.append(done)).fingerprint == plan.fingerprint
    assert steps[0] == 3 and resumed.losses == pytest.approx(whole.losses, rel=1e-4)
    other = Tsep(fresh, resumed.space, ITEMS, CONFIG, tmp_path / "state", {"n": 2})
    with pytest.raises(UsageError, match="n is 1 there and 2 now"):
        other.run()
    (tmp_path / "state" / "state" / "tsep.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(CheckpointError, match="is no state of tsep"):
        other.run()


def test_the_second_half_is_saved_too(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    assert TsepConfig(FinetuneConfig(steps=400)).saves == tuple(range(20, 401, 20))

    class Killed(Exception):
        pass

    def kill(done: int, _total: int) -> None:
        if done == 7:
            raise Killed

    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    with pytest.raises(Killed):
        run_of(model, tmp_path / "state").run(kill)
    resumed, steps = run_of(BlockModel(Checkpoint.open(model.checkpoint.folder)), tmp_path / "state"), list[int]()
    resumed.run(lambda done, _: steps.append(done))
    assert steps == [7, 8] and len(resumed.losses) == 8


def test_the_command(
    family_checkpoint: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = open_model(family_checkpoint, "qwen3_moe", tmp_path)
    out = tmp_path / "plan.json"
    command = ["search", str(model.checkpoint.folder), "--method", "tsep", "--experts", "4", "-o", str(out)]
    for flags, said in (([], "needs --task"), (["--task", "toy-gsm", "--on", "x"], "--on"),
                        (["--task", "toy-gsm", "--steps", "1"], "1 steps"),
                        (["--task", "toy-gsm", "--tuned", __file__], "is a file")):  # fmt: skip
        assert main([*command, *flags]) == 2
        assert said in capsys.readouterr().err and not out.exists()
    # Its own model is never replaced, whatever --force says.
    folder = model.checkpoint.folder
    for place, said in (
        (folder, "lies in the source"),
        (folder / "in", "lies in the source"),
        (folder.parent, "holds the source"),
    ):
        assert main([*command, "--task", "toy-gsm", "--tuned", str(place), "--force"]) == 2
        err = capsys.readouterr().err
        assert f"{place}: {said}" in err and err.endswith("choose another --tuned\n") and not out.exists()
    assert Checkpoint.open(folder).identity() == model.checkpoint.identity()
    tuned = tmp_path / "tuned"
    more = ["--task", "toy-gsm", "--steps", "2", "--train-items", "2", "--tuned", str(tuned)]
    assert main([*command, *more]) == 0
    made = Plan.load(out).made_by
    assert f"loss in training {made['first_loss']:.4f} → {made['last_loss']:.4f}" in capsys.readouterr().out
    assert Plan.load(out).counts == [4] * 4 == Checkpoint.open(tuned).plan.counts  # type: ignore[union-attr]
    assert all(isinstance(layer, LayerPlan) and layer.is_masking for layer in Plan.load(out).layers.values())
    out.unlink()
    assert main([*command, *more]) == 2 and "not empty" in capsys.readouterr().err
