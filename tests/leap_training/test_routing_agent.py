"""The routing agent: its policy against enumeration, its hooks against stock routers, and that PPO learns to route."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from leap_serve.architectures import family_of
from leap_serve.errors import UnsupportedError
from leap_training.batches import Batch, token_losses
from leap_training.routing_agent import (
    Exploration,
    LayerPolicies,
    RouterConfig,
    RoutingAgent,
    TopKPolicy,
    collect_rollout,
    expert_reads,
    improve,
)  # fmt: skip

FAMILIES = ("qwen3_moe", "qwen2_moe", "mixtral", "olmoe", "gpt_oss", "llama4_text", "glm4_moe")


def orders(experts: int, k: int) -> torch.Tensor:
    return torch.tensor(list(itertools.permutations(range(experts), k)))


def brute_force(scores: list[float], order: tuple[int, ...], noise: float, epsilon: float) -> float:
    """The probability of an order: choice by choice, without the code under test."""
    weights = [float(torch.tensor(s / noise, dtype=torch.float64).exp()) for s in scores]
    left, drawn = set(range(len(scores))), 1.0
    for expert in order:
        drawn *= weights[expert] / sum(weights[e] for e in left)
        left.remove(expert)
    best = tuple(sorted(range(len(scores)), key=lambda e: -scores[e])[: len(order)])
    return epsilon * drawn + (1 - epsilon) * (order == best)


@pytest.mark.parametrize("noise", [1.0, 0.4])
@pytest.mark.parametrize("epsilon", [1.0, 0.3])
@pytest.mark.parametrize(("experts", "k"), [(4, 1), (4, 2), (5, 3), (3, 3)])
def test_log_probabilities_are_those_of_enumeration(experts: int, k: int, epsilon: float, noise: float) -> None:
    scores = torch.randn(experts, generator=torch.Generator().manual_seed(experts * k))
    every = orders(experts, k)
    found = TopKPolicy(scores.expand(len(every), -1), k, noise, epsilon).log_prob(every).exp()
    wanted = torch.tensor([brute_force(scores.tolist(), tuple(order), noise, epsilon) for order in every.tolist()])
    torch.testing.assert_close(found, wanted.float(), atol=1e-6, rtol=1e-5)
    assert float(found.sum()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("epsilon", [1.0, 0.3])
def test_draws_are_as_frequent_as_their_probabilities(epsilon: float) -> None:
    scores = torch.tensor([0.5, -0.2, 1.0, 0.1])
    policy = TopKPolicy(scores.expand(40_000, -1), 2, 1.0, epsilon)
    drawn = policy.sample(torch.Generator().manual_seed(0))
    for order in orders(4, 2):
        share = float((drawn == order).all(-1).float().mean())
        assert share == pytest.approx(brute_force(scores.tolist(), tuple(order.tolist()), 1.0, epsilon), abs=0.01)


def test_gradient_of_the_mixture_is_that_of_its_logarithm() -> None:
    scores = torch.tensor([0.3, 0.1, -0.4], dtype=torch.float64)
    for order in orders(3, 2):

        def log_prob(s: torch.Tensor, order: torch.Tensor = order) -> torch.Tensor:
            return TopKPolicy(s, 2, 0.7, 0.2).log_prob(order)

        assert torch.autograd.gradcheck(log_prob, scores.clone().requires_grad_())


def a_batch(vocab: int = 160, rows: int = 3, length: int = 12) -> Batch:
    random = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (rows, length), generator=random)
    weights, mask = torch.ones(rows, length), torch.ones(rows, length, dtype=torch.long)
    weights[:, :5] = 0.0
    mask[-1, 9:] = 0
    weights[-1, 9:] = 0.0
    return Batch(ids, weights, mask)


def opened(folder: Path, **settings: Any) -> tuple[Any, RoutingAgent]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    family = family_of({"model_type": model.config.get_text_config().model_type}, folder)
    return model, RoutingAgent(model, family, Exploration(**settings))


def test_routing_is_the_models_own_where_weights_do_not_sum_to_one_and_no_setting_says_so() -> None:
    from transformers import DeepseekV2Config, DeepseekV2ForCausalLM

    torch.manual_seed(0)
    config = DeepseekV2Config(
        vocab_size=64, hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, n_group=1,
        num_attention_heads=2, num_key_value_heads=2, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, n_routed_experts=8, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=0,
        topk_method="greedy", topk_group=1, head_dim=8,
    )  # fmt: skip
    model = DeepseekV2ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("gate.weight"):
            torch.nn.init.normal_(parameter)
    ids = torch.randint(0, 64, (2, 9))
    with torch.no_grad():
        before = model(ids).logits
        RoutingAgent(model, family_of({"model_type": "deepseek_v2"}, Path("x")))
        torch.testing.assert_close(model(ids).logits, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_deterministic_routing_is_the_models_own(family: str, family_checkpoint: Callable[[str], Path]) -> None:
    batch = a_batch()
    model, agent = opened(family_checkpoint(family))
    with torch.no_grad():
        hooked = model(input_ids=batch.ids, attention_mask=batch.mask).logits
        agent.close()
        own = model(input_ids=batch.ids, attention_mask=batch.mask).logits
    torch.testing.assert_close(hooked, own, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama4_text", "glm4_moe"])
def test_rollouts_credit_every_layer_and_ppo_starts_at_ratio_one(
    family: str, family_checkpoint: Callable[[str], Path]
) -> None:
    batch = a_batch()
    model, agent = opened(family_checkpoint(family), kind="epsilon", epsilon=0.5)

    def losses() -> torch.Tensor:
        return token_losses(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)

    config = RouterConfig(tokens=64, minibatch=64, ppo_epochs=1, gamma=1.0)
    rollout, found = collect_rollout(agent, losses, batch, config, torch.Generator().manual_seed(0))
    assert rollout.actions.shape == (64, len(agent.layers), max(agent.top_k))
    assert found["reward"] != found["reward_greedy"]
    # The first gradient step sees the policy that drew the actions.
    metrics = improve(agent, torch.optim.SGD(agent.routers, lr=0.0), rollout, config, torch.Generator().manual_seed(0))
    assert metrics["approx_kl"] == pytest.approx(0.0, abs=1e-6)
    assert metrics["kl_sliced"] == pytest.approx(0.0, abs=1e-6)


def test_returns_are_the_discounted_rewards_from_the_token_on(family_checkpoint: Callable[[str], Path]) -> None:
    """With γ = 1 the return of the first token is what exploring changed in the whole answer's log-likelihood."""
    batch = a_batch(rows=1)
    model, agent = opened(family_checkpoint("qwen3_moe"), kind="gumbel")
    calls: list[torch.Tensor] = []

    def losses() -> torch.Tensor:
        calls.append(token_losses(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch))
        return calls[-1]

    config = RouterConfig(tokens=4000, gamma=1.0, gae_lambda=1.0)
    rollout, _ = collect_rollout(agent, losses, batch, config, torch.Generator().manual_seed(1))
    gained = ((calls[0] - calls[1]) * batch.weights[:, 1:])[0]
    wanted = gained.flip(0).cumsum(0).flip(0)[:8]  # tokens 0 … 7; the answer ends with token 8
    found = rollout.returns.flatten()
    assert len(rollout.observations[:, -1].unique(dim=0)) == 8, "tokens of the prompt count as well"
    apart = (found[:, None] - wanted[None]).abs()
    assert float(apart.min(1).values.max()) < 1e-4, "a return that is no reward-to-go"
    assert float(apart.min(0).values.max()) < 1e-4, "a reward-to-go that no sample has"


def test_the_sliced_routers_come_back_within_a_block_and_after_reset(family_checkpoint: Callable[[str], Path]) -> None:
    _, agent = opened(family_checkpoint("qwen3_moe"))
    before = agent.router_head()[0]["weight"].clone()
    with torch.no_grad():
        agent.routers[0].add_(1.0)
    with agent.sliced():
        assert torch.equal(agent.router_head()[0]["weight"], before)
    assert torch.equal(agent.router_head()[0]["weight"], before + 1.0)
    agent.reset()
    assert torch.equal(agent.router_head()[0]["weight"], before)


def test_ppo_learns_to_route_to_the_better_experts(family_checkpoint: Callable[[str], Path]) -> None:
    """The routers alone raise the likelihood of a fixed text under the deterministic policy."""
    torch.manual_seed(0)
    batch = a_batch(rows=8, length=16)
    model, agent = opened(family_checkpoint("qwen3_moe"), kind="epsilon", epsilon=0.2)

    def losses() -> torch.Tensor:
        return token_losses(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)

    config = RouterConfig(learning_rate=3e-3, tokens=2048, minibatch=512, gamma=0.9, kl_coef=0.0, ent_coef=0.0)
    optimizer = torch.optim.AdamW([*agent.routers, agent.value], lr=config.learning_rate, weight_decay=0.0)
    rewards = []
    for step in range(24):
        random = torch.Generator().manual_seed(step)
        rollout, found = collect_rollout(agent, losses, batch, config, random)
        improve(agent, optimizer, rollout, config, random)
        rewards.append(found["reward_greedy"])
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2


def test_expert_reads_add_up_to_the_expected_distinct_experts() -> None:
    random = torch.Generator().manual_seed(0)
    actions = torch.stack([torch.randperm(8, generator=random)[:2] for _ in range(600)])[:, None]
    shares = expert_reads(actions, [8], [2], 4)
    frequency = torch.bincount(actions.flatten(), minlength=8) / 600
    wanted = (1 - (1 - frequency) ** 4).sum()
    assert 4 * float(shares.mean()) == pytest.approx(float(wanted), rel=1e-5)
    # A token whose experts nobody else wants costs more than one that goes with the crowd.
    crowd = torch.tensor([[0, 1]] * 50 + [[2, 3]])[:, None]
    reads = expert_reads(crowd, [8], [2], 16)
    assert reads[-1, 0] > 5 * reads[0, 0]


def test_layers_of_different_sizes_are_policies_of_their_own() -> None:
    """Layers of 5 and 3 experts that choose 3 and 2: log-probabilities and entropies are each layer's alone."""
    random = torch.Generator().manual_seed(0)
    scores = [torch.randn(7, 5, generator=random), torch.randn(7, 3, generator=random)]
    policies = [TopKPolicy(one, k, 0.7, 0.4) for one, k in zip(scores, (3, 2), strict=True)]
    both = LayerPolicies(policies)
    actions = both.sample(random)
    assert actions.shape == (7, 2, 3) and not actions[:, 1, 2].any()
    for place, policy in enumerate(policies):
        own = actions[:, place, : policy.k]
        assert torch.equal(both.log_prob(actions)[:, place], policy.log_prob(own))
        assert torch.equal(both.entropy(actions)[:, place], policy.entropy(own))
    apart = expert_reads(actions, [5, 3], [3, 2], 4)
    assert torch.equal(apart[:, 1:], expert_reads(actions[:, 1:, :2], [3], [2], 4))


def test_a_latency_term_makes_tokens_go_with_the_crowd(family_checkpoint: Callable[[str], Path]) -> None:
    """With λ large, PPO lowers the number of distinct experts that a decode step reads."""
    batch = a_batch(rows=8, length=16)
    model, agent = opened(family_checkpoint("qwen3_moe"), kind="epsilon", epsilon=0.3)

    def losses() -> torch.Tensor:
        return token_losses(model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits, batch)

    config = RouterConfig(
        tokens=1024, minibatch=256, gamma=0.0, latency_coef=300.0, latency_per_read=(0.01,), kl_coef=0.0
    )
    optimizer = torch.optim.AdamW([*agent.routers, agent.value], lr=1e-2, weight_decay=0.0)
    found = []
    for step in range(16):
        random = torch.Generator().manual_seed(step)
        rollout, metrics = collect_rollout(agent, losses, batch, config, random)
        improve(agent, optimizer, rollout, config, random)
        found.append(metrics)
    assert found[0]["latency"] == pytest.approx(0.01 * 4 * found[0]["expert_reads"], rel=1e-4)
    assert found[-1]["expert_reads"] < found[0]["expert_reads"] - 0.3


def test_what_cannot_be_routed_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no router"):
        RoutingAgent(torch.nn.Linear(2, 2), family_of({"model_type": "qwen3_moe"}, "config"))
