"""A task of one's own, from rows in memory: are these few things or many?

python -m leap_serve.examples.custom_task
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leap_serve import LEAPFramework, ModelConfig

NAMES = ("Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo")
THINGS = ("apples", "books", "cards", "coins", "eggs", "shells", "stamps", "pears")
SHORT = {
    "profile": {"limit": 64},
    "search": {"items": 16},
    "tune": {"rounds": 2, "labels": 128, "steps": 100, "batch": 16},
}


def rows() -> list[dict[str, str]]:
    """Rows with the fields that the prompt below names; 50 is many."""
    draw = random.Random(0)
    counts = (draw.randint(10, 99) for _ in itertools.count())
    return [
        {"who": who, "what": what, "count": str(count), "size": "many" if count >= 50 else "few"}
        for (who, what, _), count in zip(itertools.product(NAMES, THINGS, range(4)), counts, strict=False)
    ]


def main(
    out: str | Path = "runs/custom-task", episodes: int = 100, settings: Mapping[str, Mapping[str, Any]] = SHORT
) -> dict[str, Any]:  # fmt: skip
    """Specialise leap-tiny on them; a fifth of the rows is for validation, and another one for the test."""
    fifths = [rows()[place::5] for place in range(5)]
    config = ModelConfig(
        target_experts=16, task="few-or-many", prompt="{who} has {count} {what}. Few or many?\nAnswer: ", answer="size",
        metric="exact match", max_tokens=4, settings=settings,
    )  # fmt: skip
    leap = LEAPFramework(config, out)
    pruned = leap.optimize(
        model="leap-tiny", train_data=[*fifths[0], *fifths[1], *fifths[2]], val_data=fifths[3], num_episodes=episodes
    )
    results = leap.evaluate(pruned, test_data=fifths[4])
    print(f"{pruned}: {100 * results['accuracy']:.1f} % of {results['items']} unseen rows right")
    return results


if __name__ == "__main__":
    main()
