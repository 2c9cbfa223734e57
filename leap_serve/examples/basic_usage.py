"""The whole line in Python: find the experts that a task needs, cut them out, tune, and score the result.

python -m leap_serve.examples.basic_usage
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_serve import LEAPFramework, ModelConfig

SHORT = {"tune": {"rounds": 2, "labels": 512, "steps": 200}}
"""Enough to see it work; without it tuning takes the paper's 10 rounds of 1,024 labels."""


def main(
    out: str | Path = "runs/basic-usage", episodes: int = 200, limit: int = 100, settings: Mapping[str, Mapping[str, Any]] = SHORT
) -> dict[str, Any]:  # fmt: skip
    """Prune leap-tiny to 16 of its 64 experts per layer for word problems, and score it on unseen ones."""
    config = ModelConfig(num_experts=64, target_experts=16, task="toy-gsm", settings=settings)
    leap = LEAPFramework(config, out)
    pruned = leap.optimize(model="leap-tiny", num_episodes=episodes, budget_constraint=0.25)
    results = leap.evaluate(pruned, limit=limit)
    print(f"{pruned}: {100 * results['accuracy']:.1f} % right, weights {results['weights_reduction']:.1f}x smaller, "
          f"{results['flop_reduction']:.2f}x fewer FLOPs per token")  # fmt: skip
    return results


if __name__ == "__main__":
    main()
