"""Joint tuning on a tiny random cut: the same curve after a kill, every part switched off alone, and the router's test."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cutting import plan_for
from leap_serve.checkpoint import resolve_model
from leap_serve.cut.export import export
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError, UsageError
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import load_task
from leap_training.active_learning import BY_ANSWER, Acquisition
from leap_training.batches import Batch, collate
from leap_training.distill import Teacher
from leap_training.tune import Tuner, dealt
from leap_training.tune_config import TuneConfig, TuneData
from leap_training.tune_result import keep_router, report_of, sign_flip_test, signed_ranks, write_tuned
from leap_training.tune_state import STATE
from parity import uneven_plan
from tiny_tokenizer import talking_copy
from tune_runs import DATA, SMALL, tuned


@pytest.fixture(scope="module")
def small_cut(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tune")
    whole = talking_copy(family_checkpoint("qwen3_moe"), folder / "whole")
    cut(whole, plan_for(whole, lambda layer: (0, 2, 3, 5, 7)), folder / "cut")
    return folder / "cut"


def changed(tuner: Tuner, folder: Path) -> set[str]:
    """Which parts differ from those of an untouched run."""
    fresh = Tuner(folder, DATA, tuner.config)
    names = {name for name, p in tuner.tuned.items() if not torch.equal(p, fresh.tuned[name])}
    return {"router" if name.startswith("router.") else "experts" for name in names}


class Killed(Exception):
    pass


def killing(after: int) -> Callable[[int, int, str], None]:
    """A report of progress that ends the run after so many ticks."""

    def kill(done: int, _total: int, note: str) -> None:
        if done == after and not note.startswith("scoring"):
            raise Killed

    return kill


@pytest.fixture(scope="module")
def whole(small_cut: Path) -> Tuner:
    """A run that nothing interrupted."""
    return tuned(small_cut)


@pytest.mark.parametrize("after", [1, 4, 6])
def test_a_run_that_was_ended_anywhere_continues_to_the_same_curve(
    small_cut: Path, whole: Tuner, tmp_path: Path, after: int
) -> None:
    with pytest.raises(Killed):
        Tuner(small_cut, DATA, SMALL, tmp_path).run(killing(after))
    again = Tuner(small_cut, DATA, SMALL, tmp_path)
    assert again.progress.tick == after
    again.run()
    assert again.progress.curve == whole.progress.curve and len(whole.progress.curve) == 2
    assert again.pool.state() == whole.pool.state()
    for name, parameter in whole.tuned.items():
        assert torch.equal(parameter, again.tuned[name]), name
    assert changed(again, small_cut) == {"router", "experts"}


def test_a_state_of_another_run_or_a_damaged_one_is_refused(small_cut: Path, tmp_path: Path) -> None:
    tuned(small_cut, replace(SMALL, rounds=1, steps=1, rl_router=False), tmp_path)
    with pytest.raises(LeapError, match="other settings"):
        Tuner(small_cut, DATA, SMALL, tmp_path)
    (tmp_path / STATE).write_bytes((tmp_path / STATE).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="no state of leap tune"):
        Tuner(small_cut, DATA, SMALL, tmp_path)


@pytest.mark.parametrize(
    ("switch", "moves"),
    [
        ({"rl_router": False, "supervised_router": False}, {"experts"}),
        ({"experts": "none", "supervised_router": False}, {"router"}),
        ({"rl_router": False, "experts": "none"}, {"router"}),
        ({"experts": "full", "rl_router": False, "supervised_router": False}, {"experts"}),
        ({"rl_router": False}, {"experts", "router"}),
    ],
)
def test_a_part_that_is_switched_off_stays_as_it_was(small_cut: Path, switch: dict[str, Any], moves: set[str]) -> None:
    config = replace(SMALL, rounds=1, steps=2, acquisition=Acquisition(strategy="random"), **switch)
    assert changed(tuned(small_cut, config), small_cut) == moves


def test_tuning_the_experts_lowers_the_validation_loss(small_cut: Path) -> None:
    tuner = Tuner(small_cut, DATA, replace(SMALL, rounds=1, steps=30, labels=40, rl_router=False))
    before = tuner.item_losses(DATA.stopping)[0].mean()
    tuner.run()
    after = tuner.item_losses(DATA.stopping)[0].mean()
    assert after < before - 0.3
    assert after == pytest.approx(tuner.progress.curve[-1]["validation_loss"], abs=1e-6)


def test_a_teacher_keeps_adapters_and_router_nearer_to_the_full_model(small_cut: Path) -> None:
    whole = small_cut.parent / "whole"

    def apart(settings: TuneConfig) -> float:
        """KL(full model ‖ tuned) over answer tokens."""
        tuner = tuned(small_cut, settings)
        batch = collate(tuner.tokenizer, DATA.stopping, 0.0)
        with torch.no_grad():
            logits = tuner.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        teacher = Teacher(whole, tuner.base, tuner.checkpoint.family, {}, "logits")
        return float(teacher(batch, logits, float(batch.weights[:, 1:].sum())))

    alone = replace(SMALL, steps=30, patience=0, acquisition=BY_ANSWER)
    assert apart(replace(alone, distill="logits", teacher=str(whole))) < 0.7 * apart(alone)


def test_the_best_round_comes_back_and_patience_ends_the_run(small_cut: Path) -> None:
    """Validation items that contradict the pool: the more is learned, the worse they get."""
    contrary = replace(DATA, stopping=[Item(f"v/{n}", item.prompt, "XYZXYZ") for n, item in enumerate(DATA.stopping)])
    config = replace(
        SMALL, rounds=6, steps=36, labels=6, patience=2, rl_router=False, supervised_router=False, experts="full",
        learning_rate=0.02, acquisition=Acquisition(strategy="random"),
    )  # fmt: skip
    tuner = Tuner(small_cut, contrary, config)
    tuner.run()
    losses = [row["validation_loss"] for row in tuner.progress.curve]
    assert tuner.progress.stopped and len(losses) < 6 and losses.index(min(losses)) == len(losses) - 3
    before = tuner.progress.before
    assert before is not None and tuner.progress.best == (losses.index(min(losses)) if min(losses) < before else -1)
    assert tuner.item_losses(contrary.stopping)[0].mean() == pytest.approx(min(before, *losses), abs=1e-6)


def test_a_run_in_which_no_round_helps_leaves_the_cut_as_it_was(tmp_path: Path) -> None:
    """A trained model that lost 4 of 64 experts, and steps that wreck it."""
    whole, ckpt = resolve_model("leap-tiny"), tmp_path / "cut"
    cut(whole, plan_for(whole, lambda layer: range(60)), ckpt)
    items = load_task("toy-gsm").items("train", 60)
    data = TuneData(items[:30], DATA.tests, items[30:40], items[40:])
    config = replace(SMALL, learning_rate=1.0)
    with pytest.raises(Killed):
        Tuner(ckpt, data, config, tmp_path / "state").run(killing(4))
    tuner = Tuner(ckpt, data, config, tmp_path / "state")
    tuner.run()
    report = report_of(tuner, keep_router(tuner))
    fresh = Tuner(ckpt, data, config)
    untouched = float(fresh.item_losses(data.stopping)[0].mean())
    assert min(row["validation_loss"] for row in report["curve"]) > untouched + 1.0
    assert all(torch.equal(p, fresh.tuned[name]) for name, p in tuner.tuned.items())
    assert (report["best_round"], report["router"]["kept"]) == (0, False)
    # What it says of the cut is measured on the cut, also by a run that was taken up again.
    assert report["validation_loss_before"] == pytest.approx(untouched, abs=1e-6)


@pytest.mark.parametrize(("experts", "constant"), [("lora", 0.768), ("full", 0.384)])
def test_the_default_rate_falls_with_the_width_and_is_reported(small_cut: Path, experts: Any, constant: float) -> None:
    tuner = Tuner(small_cut, DATA, replace(SMALL, learning_rate=None, experts=experts))
    rate = constant / tuner.base.config.hidden_size
    assert tuner.config.learning_rate == rate
    assert report_of(tuner, None, task="t")["config"]["learning_rate"] == rate


def gradients(folder: Path, **settings: Any) -> dict[str, torch.Tensor]:
    tuner = Tuner(folder, DATA, replace(SMALL, **settings))
    batch = collate(tuner.tokenizer, DATA.pool[:5], 0.0)
    with torch.no_grad():
        for name, parameter in tuner.experts.items():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.1, generator=torch.Generator().manual_seed(len(name)))
    tuner._expert_step(batch, 0)
    assert all(float(p.grad.abs().max()) > 0 for p in tuner.tuned.values() if p.grad is not None)
    return {name: p.grad.clone() for name, p in tuner.tuned.items() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"accumulate": 3}, {"checkpointing": True}])
def test_accumulation_and_checkpointing_change_no_gradient(small_cut: Path, settings: dict[str, Any]) -> None:
    plain, other = gradients(small_cut), gradients(small_cut, **settings)
    assert len(plain) == len(other) == 4 * 4 + 4
    for name, gradient in plain.items():
        torch.testing.assert_close(gradient, other[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("experts", ["lora", "full"])
def test_checkpointing_computes_every_layer_twice_and_nothing_drops_out(small_cut: Path, experts: Any) -> None:
    """Choosing labels must not switch the model to training mode, nor checkpointing off."""
    for checkpointing, passes in ((False, 1), (True, 2)):
        tuner = Tuner(small_cut, DATA, replace(SMALL, experts=experts, checkpointing=checkpointing))
        layers = [block for name, block in tuner.base.named_modules() if name.endswith(".mlp")]
        calls: list[int] = []
        for layer in layers:
            layer.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        batch = collate(tuner.tokenizer, DATA.pool[:5], 0.0)
        for _ in range(2):
            calls.clear()
            tuner._expert_step(batch, 0)
            assert len(calls) == passes * len(layers) > 0
            assert not any(module.training for name, module in tuner.base.named_modules() if name.endswith("self_attn"))
            tuner._label()


def test_no_step_passes_more_items_at_once_than_accumulation_allows(small_cut: Path) -> None:
    """Router steps, expert steps and validation alike: what is at once in memory is what the user asked for."""
    tuner = Tuner(small_cut, DATA, replace(SMALL, batch=8, accumulate=4))
    rows: list[int] = []
    tuner.base.model.register_forward_pre_hook(
        lambda _, args, kwargs: rows.append(len(kwargs["input_ids"])), with_kwargs=True
    )
    batch = collate(tuner.tokenizer, DATA.pool[:8], 0.0)
    found = tuner._router_step(batch)
    tuner._expert_step(batch, 0)
    tuner.item_losses(DATA.stopping)
    assert set(rows) == {2} and len(rows) == 2 * 4 + 4 + len(DATA.stopping) // 2
    assert all(np.isfinite(value) for value in found.values())
    # The pool, too: 40 prompts, each pair of which decodes an answer of at least one token.
    rows.clear()
    tuner._label()
    assert set(rows) == {2} and len(rows) >= 2 * len(DATA.pool) // 2


@pytest.mark.parametrize("tokens", [64, 2])
def test_processes_gather_equally_many_samples_however_their_rows_divide(small_cut: Path, tokens: int) -> None:
    """Five rows on two processes, in three parts: three parts of one row, and two of one; 64 divides by 2 alone."""
    assert [dealt(5, 3), dealt(2, 3), dealt(64, 2)] == [[1, 2, 2], [0, 1, 1], [32, 32]]
    router = replace(SMALL.router, tokens=tokens)
    tuner = Tuner(small_cut, DATA, replace(SMALL, batch=5, accumulate=3, router=router))
    batch = collate(tuner.tokenizer, DATA.pool[:5], 0.0)
    for rank in (0, 1):
        own = Batch(*(t[rank::2] for t in batch))
        rollout, metrics = tuner._rollout(own, torch.Generator().manual_seed(rank))
        sizes = {len(part) for part in (rollout.observations, rollout.actions, rollout.logprobs, rollout.values,
                                        rollout.advantages, rollout.returns)}  # fmt: skip
        assert sizes == {tokens} and all(np.isfinite(value) for value in metrics.values())


def test_scoring_the_pool_reports_counts_of_its_own(small_cut: Path) -> None:
    """A bar that follows them moves while no tick passes; the run's own counts go on behind it."""
    seen: list[tuple[int, int, str]] = []
    tuner = Tuner(small_cut, DATA, SMALL)
    tuner.run(lambda *told: seen.append(told))
    for number, pool in ((1, 40), (2, 28)):
        scored = [told[:2] for told in seen if told[2] == f"scoring the pool for round {number}"]
        assert scored == [(done, pool) for done in range(0, pool + 1, SMALL.batch)]
    ticks = [told[:2] for told in seen if not told[2].startswith("scoring")]
    assert ticks == [(tick, tuner.total) for tick in range(1, tuner.total + 1)]


def test_minibatches_visit_every_labelled_item_once_per_epoch(small_cut: Path) -> None:
    tuner = Tuner(small_cut, DATA, replace(SMALL, acquisition=Acquisition(strategy="random")))
    tuner._label()
    seen = [item.id for place in range(3) for item in tuner._minibatch(0, place)]
    again = [item.id for place in range(3, 6) for item in tuner._minibatch(0, place)]
    assert sorted(seen) == sorted(again) == sorted(item.id for item in tuner.pool.labelled)
    assert seen != again


def test_sign_flips_agree_with_enumeration() -> None:
    differences = np.random.default_rng(3).normal(0.4, 1.0, size=12)
    signs = np.array(list(itertools.product((-1.0, 1.0), repeat=12)))
    exact = float((signs @ differences >= differences.sum() - 1e-12).mean())
    assert sign_flip_test(differences) == pytest.approx(exact, abs=0.015)
    assert sign_flip_test(np.ones(30)) < 0.001
    assert sign_flip_test(np.zeros(30)) == 1.0


def test_one_item_does_not_outweigh_all_others_in_the_routers_test() -> None:
    assert signed_ranks(np.array([0.5, -0.1, 0.0, 0.1, -9.0])).tolist() == [3.0, -1.5, 0.0, 1.5, -4.0]
    gains = np.full(200, 0.01)
    gains[0] = -1.5
    assert gains.mean() > 0 and sign_flip_test(gains) > 0.1
    assert sign_flip_test(signed_ranks(gains)) < 0.001
    gains[1::2] *= -1
    assert sign_flip_test(signed_ranks(gains)) > 0.3


def test_a_router_that_does_not_help_goes_and_one_that_does_stays(small_cut: Path) -> None:
    """Experts that were tuned under one router are worse under its mirror image."""
    tuner = tuned(small_cut, replace(SMALL, rounds=1, steps=40, labels=40, rl_router=False))
    own = [head.weight.detach().clone() for head in tuner.agent.heads]

    def judged(tuned_router: float, sliced_router: float) -> bool:
        with torch.no_grad():
            for head, weight in zip(tuner.agent.heads, own, strict=True):
                head.weight.copy_(tuned_router * weight)
                head.sliced_weight.copy_(sliced_router * weight)
        found = keep_router(tuner)
        assert found["items"] == len(DATA.router)
        assert (found["shipped_loss"] is None) == found["kept"]
        assert all(
            torch.equal(head.weight, (1.0 if found["kept"] else sliced_router) * weight)
            for head, weight in zip(tuner.agent.heads, own, strict=True)
        )
        return bool(found["kept"])

    assert judged(1.0, -1.0)
    assert not judged(-1.0, 1.0)
    assert not judged(1.0, 1.0)
    # Adapters that are worse than nothing without their router go with it.
    empty = [p for name, p in tuner.experts.items() if ".lora_B" in name and not p.any()]
    tuner.progress.before = 0.0
    assert not empty and not judged(1.0, 1.0)
    assert not any(p.any() for name, p in tuner.experts.items() if ".lora_B" in name)


def test_a_bf16_model_is_tuned_through_fp32_adapters_and_routers(small_cut: Path) -> None:
    tuner = tuned(small_cut, replace(SMALL, rounds=1, steps=2, dtype="bfloat16"))
    assert tuner.base.dtype == torch.bfloat16
    assert {p.dtype for p in tuner.tuned.values()} == {torch.float32}
    assert changed(tuner, small_cut) == {"router", "experts"}


def test_an_item_of_the_test_split_in_the_pool_is_refused(small_cut: Path) -> None:
    leaking = replace(DATA, pool=[*DATA.pool, DATA.tests[3]])
    with pytest.raises(LeapError, match="9/3"):
        Tuner(small_cut, leaking, SMALL)


def test_an_uneven_cut_is_tuned_and_its_export_answers_as_was_measured(
    family_checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    """Layers of 5, 2, 7 and 4 experts with top_k 2, 2, 1, 2 and τ of their own: router, adapters, overlays, export."""
    whole = talking_copy(family_checkpoint("qwen3_moe"), tmp_path / "whole")
    plan = uneven_plan(whole)
    cut(whole, plan, tmp_path / "cut")
    config = replace(SMALL, rounds=1, steps=30, labels=40)
    tuner = Tuner(tmp_path / "cut", DATA, config)
    before = tuner.item_losses(DATA.stopping)[0].mean()
    tuner.run()
    losses = tuner.item_losses(DATA.stopping)[0]
    assert losses.mean() < before - 0.3
    assert changed(tuner, tmp_path / "cut") == {"router", "experts"}
    assert [len(rows["weight"]) for rows in tuner.agent.router_head().values()] == plan.counts
    report = report_of(tuner, {"kept": True})
    write_tuned(tuner, tmp_path / "cut", report)
    export(tmp_path / "cut", tmp_path / "plain")
    plain = Tuner(tmp_path / "plain", DATA, config)
    np.testing.assert_allclose(plain.item_losses(DATA.stopping)[0], losses, atol=1e-4)


def test_a_pool_that_is_used_up_ends_the_labelling_but_not_the_run(small_cut: Path) -> None:
    tuner = tuned(small_cut, replace(SMALL, rounds=3, labels=30, rl_router=False))
    assert [row["labels"] for row in tuner.progress.curve] == [30, 40, 40]


def test_settings_that_cannot_run_are_all_named() -> None:
    with pytest.raises(
        UsageError, match=r"labels is 0, less than 1; 6 steps do not divide into 4 rounds; nothing is left to tune"
    ):
        replace(SMALL, labels=0, rounds=4, experts="none", rl_router=False, supervised_router=False).check()


def test_the_report_names_labels_curve_and_origin(whole: Tuner) -> None:
    report = report_of(whole, None, task="toy")
    assert report["labels"] == 24 and [row["labels"] for row in report["curve"]] == [12, 24]
    assert report["made_by"]["task"] == "toy" and len(report["fingerprint"]) == 64


def test_items_longer_than_others_are_padded_without_effect(small_cut: Path) -> None:
    tuner = Tuner(small_cut, DATA, SMALL)
    together, _ = tuner.item_losses(DATA.stopping)
    alone = [float(tuner.item_losses([item])[0][0]) for item in DATA.stopping]
    assert together.tolist() == pytest.approx(alone, abs=1e-5)
    assert isinstance(collate(tuner.tokenizer, DATA.stopping, 0.0), Batch)
