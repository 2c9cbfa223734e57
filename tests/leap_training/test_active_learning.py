"""Uncertainty and states against their definitions, batches of every kind, and a pool that resumes where it was."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import load_task
from leap_training import active_learning
from leap_training.active_learning import Acquisition, Features, Pool, collect, select
from leap_training.batch_choice import objective
from tiny_tokenizer import add_tokenizer

ITEMS = [
    Item(str(n), text, " 7")
    for n, text in enumerate(("a", "What is 3+4?", "seven eight nine ten", "b c", "What is 3+4?x"))
] + [Item("text", "", "plain text")]  # fmt: skip
T = 0.7
"""The temperature of eq. 16 in these tests."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(add_tokenizer(tmp_path_factory.mktemp("tokenizer")))


@pytest.fixture(scope="module")
def load(family_checkpoint: Callable[[str], Path]) -> Callable[[str], Any]:
    from transformers import AutoModelForCausalLM

    return lambda family: AutoModelForCausalLM.from_pretrained(family_checkpoint(family), dtype=torch.float32)


@torch.no_grad()
def by_definition(model: Any, tokenizer: Any, item: Item) -> tuple[list[list[float]], list[list[float]], torch.Tensor]:
    """One item alone, without padding: entropy and margin [L][S] of softmax(W_r h + b)/T, and h [L, H]."""
    inputs: dict[str, torch.Tensor] = {}
    routers = {name: m for name, m in model.named_modules() if name.endswith((".gate", ".router"))}
    handles = [
        router.register_forward_pre_hook(lambda _m, args, name=name: inputs.__setitem__(name, args[0]))
        for name, router in routers.items()
    ]
    model(input_ids=torch.tensor([tokenizer(item.prompt or item.answer, add_special_tokens=False)["input_ids"]]))
    for handle in handles:
        handle.remove()
    entropies, margins, states = [], [], []
    for name, router in routers.items():
        x = inputs[name].reshape(-1, router.weight.shape[1])
        bias = getattr(router, "bias", None)
        z = x.double() @ router.weight.double().T + (0 if bias is None else bias.double())
        p = (z / T).exp() / (z / T).exp().sum(1, keepdim=True)
        entropies.append([-sum(v * v.log() for v in row).item() for row in p])
        margins.append([1 - row.sort().values[-1].item() + row.sort().values[-2].item() for row in p])
        mean = x.mean(0)
        states.append(mean / mean.norm())
    return entropies, margins, torch.stack(states)


@pytest.mark.parametrize("family", ["qwen3_moe", "llama4_text", "glm4_moe", "gpt_oss"])
def test_features_follow_their_definitions(family: str, load: Callable[[str], Any], tokenizer: Any) -> None:
    """Softmax, sigmoid, sigmoid with a correction bias (one layer dense), and a router with a bias of its own."""
    model = load(family).train()
    seen: list[tuple[int, int]] = []
    found = {
        (what, layers): collect(
            model, tokenizer, ITEMS, Acquisition(uncertainty=what, layers=layers, al_temperature=T), batch=4,
            progress=lambda done, total: seen.append((done, total)),
        )
        for what, layers in (("entropy", "mean"), ("margin", "last"), ("entropy", "first"))
    }  # fmt: skip
    assert model.training, "the training mode is left as it was"
    assert seen[:2] == [(4, 6), (6, 6)]
    model.eval()
    for number, item in enumerate(ITEMS):
        entropies, margins, states = by_definition(model, tokenizer, item)

        def mean(values: list[list[float]]) -> float:
            return sum(sum(layer) / len(layer) for layer in values) / len(values)

        assert found["entropy", "mean"].u[number].item() == pytest.approx(mean(entropies), abs=1e-4)
        assert found["margin", "last"].u[number].item() == pytest.approx(mean(margins[-1:]), abs=1e-4)
        assert found["entropy", "first"].u[number].item() == pytest.approx(mean(entropies[:1]), abs=1e-4)
        whole = states.flatten() / len(states) ** 0.5
        assert (found["entropy", "mean"].h[number] - whole).abs().max() < 1e-4
        assert (found["margin", "last"].h[number] - states[-1]).abs().max() < 1e-4
    assert found["entropy", "mean"].u.std() > 1e-3, "the items differ"


def test_output_entropy_and_no_uncertainty(load: Callable[[str], Any], tokenizer: Any) -> None:
    model = load("qwen3_moe").eval()
    found = collect(model, tokenizer, ITEMS, Acquisition(uncertainty="output"), batch=3)
    for number, item in enumerate(ITEMS):
        ids = tokenizer(item.prompt or item.answer, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            p = model(input_ids=torch.tensor([ids])).logits[0].double().softmax(-1)
        assert found.u[number].item() == pytest.approx(-(p * p.log()).sum(-1).mean().item(), abs=1e-4)
    assert not collect(model, tokenizer, ITEMS, Acquisition(uncertainty="none")).u.any()


def test_doubt_about_the_own_answer(load: Callable[[str], Any], tokenizer: Any) -> None:
    """Batched decoding with a cache against one item at a time without; one answer ends early, at a made-up end."""
    model = load("qwen3_moe").eval()
    ends, expected = [], []
    for number, item in enumerate(ITEMS):
        ids = tokenizer(item.prompt or item.answer, add_special_tokens=False)["input_ids"]
        logps: list[float] = []
        for _ in range(6):
            with torch.no_grad():
                best = model(input_ids=torch.tensor([ids])).logits[0, -1].double().log_softmax(-1).max(-1)
            logps.append(best.values.item())
            ids = [*ids, best.indices.item()]
            if number == 0 and len(logps) == 2:
                ends.append(ids[-1])
            if ids[-1] in ends:
                break
        expected.append(-sum(logps) / len(logps))
        assert number or len(logps) == 2
    tokenizer.eos_token_id = ends[0]
    how = Acquisition(uncertainty="answer", answer_tokens=6)
    try:
        found = collect(model, tokenizer, ITEMS, how, batch=4)
    finally:
        tokenizer.eos_token_id = 2
    assert found.u.tolist() == pytest.approx(expected, abs=1e-4)
    assert (found.h - collect(model, tokenizer, ITEMS).h).abs().max() < 1e-6, "states are of the prompt alone"


def test_wide_states_are_projected(load: Callable[[str], Any], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, items = load("qwen3_moe"), load_task("toy-gsm").items("train", 24)
    whole = collect(model, tokenizer, items).h
    monkeypatch.setattr(active_learning, "STATE_WIDTH", 200)
    narrow = collect(model, tokenizer, items, batch=7).h
    assert whole.shape == (24, 4 * 64) and narrow.shape == (24, 4 * 50)
    assert (narrow.norm(dim=1) - 1).abs().max() < 1e-5
    assert (narrow @ narrow.T - whole @ whole.T).abs().mean() < 0.1


def test_a_model_without_routers_is_refused(tokenizer: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    small = dict(vocab_size=160, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    dense = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **small))
    with pytest.raises(UnsupportedError, match="model_type is 'llama'"):
        collect(dense, tokenizer, ITEMS)
    config = AutoConfig.for_model("qwen3_moe", **small, num_experts=2, mlp_only_layers=[0], head_dim=16)
    with pytest.raises(UnsupportedError, match="has no router"):
        collect(AutoModelForCausalLM.from_config(config), tokenizer, ITEMS)


def features(count: int, seed: int = 0) -> Features:
    random = torch.Generator().manual_seed(seed)
    h = torch.nn.functional.normalize(torch.randn(count, 8, generator=random), dim=1)
    return Features(torch.rand(count, generator=random).double(), h)


def test_every_kind_of_batch() -> None:
    seen = features(200)
    chosen = {
        "active": select(seen, 20, Acquisition()),
        "uncertain": select(seen, 20, Acquisition(diversity="none")),
        "drawn": select(seen, 20, Acquisition(diversity="k-means++")),
        "random": select(seen, 20, Acquisition(strategy="random")),
    }
    for one in chosen.values():
        assert one == sorted(set(one)) and len(one) == 20
    assert chosen["uncertain"] == sorted(seen.u.topk(20).indices.tolist())
    values = {name: objective(seen.u, seen.h, one, 1.0) for name, one in chosen.items()}
    assert values["active"] > max(value for name, value in values.items() if name != "active")
    assert select(seen, 20, Acquisition(strategy="random"), seed=1) != chosen["random"]
    assert select(seen, 999, Acquisition()) == list(range(200))
    half = select(seen, 20, Acquisition(random_share=0.5))
    assert len(half) == len(set(half)) == 20
    assert 10 <= len(set(half) & set(select(seen, 10, Acquisition()))) < 20


def test_settings_out_of_range_are_refused() -> None:
    for wrong, message in (
        (dict(strategy="best"), "choose one of active, random"),
        (dict(uncertainty="loss"), "choose one of entropy, margin, output, answer, none"),
        (dict(diversity="dpp"), "choose one of nearest"),
        (dict(layers="middle"), "choose one of mean"),
        (dict(div_coef=-1.0), "at least 0"),
        (dict(div_coef=float("nan")), "at least 0"),
        (dict(al_temperature=0.0), "above 0"),
        (dict(random_share=1.5), r"in \[0, 1\]"),
        (dict(answer_tokens=0), "at least 1"),
        (dict(candidates=-1), "0 for the whole pool"),
    ):
        with pytest.raises(UsageError, match=message):
            Acquisition(**wrong)  # type: ignore[arg-type]


def test_pool_counts_labels_and_resumes() -> None:
    task = load_task("toy-gsm")
    items, tests = task.items("train", 60), task.items("test", 60)
    how = [Acquisition(), Acquisition(strategy="random"), Acquisition(diversity="k-means++")]

    def run(pool: Pool, rounds: range) -> list[list[str]]:
        """The model, and with it u and h, changes from round to round."""
        return [[i.id for i in pool.select(16, how[n % 3], features(len(pool.unlabelled), n), seed=5)] for n in rounds]

    straight, broken = Pool([*items, *items[:9]], tests), Pool(items, tests)
    assert len(straight) == 60, "copies count once"
    whole = run(straight, range(4))
    first = run(broken, range(2))
    resumed = Pool(items, tests)
    resumed.load_state(json.loads(json.dumps(broken.state())))
    assert first + run(resumed, range(2, 4)) == whole
    assert resumed.state() == straight.state()
    assert [item.id for item in straight.labelled] == list(itertools.chain(*whole))
    assert [len(batch) for batch in whole] == [16, 16, 16, 12] and straight.rounds == 4
    assert len({i.id for i in straight.labelled}) == 60 and not straight.unlabelled
    with pytest.raises(LeapError, match="has 0 unlabelled items for a batch of 16"):
        straight.select(16, how[1])


def test_pool_refuses_what_it_must_not_hold() -> None:
    task = load_task("toy-gsm")
    items, tests = task.items("train", 20), task.items("test", 20)
    with pytest.raises(LeapError, match="is test item"):
        Pool([*items, tests[3]], tests)
    pool = Pool(items, tests)
    pool.select(4, Acquisition(strategy="random"))
    other = Pool(task.items("train", 20, seed=3), tests)
    with pytest.raises(LeapError, match="belongs to another pool"):
        other.load_state(pool.state())
    with pytest.raises(LeapError, match="belongs to another pool"):
        Pool(items[:19], tests).load_state(pool.state())
    assert not other.labelled, "a refused state changes nothing"
    with pytest.raises(ValueError, match="features of all 16 candidates, got 20"):
        pool.select(4, Acquisition(), features(20))


def test_few_candidates_are_judged_and_every_batch_is_of_them() -> None:
    task = load_task("toy-gsm")
    pool = Pool(task.items("train", 60), [])
    how, seen = Acquisition(candidates=3), list[tuple[str, ...]]()
    for number in range(3):
        found = pool.candidates(8, how, seed=1)
        assert found == pool.candidates(8, how, seed=1) and len(found) == 24
        seen.append(tuple(item.id for item in found))
        batch = pool.select(8, how, features(24, number), seed=1)
        assert {item.id for item in batch} <= set(seen[-1])
        with pytest.raises(ValueError, match="all 24 candidates, got 60"):
            pool.select(8, how, features(60), seed=1)
    assert len(set(seen)) == 3, "each batch has candidates of its own"
    assert len(pool.candidates(20, how)) == len(pool.unlabelled), "too few for three each: all of them"
