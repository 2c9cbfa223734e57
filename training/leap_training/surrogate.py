"""A model of the reward over subsets, fitted to every plan evaluated so far (DyNA-PPO, Angermueller et al. 2020).

A Gaussian process on x in {0,1}^D, D = L·W, centred at the mean of what was evaluated. Its kernel is
k(x, y) = u + pairs·u², u = (x−c) K (y−c)ᵀ / scale: worths of single choices add up, and so do worths of pairs. K is
the identity plus the similarity of the experts' features within a layer, so that alike experts share evidence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

PAIRS = (0.0, 0.1, 0.3)
NOISE = (0.003, 0.01, 0.03, 0.1, 0.3)
"""Of the kernel's scale; pairs and noise are those of the highest marginal likelihood."""


@dataclass(frozen=True, slots=True)
class Fit:
    """A fitted process over M evaluated plans. All float64.

    Args:
        centre: c [D].
        rows: (x−c)·chol(K) of the evaluated plans, [M, D]; carried ones, each about its own centre, come last.
        scale: mean squared norm of the rows.
        pairs, noise, amplitude: hyperparameters; amplitude is the kernel's variance in units of the rewards'.
        weights: (G + noise)⁻¹ t, [M], of the standardised rewards t.
        inverse: (G + noise)⁻¹, [M, M].
        mean, spread: of the rewards.
        r2: leave-one-out coefficient of determination, of this search's own plans.
    """

    centre: torch.Tensor
    rows: torch.Tensor
    scale: float
    pairs: float
    noise: float
    amplitude: float
    weights: torch.Tensor
    inverse: torch.Tensor
    mean: float
    spread: float
    r2: float


class Surrogate:
    """Predicts rewards of subsets.

    Args:
        features: of the experts, [L, E, F]; columns beyond E (temperatures) resemble nothing.
        width: W.
    """

    def __init__(self, features: torch.Tensor, width: int) -> None:
        layers, experts, _ = features.shape
        centred = features.double() - features.double().mean(1, keepdim=True)
        unit = centred / centred.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        alike = torch.zeros(layers, width, width, dtype=torch.float64)
        alike[:, :experts, :experts] = unit @ unit.mT
        factors = torch.linalg.cholesky(alike + torch.eye(width, dtype=torch.float64))
        self.root = torch.block_diag(*factors)
        self.fitted: Fit | None = None
        self.carried: tuple[torch.Tensor, torch.Tensor] | None = None

    def carry(self, subsets: torch.Tensor, rewards: torch.Tensor) -> None:
        """Learn from another search, too: its subsets [C, D] and rewards [C], each taken about its own mean.

        At another budget rewards have another level and spread; what carries over is which choices were above it.
        """
        x, y = subsets.double(), rewards.double()
        self.carried = x - x.mean(0), (y - y.mean()) / (float(y.std()) or 1.0)

    def fit(self, subsets: torch.Tensor, rewards: torch.Tensor) -> None:
        """Fit to M ≥ 2 plans: subsets [M, D], rewards [M]."""
        x, y = subsets.double(), rewards.double()
        centre, mean, spread = x.mean(0), float(y.mean()), float(y.std()) or 1.0
        rows, target, own = (x - centre) @ self.root, (y - mean) / spread, len(y)
        if self.carried is not None:
            rows = torch.cat([rows, self.carried[0] @ self.root])
            target = torch.cat([target, self.carried[1]])
        scale = float(rows.square().sum(1).mean()) or 1.0
        overlap = rows @ rows.T / scale
        found: tuple[float, float, float, torch.Tensor, torch.Tensor] | None = None
        for pairs in PAIRS:
            values, vectors = torch.linalg.eigh(overlap + pairs * overlap.square())
            values, energy = values.clamp_min(0.0), (vectors.T @ target).square()
            for noise in NOISE:
                # The amplitude has its best value in closed form.
                misfit = len(target) * (energy / (values + noise)).mean().log() + (values + noise).log().sum()
                if found is None or float(misfit) < found[0]:
                    found = (float(misfit), pairs, noise, values, vectors)
        assert found is not None
        _, pairs, noise, values, vectors = found
        inverse = vectors @ torch.diag(1.0 / (values + noise)) @ vectors.T
        weights = inverse @ target
        left_out = (weights / inverse.diagonal())[:own]
        r2 = 1.0 - float(left_out.square().sum() / target[:own].square().sum().clamp_min(1e-12))
        amplitude = float((target @ weights) / len(target))
        self.fitted = Fit(centre, rows, scale, pairs, noise, amplitude, weights, inverse, mean, spread, r2)

    def predict(self, subsets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the rewards of subsets [N, D]; [N] each, float32."""
        fit = self._fit()
        rows = (subsets.double() - fit.centre) @ self.root
        overlap, own = rows @ fit.rows.T / fit.scale, rows.square().sum(1) / fit.scale
        shared = overlap + fit.pairs * overlap.square()
        variance = own + fit.pairs * own.square() - ((shared @ fit.inverse) * shared).sum(1)
        deviation = (fit.amplitude * variance.clamp_min(0.0)).sqrt()
        return (fit.mean + fit.spread * (shared @ fit.weights)).float(), (fit.spread * deviation).float()

    def linear(self) -> tuple[torch.Tensor, float]:
        """Worth of every choice [D] and the constant: the prediction's tangent at the mean of what was evaluated."""
        fit = self._fit()
        worth = fit.spread / fit.scale * (self.root @ (fit.rows.T @ fit.weights))
        return worth.float(), fit.mean - float(fit.centre @ worth)

    @property
    def r2(self) -> float:
        """Leave-one-out R² of the last fit; 0 before."""
        return self.fitted.r2 if self.fitted is not None else 0.0

    def _fit(self) -> Fit:
        assert self.fitted is not None, "fit comes first"
        return self.fitted
