"""The search for a subset as a gymnasium environment (LEAP §3.1, methods.md §4), for any agent.

State: which experts were chosen so far, what they add up to in the profile's saliency, what is left of the
budget, and the reward of the last plan evaluated. Action: add expert (l, e), or stop. The bundled agent
(:mod:`leap_training.pruning_agent`) draws whole episodes of the same process at once and does not need it.
"""

from __future__ import annotations

from typing import Any

import gymnasium
import numpy as np
import numpy.typing as npt

from leap_serve.errors import UsageError
from leap_training.pruning_space import Ledger
from leap_training.saliency import Scores

Observation = dict[str, npt.NDArray[Any]]


class PruningEnv(gymnasium.Env[Observation, np.int64]):
    """One episode builds one plan.

    Actions: l·E + e adds expert e of the l-th MoE layer; L·E stops. ``info["action_mask"]`` [L·E + 1] int8 says
    which are valid: no expert twice, no layer over its cap, no expert while the rest of the budget is needed for
    the layers' floors (top_k), no stop before these are filled. An invalid action changes nothing and costs
    ``penalty``. An episode terminates on stop, or when the budget is spent.

    Rewards: ``terminal`` gives R(I) of the finished plan at its last step: one evaluation per episode. ``dense``
    gives R at every step whose subset is a complete plan, as algorithm 1 of the paper does: an evaluation each.
    With ``shaping`` c > 0 every step adds c·(gamma·Φ(s') − Φ(s)), Φ(s) = the share of the profile's saliency that
    is chosen, mean over layers, and 0 in terminal states. Potential-based shaping leaves the optimal policies
    unchanged (Ng, Harada & Russell 1999) for an agent that discounts by the same gamma.

    Args:
        ledger: evaluates and remembers plans; its space bounds them.
        scores: saliency by layer, [E] each, not negative.
        reward: "terminal" or "dense".
        shaping: c.
        gamma: the agent's discount.
        penalty: subtracted for an invalid action.
        max_steps: the episode is truncated after so many; None: 2·(budget + 1).
    """

    metadata = {"render_modes": []}  # noqa: RUF012, gymnasium declares it so

    def __init__(
        self,
        ledger: Ledger,
        scores: Scores,
        *,
        reward: str = "terminal",
        shaping: float = 0.0,
        gamma: float = 1.0,
        penalty: float = 0.1,
        max_steps: int | None = None,
    ) -> None:
        if reward not in ("terminal", "dense"):
            raise UsageError("--reward", f"there is no {reward!r}", "choose terminal or dense")
        if len(ledger.space.temperatures) > 1:
            raise UsageError("--temperature", "cannot be searched step by step", "give one value")
        self.ledger, self.space = ledger, ledger.space
        self.dense, self.shaping, self.gamma, self.penalty = reward == "dense", shaping, gamma, penalty
        self.max_steps = max_steps or 2 * (self.space.budget + 1)
        found = np.stack([np.asarray(scores[layer], np.float64) for layer in self.space.layers])
        total = found.sum(1, keepdims=True)
        self.share = np.divide(found, total, out=np.zeros_like(found), where=total > 0)
        layers, experts = self.space.shape
        boxes: dict[str, gymnasium.Space[Any]] = {
            "chosen": gymnasium.spaces.MultiBinary((layers, experts)),
            "contribution": gymnasium.spaces.Box(0.0, 1.0, (layers,), np.float32),
            "remaining": gymnasium.spaces.Box(0.0, 1.0, (1,), np.float32),
            "quality": gymnasium.spaces.Box(-np.inf, np.inf, (1,), np.float32),
        }
        self.observation_space: gymnasium.Space[Any] = gymnasium.spaces.Dict(boxes)
        self.action_space = gymnasium.spaces.Discrete(layers * experts + 1)
        self._begin()

    def _begin(self) -> None:
        self.chosen = np.zeros(self.space.shape, bool)
        self.quality, self.steps, self.over = 0.0, 0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Observation, dict[str, Any]]:
        """Start with no expert chosen."""
        super().reset(seed=seed)
        self._begin()
        return self._observe(), self._info()

    def mask(self) -> npt.NDArray[np.int8]:
        """Valid actions, [L·E + 1]."""
        allowed = self.space.allowed(self.chosen).ravel()
        return np.append(allowed, self.space.complete(self.chosen)).astype(np.int8)

    def potential(self) -> float:
        """Φ: the share of each layer's saliency that is chosen, mean over layers; 0 once the episode is over."""
        return 0.0 if self.over else float((self.share * self.chosen).sum(1).mean())

    def step(self, action: np.int64) -> tuple[Observation, float, bool, bool, dict[str, Any]]:
        """Add an expert or stop."""
        before, number = self.potential(), int(action)
        self.steps += 1
        truncated = self.steps >= self.max_steps
        if self.over or not self.mask()[number]:
            return self._observe(), -self.penalty, self.over, truncated, self._info(valid=False)
        stop = number == self.chosen.size
        if not stop:
            self.chosen.flat[number] = True
        self.over = stop or not self.space.allowed(self.chosen).any()
        reward = 0.0
        if self.space.complete(self.chosen) and (self.dense or self.over):
            (found,) = self.ledger([self.chosen])
            assert found is not None, "no limit was given"
            reward = self.quality = found
        reward += self.shaping * (self.gamma * self.potential() - before)
        return self._observe(), reward, self.over, truncated and not self.over, self._info()

    def _observe(self) -> Observation:
        return {
            "chosen": self.chosen.astype(np.int8),
            "contribution": (self.share * self.chosen).sum(1).clip(0, 1).astype(np.float32),
            "remaining": np.array([1 - self.chosen.sum() / self.space.budget], np.float32),
            "quality": np.array([self.quality], np.float32),
        }

    def _info(self, valid: bool = True) -> dict[str, Any]:
        return {"action_mask": self.mask(), "valid": valid, "evaluations": self.ledger.evaluations}
