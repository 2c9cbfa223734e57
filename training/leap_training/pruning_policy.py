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
    ``shared`` (the network and the weights of similarity) carries over to another task or budget; ``offset``
    [L, E] is what this search learned of single experts.
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
        self.offset = torch.nn.Parameter(torch.zeros_like(prior))
        self.schedule = space.schedule
        # Sampling temperature: every logit is divided by it, in draws and log-probabilities alike.
        self.heat = 1.0

    def shared(self) -> list[torch.nn.Parameter]:
        """Parameters that do not depend on the model, task or budget."""
        return [*self.network.parameters(), self.relation]

    def static(self) -> torch.Tensor:
        """Logits [L, E] before anything is chosen."""
        return self.prior + self.network(self.features)[..., 0] + self.offset

    def logprobs(self, picks: torch.Tensor) -> torch.Tensor:
        """Log-probabilities of every candidate before each pick, [N, T, C], given the picks [N, T] (ids in L·E).

        C = E of the scheduled layer in uniform spaces, L·E otherwise; -inf for what is not allowed.
        """
        logits = self._logits_uniform(picks) if self.space.uniform else self._logits_global(picks)
        return (logits / self.heat).log_softmax(-1)

    def candidate(self, picks: torch.Tensor) -> torch.Tensor:
        """Picks [N, T] as indices into the last dimension of :meth:`logprobs`."""
        return picks % self.space.shape[1] if self.space.uniform else picks

    def _logits_uniform(self, picks: torch.Tensor) -> torch.Tensor:
        layers, experts = self.space.shape
        local = (picks % experts).view(len(picks), -1, layers)
        before = _before(torch.nn.functional.one_hot(local, experts).float(), 1)
        progress = torch.linspace(0, 1, local.shape[1])[:, None, None]
        counts = before.sum(-1, keepdim=True).clamp_min(1)
        near = torch.einsum("nrle,lef->nrlf", before / counts, self.similar)
        logits = self.static() + (self.relation[0] + self.relation[1] * progress) * near
        return logits.masked_fill(before.bool(), -torch.inf).flatten(1, 2)

    def _logits_global(self, picks: torch.Tensor) -> torch.Tensor:
        layers, experts = self.space.shape
        before = _before(torch.nn.functional.one_hot(picks, layers * experts).float(), 1).unflatten(-1, (layers, -1))
        progress = torch.linspace(0, 1, picks.shape[1])[:, None, None]
        counts = before.sum(-1, keepdim=True).clamp_min(1)
        near = torch.einsum("ntle,lef->ntlf", before / counts, self.similar)
        logits = self.static() + (self.relation[0] + self.relation[1] * progress) * near
        closed = before.bool()
        for step, layer in enumerate(self.schedule):
            if layer is not None:
                closed[:, step, torch.arange(layers) != layer] = True
        return logits.masked_fill(closed, -torch.inf).flatten(-2)

    @torch.no_grad()  # type: ignore[untyped-decorator, unused-ignore]
    def draw(self, count: int, generator: torch.Generator | None) -> torch.Tensor:
        """Draw ``count`` whole episodes, picks [count, T]; without a generator the likeliest expert at every pick.

        Where no similarity is learned yet this is Plackett–Luce by Gumbel-top-k, one pick after the other:
        adding one expert's noise once and taking the largest that is left is the same draw.
        """
        layers, experts = self.space.shape
        shape = (count, layers, experts)
        noise = torch.zeros(shape) if generator is None else self.heat * gumbel(shape, generator)
        perturbed = self.static() + noise
        taken = torch.zeros(count, layers, experts)
        picks = []
        for step, layer in enumerate(self.schedule):
            progress = self._progress(step)
            near = torch.einsum("nle,lef->nlf", taken / taken.sum(-1, keepdim=True).clamp_min(1), self.similar)
            logits = perturbed + (self.relation[0] + self.relation[1] * progress) * near
            logits = logits.masked_fill(taken.bool(), -torch.inf)
            if layer is not None:
                logits[:, torch.arange(layers) != layer] = -torch.inf
            pick = logits.flatten(1).argmax(1)
            taken.view(count, -1)[torch.arange(count), pick] = 1.0
            picks.append(pick)
        return torch.stack(picks, 1)

    def _progress(self, step: int) -> float:
        """Where an episode stands, in [0, 1]: by rounds in uniform spaces, by picks otherwise."""
        per = len(self.space.top_k) if self.space.uniform else 1
        return (step // per) / max(1, len(self.schedule) // per - 1)


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
        """Mean worth [L·E] of each choice under the policy, [N, T]."""
        layers, experts = self.policy.space.shape
        if self.policy.space.uniform:
            by_pick = worth.view(layers, experts).repeat(self.logprobs.shape[1] // layers, 1)
        else:
            by_pick = worth.expand(self.logprobs.shape[1], -1)
        return (self.logprobs.exp() * by_pick).sum(-1)


class AdditiveCritic:
    """V(s): what the experts chosen so far and those still to come are worth, if worths added up.

    The worths are a ridge regression of the rewards of ALL plans evaluated so far on their subsets, solved
    exactly before every update; recent plans count more. It makes the advantage of a pick its own worth over
    the policy's mean, plus, by GAE's λ, a share of what the sum of worths did not foresee.
    """

    def __init__(self, policy: PruningPolicy, ridge: float, half_life: float) -> None:
        self.policy, self.ridge, self.half_life = policy, ridge, half_life
        layers, experts = policy.space.shape
        self.worth = torch.zeros(layers * experts)
        self.mean = 0.0

    def fit(self, subsets: torch.Tensor, rewards: torch.Tensor) -> None:
        """Regress rewards [M], in the order of evaluation, on subsets [M, L·E]; in float64."""
        x, y = subsets.double(), rewards.double()
        weight = 0.5 ** ((len(y) - 1 - torch.arange(len(y), dtype=torch.float64)) / self.half_life)
        share = (weight / weight.sum())[:, None]
        centre, mean = (share * x).sum(0), (share[:, 0] * y).sum()
        spread = ((share[:, 0] * (y - mean).square()).sum()).sqrt().clamp_min(1e-12)
        root = weight.sqrt()
        rows = (x - centre) * root[:, None]
        target = (y - mean) / spread * root
        gram = rows @ rows.T + self.ridge * torch.eye(len(y), dtype=torch.float64)
        worth = spread * (rows.T @ torch.linalg.solve(gram, target))
        self.worth = worth.float()
        self.mean = float(mean - centre @ worth)

    def values(self, episodes: Episodes) -> torch.Tensor:
        """V before each pick, [N, T]."""
        gained = self.worth[episodes.picks]
        coming = episodes.expected(self.worth)
        return self.mean + _before(gained, 1) + coming.flip(1).cumsum(1).flip(1)

    def __call__(self, picks: torch.Tensor) -> torch.Tensor:
        """V before each pick of the episodes [N, T]."""
        with torch.no_grad():
            return self.values(Episodes(self.policy, picks))
