"""The routing agent (LEAP §3.3): all routers of a transformers MoE model as one policy, trained by PPO.

State: the router's input h [H]. Action: the ordered top-k of the selection scores over the retained experts, drawn
with exploration in training and deterministic otherwise. Perf is the log-likelihood of each answer token; an action
at token t, in whatever layer, is credited with the discounted rewards of the answer tokens from t on. The reward of
the same token under the deterministic policy is subtracted (ours): it depends on no action, so the gradient stays
unbiased, and what is left is what exploring changed.

T = B·S tokens, M samples of a rollout, L MoE layers, E experts of a layer, H hidden, K top_k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from torch.nn import functional as F

from leap_serve.architectures import Family
from leap_serve.errors import UnsupportedError
from leap_training.batches import Batch
from leap_training.ppo import Distribution, PlackettLuce, PPOConfig, Rollout, gae, gumbel, update


@dataclass(frozen=True, slots=True)
class Exploration:
    """How actions are drawn in training.

    Args:
        kind: "gumbel" takes the top-k of scores + noise · Gumbel, which is Plackett–Luce with scores / noise
            (Kool et al. 2019); "epsilon" does so with probability ``epsilon`` and is deterministic otherwise.
        noise: scale of the Gumbel noise in units of the scores.
        epsilon: probability of drawing, per token and layer.
    """

    kind: Literal["gumbel", "epsilon"] = "gumbel"
    noise: float = 0.3
    epsilon: float = 0.1

    def policy(self, scores: torch.Tensor, k: int) -> TopKPolicy:
        """The distribution over ordered top-k of scores [..., E]."""
        return TopKPolicy(scores, k, self.noise, self.epsilon if self.kind == "epsilon" else 1.0)


class TopKPolicy:
    """Ordered top-k of scores [..., E]: Plackett–Luce over scores / noise w.p. ε, otherwise the largest in order."""

    def __init__(self, scores: torch.Tensor, k: int, noise: float = 1.0, epsilon: float = 1.0) -> None:
        self.k, self.epsilon = k, epsilon
        self.drawn = PlackettLuce(scores / noise, k)

    def mode(self) -> torch.Tensor:
        """The deterministic action, [..., k]."""
        return self.drawn.logits.topk(self.k, -1).indices

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw orders [..., k]; all noise comes from a generator on the CPU."""
        logits = self.drawn.logits
        orders = (logits + gumbel(logits.shape, generator).to(logits)).topk(self.k, -1).indices
        if self.epsilon >= 1.0:
            return orders
        coin = torch.rand(logits.shape[:-1], generator=generator) < self.epsilon
        return torch.where(coin.to(logits.device)[..., None], orders, self.mode())

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability [...] of the orders [..., k], the mixture's where ε < 1."""
        drawn = self.drawn.log_prob(actions)
        if self.epsilon >= 1.0:
            return drawn
        drawn = drawn + math.log(self.epsilon)
        both = torch.logaddexp(drawn, torch.full_like(drawn, math.log1p(-self.epsilon)))
        return torch.where((actions == self.mode()).all(-1), both, drawn)

    def entropy(self, actions: torch.Tensor) -> torch.Tensor:
        """Entropy [...] of the part that is drawn, along the actions."""
        return self.drawn.entropy(actions)


class RouterHead(nn.Module):
    """A layer's router as it is trained: fp32 weight [E, H] and, where the family has one, bias [E].

    As a forward hook of the model's own router it answers in its place. ``sliced_*`` are the values it began with.
    Every layer has its own E, K and temperature τ (``router.temperature``, where the loader of an uneven cut put it).
    """

    sliced_weight: torch.Tensor
    sliced_bias: torch.Tensor | None

    def __init__(self, router: Any, family: Family, agent: RoutingAgent) -> None:
        super().__init__()
        self.kind, self.renormalises = family.router_kind, family.sums_to_one(router)
        self.top_k = int(router.top_k)
        # A cut's map of ids and its skipping, which come after whatever is chosen (engines.torch_cut).
        self.after: Callable[..., Any] = getattr(router, "after", lambda output: output)
        self.temperature = float(getattr(router, "temperature", 1.0))
        bias = getattr(router, "bias", None)
        self.weight = nn.Parameter(router.weight.detach().float().clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.register_buffer("sliced_weight", self.weight.detach().clone())
        self.register_buffer("sliced_bias", None if self.bias is None else self.bias.detach().clone())
        # Not registered: neither belongs to this module.
        self.__dict__["router"], self.__dict__["agent"] = router, agent

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits over τ [T, E] of router inputs [T, H], rounded as the engine's."""
        # Routers with a correction bias compute in fp32 whatever the model's dtype.
        dtype = torch.float32 if self.kind == "sigmoid-bias" else x.dtype
        z = F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))
        return z if self.temperature == 1.0 else z / self.temperature

    def scores(self, z: torch.Tensor) -> torch.Tensor:
        """What the top-k is taken of, fp32 [..., E]: the logits, or σ + correction bias."""
        if self.kind != "sigmoid-bias":
            return z.float()
        return z.float().sigmoid() + self.router.e_score_correction_bias

    def answer(self, _router: Any, args: tuple[torch.Tensor, ...], output: tuple[torch.Tensor, ...]) -> Any:
        """Forward hook: route by this head; (logits, weights [T, K], ids [T, K]), of Llama-4 (scores [T, E], logits)."""
        x = args[0].reshape(-1, args[0].shape[-1])
        z = self(x)
        ids = self.agent.choose(self, x, self.scores(z))
        if self.kind == "sigmoid":
            weights = z.gather(1, ids).float().sigmoid().to(z.dtype)
            return self.after((torch.zeros_like(z).scatter(1, ids, weights), z))
        weights = (z.float().sigmoid() if self.kind == "sigmoid-bias" else z.float().softmax(-1)).gather(1, ids)
        # GPT-OSS takes the softmax over the chosen, which is the renormalised softmax.
        if self.renormalises:
            weights = weights / weights.sum(-1, keepdim=True)
        weights = (weights * getattr(self.router, "routed_scaling_factor", 1.0)).to(output[1].dtype)
        return self.after((z, weights, ids))


class LayerPolicies:
    """The policies of L layers side by side: actions [M, L, K], K the largest top_k; a smaller one's end is padding."""

    def __init__(self, layers: Sequence[TopKPolicy]) -> None:
        self.layers = layers

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw the orders of all layers, [M, L, K]."""
        return side_by_side([layer.sample(generator) for layer in self.layers])

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probabilities [M, L]."""
        return torch.stack([p.log_prob(ids[:, : p.k]) for p, ids in self._each(actions)], 1)

    def entropy(self, actions: torch.Tensor) -> torch.Tensor:
        """Entropies [M, L]."""
        return torch.stack([p.entropy(ids[:, : p.k]) for p, ids in self._each(actions)], 1)

    def _each(self, actions: torch.Tensor) -> Iterator[tuple[TopKPolicy, torch.Tensor]]:
        return zip(self.layers, actions.unbind(1), strict=True)


def side_by_side(ids: Sequence[torch.Tensor]) -> torch.Tensor:
    """Stack the ids [N, K of the layer] of L layers to [N, L, K], padded with 0."""
    width = max(one.shape[1] for one in ids)
    return torch.stack([F.pad(one, (0, width - one.shape[1])) for one in ids], 1)


class RoutingAgent(nn.Module):
    """The heads of all MoE layers; hooks them into the model until :meth:`close`.

    Args:
        model: a transformers causal LM; its layers may differ in experts and top_k.
        family: its row in the table of architectures.
        exploration: of :meth:`rollout`.

    Raises:
        UnsupportedError: no router was found, or routing is group-limited.
    """

    def __init__(self, model: Any, family: Family, exploration: Exploration = Exploration()) -> None:
        super().__init__()
        self.exploration = exploration
        routers = {}
        for name, block in model.named_modules():
            if hasattr(block, "experts") and hasattr(block, family.router):
                routers[int(name.split("layers.")[-1].split(".")[0])] = getattr(block, family.router)
        if not routers:
            raise UnsupportedError(type(model).__name__, "has no router that can be tuned", "load a MoE model")
        first = next(iter(routers.values()))
        if getattr(first, "num_group", None) not in (None, 1):
            raise UnsupportedError(type(model).__name__, "routes in groups", "tune a model whose routers do not")
        self.layers = sorted(routers)
        self.heads = nn.ModuleList(RouterHead(routers[layer], family, self) for layer in self.layers)
        # V(h) of each layer, linear in the router's input.
        self.top_k = tuple(head.top_k for head in self.heads)
        self.experts = tuple(len(head.weight) for head in self.heads)
        weight = self.heads[0].weight
        self.value = nn.Parameter(torch.zeros(len(self.layers), weight.shape[1], device=weight.device))
        self._generator: torch.Generator | None = None
        self._seen: dict[RouterHead, tuple[torch.Tensor, torch.Tensor]] | None = None
        self._hooks = [head.router.register_forward_hook(head.answer) for head in self.heads]

    def close(self) -> None:
        """Give the model its own routers back."""
        for hook in self._hooks:
            hook.remove()

    @property
    def routers(self) -> list[nn.Parameter]:
        """What is tuned: weights and biases of all heads."""
        return list(self.heads.parameters())

    def router_head(self) -> dict[int, dict[str, torch.Tensor]]:
        """Layer → {"weight" [E, H], "bias" [E] where there is one}, fp32 on the CPU."""
        return {
            layer: {name: value.detach().cpu().contiguous() for name, value in head.named_parameters()}
            for layer, head in zip(self.layers, self.heads, strict=True)
        }

    @contextmanager
    def sliced(self) -> Iterator[None]:
        """Route by the routers as they were cut for as long as the block lasts."""
        tuned = [p.detach().clone() for p in self.routers]
        try:
            self.reset()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self.routers, tuned, strict=True):
                    parameter.copy_(value)

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def reset(self) -> None:
        """Return to the routers as they were cut."""
        for head in self.heads:
            head.weight.copy_(head.sliced_weight)
            if head.bias is not None:
                head.bias.copy_(head.sliced_bias)

    def choose(self, head: RouterHead, x: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The experts [T, K] of each token: the best, or drawn while a rollout is being collected."""
        policy = self.exploration.policy(scores.detach(), head.top_k)
        if self._seen is None:
            return policy.mode()
        ids = policy.sample(self._generator)
        self._seen[head] = (x.detach(), ids)
        return ids

    @contextmanager
    def exploring(self, generator: torch.Generator) -> Iterator[dict[RouterHead, tuple[torch.Tensor, torch.Tensor]]]:
        """Draw the actions for as long as the block lasts; yields head → (router inputs [T, H], ids [T, K])."""
        self._generator, self._seen = generator, {}
        try:
            yield self._seen
        finally:
            self._seen = None

    def actor(self, observations: torch.Tensor, _masks: torch.Tensor | None = None) -> Distribution:
        """PPO's actor: log-probabilities [M, L] of actions for router inputs [M, L, H], with gradient."""
        scores = (head.scores(head(observations[:, place])) for place, head in enumerate(self.heads))
        return LayerPolicies(
            [self.exploration.policy(one, k) for one, k in zip(scores, self.top_k, strict=True)]
        )  # fmt: skip

    def critic(self, observations: torch.Tensor) -> torch.Tensor:
        """PPO's critic: values [M, L]."""
        return (F.normalize(observations.float(), dim=-1) * self.value).sum(-1)

    def kl_to_sliced(self, observations: torch.Tensor) -> torch.Tensor:
        """Mean KL(π_φ ‖ π_φ*) in nats of the routers' own distributions, softmax over the retained experts (eq. 8)."""
        divergences = []
        for place, head in enumerate(self.heads):
            x = observations[:, place].float()
            with torch.no_grad():
                before = (F.linear(x, head.sliced_weight, head.sliced_bias) / head.temperature).log_softmax(-1)
            after = (F.linear(x, head.weight, head.bias) / head.temperature).log_softmax(-1)
            divergences.append((after.exp() * (after - before)).sum(-1))
        return torch.stack(divergences).mean()


@dataclass(frozen=True, slots=True)
class RouterConfig:
    """Settings of the router step, by the paper's names.

    Args:
        learning_rate, ppo_epochs, gamma, gae_lambda, clip_coef, vf_coef, ent_coef, max_grad_norm: PPO's own; the
            discount is per token.
        kl_coef: β of eq. 18, on the KL to the sliced router.
        tokens: samples kept of a rollout, drawn at random; each holds the actions of all layers.
        minibatch: samples per gradient step.
        latency_coef: λ of eq. 14, on what a token's expert reads add to a decode step's latency.
        latency_per_read: that latency, over the full model's, per expert read: one number or one per MoE layer,
            as leap_training.latency fits them; () takes every expert of the model for an equal part of a step.
        latency_batch: tokens of that decode step.
    """

    learning_rate: float = 1e-4
    ppo_epochs: int = 4
    gamma: float = 0.5
    gae_lambda: float = 1.0
    clip_coef: float = 0.2
    vf_coef: float = 0.5
    ent_coef: float = 0.001
    kl_coef: float = 0.02
    max_grad_norm: float = 0.5
    tokens: int = 2048
    minibatch: int = 1024
    latency_coef: float = 0.0
    latency_per_read: tuple[float, ...] = ()
    latency_batch: int = 16

    def ppo(self) -> PPOConfig:
        """The part that PPO takes."""
        shared = ("learning_rate", "ppo_epochs", "gamma", "gae_lambda", "clip_coef", "vf_coef", "ent_coef",
                  "max_grad_norm", "minibatch")  # fmt: skip
        return PPOConfig(**{name: getattr(self, name) for name in shared})


def expert_reads(actions: torch.Tensor, experts: Sequence[int], top_k: Sequence[int], batch: int) -> torch.Tensor:
    """Each token's share [N, L] of the distinct experts that a decode step of ``batch`` such tokens reads per layer.

    An expert chosen with frequency p is read by such a step with probability 1 − (1 − p)^batch, however many of its
    tokens chose it, and they share the cost; summed over ``batch`` tokens this is the expected number of experts of
    a layer that are read, which is what TPOT grows with (methods: §9).

    Args:
        actions: ids [N, L, K] of N tokens.
        experts, top_k: of each layer; ids beyond a layer's top_k are padding.
        batch: tokens of a step.
    """
    shares = []
    for padded, count, k in zip(actions.unbind(1), experts, top_k, strict=True):
        ids = padded[:, :k]
        frequency = torch.bincount(ids.flatten(), minlength=count).float() / len(ids)
        read = 1 - (1 - frequency.clamp_max(1.0)) ** batch
        shares.append((read / (batch * frequency).clamp_min(1e-9))[ids].sum(-1))
    return torch.stack(shares, 1)


@torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
def collect_rollout(
    agent: RoutingAgent, losses: Any, batch: Batch, config: RouterConfig, generator: torch.Generator
) -> tuple[Rollout, dict[str, float]]:
    """Route a batch once deterministically and once exploring; return PPO's samples and the two mean rewards.

    Args:
        losses: called without arguments, gives the batch's token losses [B, S − 1] by the model with the agent's hooks.
        batch: on the model's device.
        generator: on the CPU.
    """
    plain = -losses()
    with agent.exploring(generator) as seen:
        explored = -losses()
    rows, steps, layers = plain.shape[0], plain.shape[1], len(agent.layers)
    weights = batch.weights[:, 1:]
    # What comes before a rewarded token may have changed it; what comes after cannot.
    credited = weights.flip(1).cumsum(1).flip(1) > 0
    inputs, chosen = ([seen[head][part] for head in agent.heads] for part in (0, 1))
    states, actions = (
        stacked.unflatten(0, (rows, steps + 1))[:, :-1] for stacked in (torch.stack(inputs, 1), side_by_side(chosen))
    )  # [B, S − 1, L, H] and [B, S − 1, L, K]
    rewards = ((explored - plain) * weights)[..., None].expand(-1, -1, layers).clone()
    reads = expert_reads(actions[credited], agent.experts, agent.top_k, config.latency_batch) * config.latency_batch
    per_read = config.latency_per_read or (1 / sum(agent.experts),)
    latency = reads * torch.tensor(per_read, device=reads.device)
    rewards[credited] -= config.latency_coef * latency
    values = agent.critic(states.flatten(0, 1)).unflatten(0, (rows, steps)) * credited[..., None]
    over_time = (t.transpose(0, 1).flatten(1) for t in (rewards, values))
    gained, valued = over_time
    following = torch.cat([valued[1:], torch.zeros_like(valued[:1])])
    never = torch.zeros_like(valued, dtype=torch.bool)
    found = gae(gained, valued, following, never, config.gamma, config.gae_lambda)
    advantages, returns = (t.unflatten(1, (rows, layers)).transpose(0, 1)[credited] for t in found)
    kept = torch.randint(int(credited.sum()), (config.tokens,), generator=generator).to(states.device)
    states, actions = states[credited][kept], actions[credited][kept]
    rollout = Rollout(
        states, actions, None, agent.actor(states).log_prob(actions), agent.critic(states), advantages[kept],
        returns[kept],
    )  # fmt: skip
    total = weights.sum()
    return rollout, {
        "reward": float((explored * weights).sum() / total), "reward_greedy": float((plain * weights).sum() / total),
        "expert_reads": float(reads.mean()), "latency": float(latency.sum(1).mean()),
    }  # fmt: skip


def improve(
    agent: RoutingAgent,
    optimizer: torch.optim.Optimizer,
    rollout: Rollout,
    config: RouterConfig,
    generator: torch.Generator,
) -> dict[str, float]:
    """One PPO update of the heads with the KL target to the sliced router; returns PPO's metrics and ``kl_sliced``."""
    metrics = update(
        agent.actor, agent.critic, optimizer, rollout, config.ppo(), generator,
        penalty=lambda observations: config.kl_coef * agent.kl_to_sliced(observations),
    )  # fmt: skip
    with torch.no_grad():
        return {**metrics, "kl_sliced": float(agent.kl_to_sliced(rollout.observations))}
