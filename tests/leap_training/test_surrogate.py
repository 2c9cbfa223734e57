"""The model of the reward: exact where it must be, and honest about what it does not know."""

from __future__ import annotations

import torch

from leap_training.surrogate import Surrogate

LAYERS, EXPERTS = 2, 8


def drawn(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    ranks = torch.rand(count, LAYERS, EXPERTS, generator=generator).argsort(-1)
    return (ranks < 3).flatten(1)


def features() -> torch.Tensor:
    return torch.randn(LAYERS, EXPERTS, 5, generator=torch.Generator().manual_seed(9))


def rewards(plans: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    worth = torch.randn(LAYERS * EXPERTS, generator=generator, dtype=torch.float64)
    pairs = 0.3 * torch.randn(LAYERS * EXPERTS, LAYERS * EXPERTS, generator=generator, dtype=torch.float64)
    x = plans.double()
    return x @ worth + ((x @ pairs) * x).sum(1)


def test_it_predicts_plans_it_has_not_seen_and_knows_how_well() -> None:
    model = Surrogate(features(), EXPERTS)
    seen, unseen = drawn(200, 0), drawn(100, 1)
    model.fit(seen, rewards(seen))
    mean, deviation = model.predict(unseen)
    truth = rewards(unseen).float()
    error = mean - truth
    assert error.std() < 0.3 * truth.std() and model.r2 > 0.8
    # Not overconfident: errors are of the order of the deviation it predicts, or smaller.
    assert 0.1 < float((error / deviation).std()) < 2.0
    again, known = model.predict(seen)
    torch.testing.assert_close(again, rewards(seen).float(), atol=0.25 * float(truth.std()), rtol=0)
    assert known.mean() < deviation.mean()


def test_worths_of_an_additive_reward_are_found() -> None:
    worth = torch.linspace(-1, 1, LAYERS * EXPERTS, dtype=torch.float64)
    seen = drawn(300, 2)
    model = Surrogate(features(), EXPERTS)
    model.fit(seen, seen.double() @ worth)
    found, constant = model.linear()
    other = drawn(50, 3)
    torch.testing.assert_close(other.float() @ found + constant, (other.double() @ worth).float(), atol=0.05, rtol=0)


def test_rewards_that_tell_nothing_are_not_trusted() -> None:
    model, seen = Surrogate(features(), EXPERTS), drawn(60, 4)
    model.fit(seen, torch.randn(60, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    assert model.r2 < 0.2
    model.fit(seen, torch.ones(60, dtype=torch.float64))
    mean, _ = model.predict(drawn(5, 6))
    torch.testing.assert_close(mean, torch.ones(5))


def test_temperatures_are_choices_like_experts() -> None:
    model = Surrogate(features(), EXPERTS + 3)
    experts = drawn(200, 7).view(-1, LAYERS, EXPERTS)
    which = torch.randint(3, (200, LAYERS), generator=torch.Generator().manual_seed(8))
    plans = torch.cat([experts, torch.nn.functional.one_hot(which, 3).bool()], -1).flatten(1)
    model.fit(plans, (which == 1).double().sum(1))
    worth, _ = model.linear()
    tail = worth.view(LAYERS, -1)[:, EXPERTS:]
    assert (tail.argmax(1) == 1).all()
