"""Methods compared at equal size: each plan scored by its loss on items that nothing was chosen by, without cutting.

python -m leap_serve.examples.model_comparison
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from leap_serve.cli import main as leap
from leap_serve.engine import mean_loss
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.plan import Plan
from leap_serve.tasks.registry import load_task

METHODS = ("random", "frequency", "gate-mass", "reap", "leap")


def main(
    out: str | Path = "runs/model-comparison", methods: Sequence[str] = METHODS, experts: int = 16, episodes: int = 200,
    items: int = 64,
) -> dict[str, float]:  # fmt: skip
    """Return the loss in nats per answer token of each method's plan on word problems, and of the full model."""
    out = Path(out)
    run("profile", "leap-tiny", "--task", "toy-gsm", "--out", out / "profile", "--force")
    for method in methods:
        searched = ["--task", "toy-gsm", "--episodes", episodes] if method == "leap" else []
        run("search", out / "profile", "--method", method, "--experts", experts, *searched,
            "--out", out / f"{method}.json", "--force")  # fmt: skip
    unseen = load_task("toy-gsm").items("test", items)
    engine = TorchEngine("leap-tiny", dtype="float32")
    try:
        plans = [Plan.load(out / f"{method}.json") for method in methods]
        losses = {
            name: mean_loss(found) for name, found in zip(methods, engine.score_plans(plans, unseen), strict=True)
        }
        losses["full model"] = mean_loss(engine.score(unseen))
    finally:
        engine.close()
    for name, loss in sorted(losses.items(), key=lambda pair: pair[1]):
        print(f"{name:12} {loss:.3f}")
    return losses


def run(*argv: object) -> None:
    """One verb of the command line; a failure has said why."""
    if leap([str(word) for word in argv]):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
