"""Is the plan that is chosen before tuning still the best after it? leap-tiny on its hard task, 16 and 8 of 64.

    python bench/bench_lookahead.py --experts 8 --seeds 0 1 2

Plans by one-shot criteria, by evolution, by the agent, by the agent with look-ahead (its finalists tuned for a few
steps, the best of them kept) and by the agent trained on look-ahead as a second stage. Each is cut, scored on test
items, tuned by leap_training.finetune (400 steps, 1,000 items, the same for all), and scored again. Searches are
scored by masked-out transformers in memory, which agrees with the engine to 1e-4. One row per plan in
bench/results/lookahead.jsonl; rows that are there are not made again, and --work keeps the searches.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import resolve_model
from leap_serve.cli.console import table
from leap_serve.cut.write import cut
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.evaluation.evaluate import evaluate
from leap_serve.files import append_jsonl, read_jsonl
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.tasks.base import Item
from leap_serve.tasks.registry import load_task
from leap_training.controls import Given, evolution
from leap_training.finetune import FinetuneConfig, finetune
from leap_training.lookahead import LookAhead, finalists, second_stage
from leap_training.pruning_agent import Agent, AgentConfig, best_ranking
from leap_training.pruning_space import Ledger, PruningSpace
from leap_training.saliency import Routing, allocate, scores
from leap_training.search_state import StateFolder, fingerprint

RESULTS = Path(__file__).parent / "results" / "lookahead.jsonl"
MODEL, TASK, PROFILED = "leap-tiny", "toy-gsm", 256
ONE_SHOT = ("frequency", "gate-mass", "reap")
METHODS = (*ONE_SHOT, "evolution", "leap", "leap+finalists", "leap+lookahead")


@dataclass(frozen=True, slots=True)
class Setting:
    """One budget and one seed: what all methods share."""

    profile: Profile
    experts: int
    seed: int
    episodes: int
    steps: int
    finalists: int
    second: int
    work: Path

    @property
    def folder(self) -> Path:
        return self.work / f"{self.experts}-{self.seed}"

    @property
    def space(self) -> PruningSpace:
        return PruningSpace.of(Routing.of(self.profile), experts=self.experts)

    def look(self, steps: int, items: list[Item]) -> LookAhead:
        train = load_task(TASK).items("train", FinetuneConfig().items, self.seed)
        return LookAhead(MODEL, train, items, FinetuneConfig(steps=steps, seed=self.seed))

    def plans(self) -> dict[str, Callable[[], Plan]]:
        """How each method makes its plan."""
        shot = {name: lambda name=name: self.one_shot(name) for name in ONE_SHOT}
        return {
            **shot, "evolution": self.evolved, "leap": lambda: self.agent()[0], "leap+finalists": self.best_finalist,
            "leap+lookahead": self.second_stage,
        }  # fmt: skip

    def one_shot(self, name: str) -> Plan:
        return allocate(scores(self.profile, name), Routing.of(self.profile), experts=self.experts, method=name)

    def ledger(self) -> Ledger:
        return Ledger(self.look(0, load_task(TASK).items("validation", 32, self.seed)), self.space)

    def evolved(self) -> Plan:
        ledger = self.ledger()
        _, prior = best_ranking(self.profile, ledger)
        evolution(ledger, Given(prior, self.episodes, self.seed))
        return self.space.plan(ledger.best()[0], method="evolution", search_loss=ledger.best()[2])

    def agent(self) -> tuple[Plan, Agent]:
        """The first stage, made once and kept on disk: the search by the loss before tuning."""
        ledger = self.ledger()
        _, prior = best_ranking(self.profile, ledger)
        agent = Agent(self.profile, prior, ledger, AgentConfig(episodes=self.episodes, seed=self.seed))
        disk = StateFolder(self.folder / "state", fingerprint(agent, self.profile, f"{TASK} {self.seed}"))
        disk.resume(agent)
        while not agent.finished:
            agent.step()
            disk.save(agent)
        return self.space.plan(ledger.best()[0], method="leap", search_loss=ledger.best()[2]), agent

    def best_finalist(self) -> Plan:
        _, agent = self.agent()
        after, chosen = self.tuned_finalists(agent)
        best = int(np.argmin(after))
        return self.space.plan(
            chosen[best], method="leap+finalists", after=after,
            before=[agent.ledger.losses[one.tobytes()] for one in chosen],
        )  # fmt: skip

    def tuned_finalists(self, agent: Agent) -> tuple[list[float], list[Any]]:
        chosen = finalists(agent.ledger, self.finalists)
        held_out = load_task(TASK).items("validation", 128, self.seed + 1000)
        return self.look(self.steps, held_out)([self.space.plan(one) for one in chosen]), chosen

    def second_stage(self) -> Plan:
        """The policy of the first stage, trained on the loss after tuning; its finalists are the first evaluations."""
        _, first = self.agent()
        held_out = load_task(TASK).items("validation", 128, self.seed + 1000)
        ledger = Ledger(self.look(self.steps, held_out), self.space)
        ledger(finalists(first.ledger, self.finalists))
        limit = ledger.evaluations + self.second
        config = AgentConfig(episodes=limit, batch=8, seed=self.seed)
        second_stage(self.profile, first.prior, ledger, config, self.folder / "state")
        after = list(ledger.losses.values())
        return self.space.plan(
            ledger.best()[0], method="leap+lookahead", lookahead_loss=ledger.best()[2], after=after,
            first_loss=first.ledger.losses.get(ledger.best()[0].tobytes()),
        )  # fmt: skip


def score(folder: Path, items: int) -> dict[str, float]:
    """Exact match and loss on test items."""
    engine = TorchEngine(folder, dtype="float32", device="cpu")
    try:
        task = load_task(TASK)
        outcome = evaluate(engine, task, task.items("test", items))
        return {"score": outcome.score, "loss": outcome.loss}
    finally:
        engine.close()


def measure(setting: Setting, method: str, items: int) -> dict[str, Any]:
    """Make one method's plan, cut, score, tune, score."""
    began = time.monotonic()
    folder = setting.folder / method
    if (folder / "plan.json").exists():
        plan = Plan.load(folder / "plan.json")
    else:
        plan = setting.plans()[method]()
        plan.save(folder / "plan.json")
    seconds = time.monotonic() - began
    cut(resolve_model(MODEL), plan, folder / "cut", force=True)
    config = FinetuneConfig(seed=setting.seed)
    before = score(folder / "cut", items)
    finetune(folder / "cut", TASK, folder / "tuned", config, force=True)
    return {
        "bench": "lookahead", "model": MODEL, "task": TASK, "experts": setting.experts, "seed": setting.seed,
        "method": method, "episodes": setting.episodes, "lookahead_steps": setting.steps,
        "finalists": setting.finalists, "second_stage": setting.second, "test_items": items, "before": before,
        "after": score(folder / "tuned", items), "plan_seconds": round(seconds, 1), "plan": plan.fingerprint,
        "found": {key: plan.made_by[key] for key in ("search_loss", "lookahead_loss", "after") if key in plan.made_by},
        "tuning": {"items": config.items, "steps": config.steps, "batch": config.batch, "lr": config.lr},
    }  # fmt: skip


def known(path: Path) -> dict[tuple[int, int, str], dict[str, Any]]:
    """Rows that are there, by (experts, seed, method)."""
    return {(row["experts"], row["seed"], row["method"]): row for row in read_jsonl(path)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, nargs="+", default=[16, 8])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--items", type=int, default=256, help="test items")
    parser.add_argument("--episodes", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20, help="tuning steps of the look-ahead")
    parser.add_argument("--finalists", type=int, default=8)
    parser.add_argument("--second", type=int, default=32, help="plans evaluated in the second stage")
    parser.add_argument("--work", type=Path, default=Path("runs/lookahead"), help="searches and checkpoints")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if not (args.work / "profile").exists():
        engine = TorchEngine(MODEL, dtype="float32")
        engine.profile(load_task(TASK).items("train", PROFILED)).save(args.work / "profile")
        engine.close()
    profile = Profile.load(args.work / "profile")
    for seed in args.seeds:
        for experts in args.experts:
            setting = Setting(
                profile, experts, seed, args.episodes, args.steps, args.finalists, args.second, args.work
            )  # fmt: skip
            for method in args.methods:
                if (experts, seed, method) not in known(args.results):
                    append_jsonl(args.results, stamped(measure(setting, method, args.items)))
    show(args)


def show(args: argparse.Namespace) -> None:
    """The table: means over the seeds that are there."""
    rows = known(args.results)
    for experts in args.experts:
        lines = []
        for method in args.methods:
            own = [rows[experts, seed, method] for seed in args.seeds if (experts, seed, method) in rows]
            cells = [
                f"{scale * np.mean([row[when][what] for row in own]):.{digits}f}"
                for when in ("before", "after") for what, scale, digits in (("loss", 1, 3), ("score", 100, 1)) if own
            ]  # fmt: skip
            lines += [[method, len(own), *cells]] if own else []
        header = ["method", "seeds", "loss before", "% before", "loss after", "% after"]
        table(f"{TASK}, {experts} of 64 experts, {args.items} test items", header, lines)


if __name__ == "__main__":
    main()
