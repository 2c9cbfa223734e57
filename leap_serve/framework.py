"""The interface of LEAP's authors: the whole line behind ``optimize`` and ``evaluate``.

    leap = LEAPFramework(ModelConfig(num_experts=64, target_experts=16, task="toy-gsm"))
    pruned = leap.optimize(model="leap-tiny", num_episodes=500, budget_constraint=0.25)
    leap.evaluate(pruned)["accuracy"]

``optimize`` writes a recipe and runs it as ``leap run`` does, ``evaluate`` runs ``leap eval``: what is found here is
what the command line finds, and an interrupted call goes on where it stopped when it is made again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from leap_serve.authors_yaml import SECTIONS
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.run import run_recipe, run_verb
from leap_serve.errors import LeapError, UsageError
from leap_serve.files import write_bytes
from leap_serve.flops import flops_per_token
from leap_serve.recipe import STAGES, as_flag
from leap_serve.search_flags import reads

Data = str | Path | Iterable[Mapping[str, Any]]
"""A JSON Lines file (plain or .gz), rows, or a ``datasets.Dataset``."""
LINE = ("profile", "search", "cut", "tune")
"""The stages of :meth:`LEAPFramework.optimize`, unless the settings name more or take one away."""
PRODUCTS = {"cut": "checkpoint", "tune": "tuned", "export": "plain"}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What is known of the model, what is wanted of it, and on which task.

    Args:
        model_type, num_experts, expert_dim, hidden_dim, num_layers, vocab_size: claims about the model, the second
            in parameters per expert; those that its config.json contradicts are refused with the true value.
        target_experts: experts to retain per layer.
        task: a task's name or YAML file; with data of one's own, what to call it.
        prompt, answer, metric, stop, max_tokens: of one's own data, as in a task's YAML file (leap_serve.tasks.user).
        settings: stages and sections of a recipe, for instance {"tune": {"steps": 400}, "pruning": {"ppo_epochs": 4}};
            None in place of a stage's flags leaves the stage out.
    """

    model_type: str | None = None
    num_experts: int | None = None
    expert_dim: float | None = None
    hidden_dim: int | None = None
    num_layers: int | None = None
    vocab_size: int | None = None
    target_experts: int | None = None
    task: str | None = None
    prompt: str = "{prompt}"
    answer: str = "answer"
    metric: str = "exact match"
    stop: tuple[str, ...] = ("\n",)
    max_tokens: int = 64
    settings: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    @property
    def claims(self) -> dict[str, Any]:
        """The claims about the model, by the recipe's names for them."""
        given = {
            "type": self.model_type, "num_experts": self.num_experts, "expert_size": self.expert_dim,
            "hidden_dim": self.hidden_dim, "num_layers": self.num_layers, "vocab_size": self.vocab_size,
        }  # fmt: skip
        return {key: value for key, value in given.items() if value is not None}


class LEAPFramework:
    """Prunes and specialises a model for a task, and scores the result.

    Args:
        config: see :class:`ModelConfig`.
        out: folder of the run; the same one again continues or repeats it.
    """

    def __init__(self, config: ModelConfig, out: str | Path = "runs/framework") -> None:
        unknown = [key for key in config.settings if key not in (*STAGES, *SECTIONS)]
        if unknown:
            known = ", ".join((*STAGES, *SECTIONS))
            raise UsageError("settings", f"there is no {', '.join(map(repr, unknown))}", f"known are {known}")
        self.config, self.out = config, Path(out)
        self._full: str | None = None

    def optimize(
        self,
        model: str | Path,
        train_data: Data | None = None,
        val_data: Data | None = None,
        num_episodes: int = 500,
        budget_constraint: float | None = None,
    ) -> Path:
        """Profile, search, cut and tune; returns the folder of the checkpoint that the last of these stages wrote.

        Args:
            model: folder, bundled name or model id.
            train_data, val_data: prompts and answers of one's own; without ``val_data`` 5 % of the others are held
                out. Without both the items are those of ``config.task``.
            num_episodes: plans that the pruning agent, or another search in its place, evaluates.
            budget_constraint: fraction of the experts to retain; with ``config.target_experts`` they must agree.

        Raises:
            LeapError: what is asked for contradicts the model, or a stage failed.
        """
        if budget_constraint is None and self.config.target_experts is None:
            raise UsageError("budget_constraint", "is missing, as is target_experts", "give one of them")
        settings: dict[str, Any] = {stage: {} for stage in LINE} | dict(self.config.settings)
        asked = {"target_experts": self.config.target_experts, "budget_constraint": budget_constraint}
        pruning = {key: value for key, value in asked.items() if value is not None}
        if reads(str((settings["search"] or {}).get("method", "leap")), "episodes"):
            pruning["meta_episodes"] = num_episodes
        pruning |= settings.pop("pruning", None) or {}
        recipe = {
            "model": {"path": _place(model), **self.config.claims},
            "task": self._task({"train": train_data, "validation": val_data}),
            "pruning": pruning,
            **{name: dict(flags) for name, flags in settings.items() if flags is not None},
        }
        path = self.out / "recipe.yaml"
        write_bytes(path, yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True).encode())
        stages = run_recipe(path, self.out)["stages"]
        self._full = str(model)
        return self.out / next(PRODUCTS[stage] for stage in reversed(PRODUCTS) if stage in stages)

    def evaluate(
        self,
        model: str | Path,
        test_data: Data | None = None,
        *,
        full: str | Path | None = None,
        **flags: Any,
    ) -> dict[str, Any]:
        """Score a checkpoint on unseen items, greedily, in the engine that serves.

        Args:
            model: a checkpoint, as :meth:`optimize` returns it, or a full model.
            test_data: as ``train_data``; None takes the test split of ``config.task``.
            full: the full model to compare sizes with; None takes the one that was optimized.
            flags: of ``leap eval``, for instance limit=200.

        Returns {"accuracy": mean of the task's metric in [0, 1], "interval" of it, "metric", "loss" in nats per answer
        token, "items", "flops_per_token", "weights_gib"} and, where the full model is known, "flop_reduction" and
        "weights_reduction": the full model's over this one's. Pruning alone leaves the FLOPs of a token as they were;
        top_k decides them.
        """
        task = self._task({"test": test_data})
        found_at = self.out / f"eval-{Path(model).name}-{Path(task).stem}.json"
        argv = ["eval", str(model), "--task", task, "--out", str(found_at)]
        for flag, value in flags.items():
            argv += as_flag(flag, value)
        (found,) = run_verb(argv, "evaluate")["tasks"].values()
        own = Checkpoint.open(resolve_model(str(model)))
        result = {
            "accuracy": found["score"], "interval": found["interval"], "metric": found["metric"],
            "loss": found["loss"], "items": found["items"], "flops_per_token": flops_per_token(own),
            "weights_gib": own.weight_bytes / 2**30,
        }  # fmt: skip
        known = full or self._full
        if known is not None:
            whole = Checkpoint.open(resolve_model(str(known)))
            result["flop_reduction"] = flops_per_token(whole) / result["flops_per_token"]
            result["weights_reduction"] = whole.weight_bytes / own.weight_bytes
        return result

    def _task(self, data: Mapping[str, Data | None]) -> str:
        """The task's name, or the YAML file of one's own data."""
        given = {split: self._file(split, rows) for split, rows in data.items() if rows is not None}
        if not given:
            if self.config.task is None:
                raise UsageError("task", "is missing, and there is no data", "name a task, or give data")
            return _place(self.config.task)
        name = Path(self.config.task or "task").stem
        path = self.out / "data" / f"{name}-{'-'.join(given)}.yaml"
        task = {
            "name": name, "prompt": self.config.prompt, "answer": self.config.answer, "metric": self.config.metric,
            "separator": "", "stop": list(self.config.stop), "max_tokens": self.config.max_tokens, "splits": given,
        }  # fmt: skip
        write_bytes(path, yaml.safe_dump(task, sort_keys=False, allow_unicode=True).encode())
        return str(path.resolve())

    def _file(self, split: str, rows: Data) -> str:
        """The file of these rows; rows in memory are written to one."""
        if isinstance(rows, str | Path):
            return str(Path(rows).resolve())
        lines = []
        for number, row in enumerate(rows, 1):
            if not isinstance(row, Mapping):
                raise LeapError(
                    f"{split} row {number}", f"is a {type(row).__name__}", "give mappings of field to value"
                )
            lines.append(json.dumps(dict(row), ensure_ascii=False) + "\n")
        path = self.out / "data" / f"{split}.jsonl"
        write_bytes(path, "".join(lines).encode())
        return str(path.resolve())


def _place(name: str | Path) -> str:
    """An existing path in full, for a recipe's paths are taken from its own folder; any other name as it is."""
    return str(Path(name).resolve()) if Path(name).exists() else str(name)
