"""The pruning agent's policy: one set of weights for all experts and layers, and its value baseline."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from leap_serve.profile import LayerProfile, Profile
from leap_training.ppo import gumbel
from leap_training.pruning_space import PruningSpace
from leap_training.saliency import OBSERVED, Scores

HIDDEN = 32
STOPPING = -4.0
"""Logit of «stop» at first: about as likely as an expert that ranks just below what a layer retains."""


def expert_features(profile: Profile, space: PruningSpace) -> torch.Tensor:
    """Features of every expert, [L, E, F] float32, comparable between models.

    For each observed criterion and the largest activation: the rank within the layer in [−1, 1], and the
    standardised value, clipped to ±3. Then the layer's depth and the share of experts to retain, in [0, 1].
    """
    rows = [_layer_features(profile.layers[layer]) for layer in space.layers]
    layers, experts = space.shape
    depth = np.linspace(0.0, 1.0, layers)[:, None, None].repeat(experts, 1)
    share = np.full((layers, experts, 1), space.budget / (layers * experts))
    return torch.from_numpy(np.concatenate([np.stack(rows), depth, share], -1)).float()


def _layer_features(layer: LayerProfile) -> npt.NDArray[np.float64]:
    columns = []
    for values in (*(criterion(layer) for criterion in OBSERVED.values()), layer.max):
        columns.append(2 * values.argsort(kind="stable").argsort() / max(1, len(values) - 1) - 1)
        columns.append(np.clip((values - values.mean()) / (values.std() + 1e-12), -3, 3))
    return np.stack(columns, -1)


def similarity(profile: Profile, space: PruningSpace) -> torch.Tensor:
    """Co-activation of two experts of a layer as the cosine of their selections, [L, E, E] float32; 0 with itself."""
    found = []
    for layer in space.layers:
        coact, hits = profile.layers[layer].coact, profile.layers[layer].n
        cosine = coact / np.sqrt(np.outer(hits, hits)).clip(1e-12)
        np.fill_diagonal(cosine, 0.0)
        found.append(cosine)
    return torch.from_numpy(np.stack(found)).float()


def prior_logits(scores: Scores, space: PruningSpace, strength: float) -> torch.Tensor:
    """The logits a search starts with, [L, E]: they fall by ``strength`` over as many ranks as a layer retains.

    Ranks, not values: a ranking fixes the order of the first plan, and criteria differ wildly in scale.
    """
    kept = space.budget / len(space.top_k)
    rows = []
    for layer in space.layers:
        value = np.asarray(scores[layer])
        rank = (-value).argsort(kind="stable").argsort()
        rows.append(-strength * rank / kept)
    return torch.from_numpy(np.stack(rows)).float()


class PruningPolicy(torch.nn.Module):
    """Logits of adding an expert: prior + shared network of its features + similarity to the chosen + own offset.

    All but the prior is 0 at first, so that the search begins at the saliency ranking and learns the difference.
    ``shared`` (the network, the weights of similarity and of stopping) carries over to another task or budget;
    ``offset`` [L, W] is what this search learned of single experts and temperatures.
    """

    def __init__(self, features: torch.Tensor, similar: torch.Tensor, prior: torch.Tensor, space: PruningSpace) -> None:
        super().__init__()
        self.space, self.features, self.similar, self.prior = space, features, similar, prior
        self.network = torch.nn.Sequential(
            torch.nn.Linear(features.shape[-1], HIDDEN), torch.nn.Tanh(), torch.nn.Linear(HIDDEN, 1)
        )
        torch.nn.init.zeros_(self.network[2].weight)
        torch.nn.init.zeros_(self.network[2].bias)
        # How similarity to the chosen counts: at the start of an episode, and more at its end.
        self.relation = torch.nn.Parameter(torch.zeros(2))
        # Logit of stopping at the start, and what it gains until the end.
        self.halt = torch.nn.Parameter(torch.tensor([STOPPING, 0.0]))
        self.offset = torch.nn.Parameter(torch.zeros(len(prior), space.width))
        # Sampling temperature: every logit is divided by it, in draws and log-probabilities alike.
        self.heat = 1.0
        self.closed = _closed(space)

    def shared(self) -> list[torch.nn.Parameter]:
        """Parameters that do not depend on the model, task or budget."""
        return [*self.network.parameters(), self.relation, self.halt]

    def static(self) -> torch.Tensor:
        """Logits [L, W] before anything is chosen."""
        experts = self.prior + self.network(self.features)[..., 0]
        return self.offset + torch.nn.functional.pad(experts, (0, self.space.width - experts.shape[1]))

    def logprobs(self, picks: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every candidate before each pick, [N, T, C], given the picks [N, T].

        A pick is l·W + column, or L·W for «stop» and what follows it. C = W of the scheduled layer in uniform
        spaces, L·W + 1 otherwise; -inf for what is not allowed.
        """
        logits = self._logits_uniform(picks) if self.space.uniform else self._logits_global(picks)
        return (logits / self.heat).log_softmax(-1)

    def candidate(self, picks: torch.Tensor) -> torch.Tensor:
        """Picks [N, T] as indices into the last dimension of :meth:`logprobs`."""
        return picks % self.space.width if self.space.uniform else picks

    def _near(self, taken: torch.Tensor, progress: torch.Tensor | float) -> torch.Tensor:
        """What similarity to the taken [..., L, W] adds to every logit, [..., L, W]."""
        experts = taken[..., : self.similar.shape[1]]
        mean = experts / experts.sum(-1, keepdim=True).clamp_min(1)
        near = (self.relation[0] + self.relation[1] * progress) * torch.einsum("...le,lef->...lf", mean, self.similar)
        return torch.nn.functional.pad(near, (0, taken.shape[-1] - experts.shape[-1]))

    def _logits_uniform(self, picks: torch.Tensor) -> torch.Tensor:
        layers, width = len(self.prior), self.space.width
        local = (picks % width).view(len(picks), -1, layers)
        before = _before(torch.nn.functional.one_hot(local, width).float(), 1)
        progress = torch.linspace(0, 1, local.shape[1])[:, None, None]
        logits = self.static() + self._near(before, progress)
        closed = before.bool() | self.closed.view(-1, layers, width)
        return logits.masked_fill(closed, -torch.inf).flatten(1, 2)

    def _logits_global(self, picks: torch.Tensor) -> torch.Tensor:
        layers, width = len(self.prior), self.space.width
        before = _before(torch.nn.functional.one_hot(picks, layers * width + 1).float(), 1)
        taken, stopped = before[..., :-1].unflatten(-1, (layers, width)), before[..., -1] > 0
        progress = torch.linspace(0, 1, picks.shape[1])
        logits = (self.static() + self._near(taken, progress[:, None, None])).flatten(-2)
        stop = (self.halt[0] + self.halt[1] * progress)[:, None].expand(len(picks), -1, 1)
        return self._mask(torch.cat([logits, stop], -1), taken.flatten(-2), stopped, self.closed)

    def _mask(
        self, logits: torch.Tensor, taken: torch.Tensor, stopped: torch.Tensor, closed: torch.Tensor
    ) -> torch.Tensor:
        """Close what was taken, and after «stop» everything else, in logits [..., L·W + 1]; for the picks of experts."""
        gone = torch.cat([taken.bool(), torch.zeros_like(stopped)[..., None]], -1) | closed
        ended = stopped & ~closed[..., -1]
        logits = logits.masked_fill(gone, -torch.inf)
        over = torch.full_like(logits, -torch.inf)
        over[..., -1] = 0.0
        return torch.where(ended[..., None], over, logits)

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Draw ``count`` whole episodes, picks [count, T]; without a generator the likeliest candidate at every pick.

        Every pick is a Gumbel-max draw of its own, so that logits may follow what was picked before.
        """
        return self._draw_uniform(count, generator) if self.space.uniform else self._draw_global(count, generator)

    def _draw_uniform(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        layers, width = len(self.prior), self.space.width
        static, taken = self.static(), torch.zeros(count, layers, width)
        rounds = self.closed.view(-1, layers, width)
        picks = []
        for number, closed in enumerate(rounds):
            logits = static + self._near(taken, number / max(1, len(rounds) - 1))
            column = self._choose(logits.masked_fill(taken.bool() | closed, -torch.inf), generator)
            taken.scatter_(-1, column[..., None], 1.0)
            picks.append(column + width * torch.arange(layers))
        return torch.cat(picks, 1)

    def _draw_global(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        layers, width = len(self.prior), self.space.width
        static, taken = self.static(), torch.zeros(count, layers * width + 1)
        picks = []
        for step, closed in enumerate(self.closed):
            progress = step / max(1, len(self.closed) - 1)
            now = taken[:, :-1]
            logits = (static + self._near(now.unflatten(-1, (layers, width)), progress)).flatten(-2)
            stop = (self.halt[0] + self.halt[1] * progress).expand(count, 1)
            logits = self._mask(torch.cat([logits, stop], -1), now, taken[:, -1] > 0, closed)
            pick = self._choose(logits, generator)
            taken.scatter_(-1, pick[:, None], 1.0)
            picks.append(pick)
        return torch.stack(picks, 1)

    def _choose(self, logits: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
        """Draw from logits [..., n] at the policy's heat."""
        return (logits if generator is None else logits + self.heat * gumbel(logits.shape, generator)).argmax(-1)


def _closed(space: PruningSpace) -> torch.Tensor:
    """What the schedule closes at each pick: [T/L, L·W] by round in uniform spaces, else [T, L·W + 1]."""
    layers, experts = space.shape
    closed = torch.ones(space.picks, layers, space.width, dtype=torch.bool)
    stop = torch.ones(space.picks, 1, dtype=torch.bool)
    for step, layer in enumerate(space.schedule):
        closed[step, slice(None) if layer is None else layer, :experts] = False
        stop[step] = not (space.may_stop and layer is None)
    for layer in range(space.picks - space.budget):
        closed[space.budget + layer, layer, experts:] = False
    if not space.uniform:
        return torch.cat([closed.flatten(1), stop], 1)
    # A round has one pick per layer, and each closes the other layers: what all picks of a round close is closed.
    return closed.view(-1, layers, layers, space.width).all(1).flatten(1)


def _before(one_hot: torch.Tensor, dim: int) -> torch.Tensor:
    """What was chosen before each step: the exclusive cumulative sum."""
    return one_hot.cumsum(dim) - one_hot


class Episodes:
    """The distribution over whole episodes, one log-probability per pick; what ppo.py takes for an actor's answer."""

    def __init__(self, policy: PruningPolicy, picks: torch.Tensor) -> None:
        self.policy, self.picks = policy, picks
        self.logprobs = policy.logprobs(picks)

    def sample(self, generator: torch.Generator | None = None) -> torch.Tensor:
        """Draw as many new episodes as were given."""
        return self.policy.draw(len(self.picks), generator)

    def log_prob(self, actions: torch.Tensor) -> torch.Tensor:
        """Log-probability of each pick given those before it, [N, T]."""
        return self.logprobs.gather(-1, self.policy.candidate(actions)[..., None])[..., 0]

    def entropy(self, actions: torch.Tensor) -> torch.Tensor:
        """Entropy of each choice, [N, T], in nats."""
        finite = self.logprobs.masked_fill(self.logprobs == -torch.inf, 0.0)
        return -(self.logprobs.exp() * finite).sum(-1)

    def expected(self, worth: torch.Tensor) -> torch.Tensor:
        """Mean worth [L·W] of each choice under the policy, [N, T]; stopping is worth 0."""
        layers, width = len(self.policy.prior), self.policy.space.width
        if self.policy.space.uniform:
            by_pick = worth.view(layers, width).repeat(self.logprobs.shape[1] // layers, 1)
        else:
            by_pick = torch.cat([worth, worth.new_zeros(1)]).expand(self.logprobs.shape[1], -1)
        return (self.logprobs.exp() * by_pick).sum(-1)


class Critic:
    """V(s): what is chosen so far and what is still to come are worth, if worths added up.

    The worths [L·W] are the linear part of the surrogate (:mod:`leap_training.surrogate`). They make the advantage
    of a pick its own worth over the policy's mean, plus, by GAE's λ, a share of what their sum did not foresee.
    """

    def __init__(self, policy: PruningPolicy) -> None:
        self.policy = policy
        self.worth = torch.zeros(policy.offset.numel())
        self.constant = 0.0

    def values(self, episodes: Episodes) -> torch.Tensor:
        """V before each pick, [N, T]."""
        gained = torch.cat([self.worth, self.worth.new_zeros(1)])[episodes.picks]
        coming = episodes.expected(self.worth)
        return self.constant + _before(gained, 1) + coming.flip(1).cumsum(1).flip(1)

    def __call__(self, picks: torch.Tensor) -> torch.Tensor:
        """V before each pick of the episodes [N, T]."""
        with torch.no_grad():
            return self.values(Episodes(self.policy, picks))
