"""A recipe: the whole line in one YAML file, run stage by stage as the verbs one would type.

    model: leap-tiny
    task: toy-gsm                     # or data: train.jsonl
    profile: {limit: 256}
    search: {method: leap, experts: 16, episodes: 300}
    cut: {}
    eval: {limit: 200}
    bench: {kind: latency, rounds: 6}

A stage holds the flags of its verb (``input-tokens: 64`` is ``--input-tokens 64``); a stage that is left
out does not run. Relative paths of ``data`` are taken from the recipe's folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from leap_serve.errors import LeapError, UsageError

STAGES = ("profile", "search", "cut", "verify", "eval", "bench")
OURS = {"out", "json", "force", "vs", "base", "task", "data", "results", "state"}
"""Flags that the runner sets itself."""
STATE = "search"
"""Folder of a run that an agent's search continues from when it was interrupted; one subfolder per setting."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One verb to run: its arguments, what it writes below the run's folder (or None), and its key.

    The key is a hash of this stage's arguments and those of all before it: a stage whose key is on
    record need not run again.
    """

    name: str
    argv: tuple[str, ...]
    writes: str | None
    key: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe. ``stages`` maps the stages to run to their flags, in the order of the line."""

    model: str
    task: str | None
    data: str | None
    stages: Mapping[str, Mapping[str, Any]]

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read and check a recipe; raises LeapError that lists everything that is wrong with it."""
        try:
            raw = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UsageError(path, "the file does not exist", "check the path") from None
        except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
            raise LeapError(path, f"is not readable YAML ({' '.join(str(error).split())})", "correct it") from None
        if not isinstance(raw, dict):
            raise LeapError(path, "is not a mapping", "give model, task or data, and stages")
        problems = list(_problems(raw))
        if problems:
            raise LeapError(path, "; ".join(problems), f"known keys are model, task, data, {', '.join(STAGES)}")
        data = str((path.parent / raw["data"]).resolve()) if raw.get("data") else None
        stages = {name: raw[name] or {} for name in STAGES if name in raw}
        return cls(str(raw["model"]), raw.get("task"), data, stages)

    def plan_of_work(self, out: Path) -> list[Stage]:
        """Return the stages to run, with their arguments for a run in ``out``."""
        source = ["--task", self.task] if self.task else ["--data", str(self.data)]
        profile, plan, cut = str(out / "profile"), str(out / "plan.json"), str(out / "checkpoint")
        fixed: dict[str, tuple[list[str], str | None]] = {
            "profile": ([self.model, *source, "--out", profile, "--force"], "profile"),
            "search": ([profile, "--out", plan, "--force", *(source if self.task else [])], "plan.json"),
            "cut": ([self.model, plan, "--out", cut, "--force"], "checkpoint"),
            "verify": ([cut, "--base", self.model], None),
            "eval": ([cut, *(["--task", self.task] if self.task else [])], None),
            "bench": ([cut, "--vs", self.model, "--results", str(out / "bench.jsonl")], None),
        }
        work: list[Stage] = []
        digest = hashlib.sha256()
        for name, flags in self.stages.items():
            given = dict(flags)
            arguments, writes = fixed[name]
            argv = [name, *([str(given.pop("kind", "latency"))] if name == "bench" else []), *arguments]
            for flag, value in given.items():
                argv += _flag(flag, value)
            digest.update(json.dumps(argv).encode())
            if name == "search" and given.get("method") == "leap":
                argv += ["--state", str(out / STATE / digest.hexdigest()[:12])]
            work.append(Stage(name, tuple(argv), writes, digest.hexdigest()))
        return work


def _flag(name: str, value: Any) -> list[str]:
    flag = f"--{name.replace('_', '-')}"
    if isinstance(value, bool):
        return [flag] if value else []
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [flag, str(value)]


def _problems(raw: Mapping[Any, Any]) -> Iterator[str]:
    for key in raw:
        if key not in ("model", "task", "data", *STAGES):
            yield f"unknown key {key!r}"
    if not isinstance(raw.get("model"), str):
        yield "model is missing"
    if bool(raw.get("task")) == bool(raw.get("data")):
        yield "give either task or data"
    if "eval" in raw and not raw.get("task"):
        yield "eval needs a task"
    search = raw.get("search")
    if isinstance(search, dict):
        if search.get("method") == "leap" and not raw.get("task"):
            yield "search.method leap needs a task"
        for size in ("experts", "budget"):
            if isinstance(search.get(size), list) and len(search[size]) != 1:
                yield f"search.{size} lists several budgets, and a run cuts one"
    for name in STAGES:
        flags = raw.get(name) or {}
        if not isinstance(flags, dict):
            yield f"{name} is not a mapping of flags"
            continue
        for flag in flags:
            if str(flag).replace("_", "-") in OURS:
                yield f"{name}.{flag} is set by the run itself"
    have = [name for name in STAGES if name in raw]
    for name, needs in (("search", "profile"), ("cut", "search"), ("verify", "cut"), ("eval", "cut"), ("bench", "cut")):
        if name in have and needs not in have:
            yield f"{name} needs {needs}"
    if not have:
        yield "no stage is given"
