"""A recipe: the whole line in one YAML file, run stage by stage as the verbs one would type.

    model: leap-tiny
    task: toy-gsm                     # or data: train.jsonl
    profile: {limit: 256}
    search: {method: leap, experts: 16, episodes: 300}
    cut: {}
    tune: {rounds: 4, steps: 400}
    eval: {limit: 200}
    bench: {kind: latency, rounds: 6}
    load: {limit: 64}

A stage holds the flags of its verb (``input-tokens: 64`` is ``--input-tokens 64``); a stage that is left
out does not run. Relative paths are taken from the recipe's folder. What is tuned is what is evaluated and
measured, and what is exported if ``export`` is a stage. ``eval`` may name tasks of its own; it and ``gate: {file:
gate.yaml}``, which looks at what is not the task, compare with the full model. ``load`` profiles what came of it, so
that the report shows how the retained experts are used. The sections of the authors' YAML (leap_serve.authors_yaml)
may stand beside or in place of stages.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from leap_serve.authors_yaml import SECTIONS, contradictions, translate
from leap_serve.errors import LeapError, UsageError
from leap_serve.files import read_json, read_yaml, sha256_of
from leap_serve.hub import resolve_model
from leap_serve.search_flags import reads
from leap_serve.tasks.user import SUFFIXES, UserTask

NEEDS = {
    "profile": None, "search": "profile", "cut": "search", "verify": "cut", "tune": "cut", "export": "tune",
    "eval": "cut", "gate": "cut", "bench": "cut", "load": "cut",
}  # fmt: skip
"""Every stage, in the order of the line, and the one whose product it takes."""
STAGES = tuple(NEEDS)
ON_AND_OFF = ("supervised-router", "active-learning")
"""Switches of the verbs that are on unless they are turned off."""
OURS = {"out", "json", "force", "vs", "base", "task", "data", "results", "state", "latency"}
"""Flags that the runner sets itself."""
CHANNEL_SUMS = ("moe-pruner", "intra")
"""Searches that need a profile with channel sums."""
VERBS = {"gate": "eval", "load": "profile"}
"""Stages that are not called as their verbs are."""
GATE = "gate.json"
"""What the gate found, also where it found a bound broken."""
SEARCH, TUNE = "search", "tune"
"""Folders of a run that the agents continue from when they were interrupted; one subfolder per setting."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One verb to run: its arguments, what it writes below the run's folder (or None), and its key.

    The key is a hash of this stage's arguments and those of all before it, and of the files that the recipe
    names: a stage whose key is on record need not run again.
    """

    name: str
    argv: tuple[str, ...]
    writes: str | None
    key: str


@dataclass(frozen=True, slots=True)
class Recipe:
    """A parsed recipe.

    Args:
        model: folder, bundled name or model id.
        task, data: one of both; a task may be the path of a YAML file.
        stages: the stages to run → their flags, in the order of the line.
        claims: what the recipe says about the model, see :meth:`check_model`.
    """

    model: str
    task: str | None
    data: str | None
    stages: Mapping[str, Mapping[str, Any]]
    claims: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> Recipe:
        """Read and check a recipe; raises LeapError that lists everything that is wrong with it."""
        try:
            raw = read_yaml(path)
        except FileNotFoundError:
            raise UsageError(path, "the file does not exist", "check the path") from None
        if not isinstance(raw, dict):
            raise LeapError(path, "is not a mapping", "give model, task or data, and stages")
        ours, claims, problems = translate(raw)
        problems = problems or list(_problems(ours))
        if problems:
            known = ", ".join(("model", "task", "data", *STAGES, *SECTIONS))
            raise LeapError(path, "; ".join(problems), f"known keys are {known}")
        data, task = ours.get("data"), ours.get("task")
        stages = {name: dict(ours[name] or {}) for name in STAGES if name in ours}
        if "eval" in stages and "task" in stages["eval"]:
            own = stages["eval"]["task"]
            stages["eval"]["task"] = [_resolved(path, one) for one in (own if isinstance(own, list) else [own])]
        if "gate" in stages:
            stages["gate"]["file"] = str((path.parent / stages["gate"]["file"]).resolve())
        return cls(
            str(ours["model"]), _resolved(path, task) if task else None,
            str((path.parent / data).resolve()) if data else None, stages, claims,
        )  # fmt: skip

    def check_model(self) -> None:
        """Raise LeapError with the true values where the model's config.json contradicts the recipe.

        Of a model id only config.json is downloaded for this.
        """
        if not self.claims:
            return
        where = resolve_model(self.model, wanted=["config.json"]) / "config.json"
        wrong = list(contradictions(read_json(where), self.claims, where))
        if wrong:
            raise LeapError(self.model, "; ".join(wrong), "correct the recipe, or leave out what is wrong")

    def plan_of_work(self, out: Path) -> list[Stage]:
        """Return the stages to run, with their arguments for a run in ``out``."""
        source = ["--task", self.task] if self.task else ["--data", str(self.data)]
        profile, plan, cut, tuned, plain = (
            str(out / name) for name in ("profile", "plan.json", "checkpoint", "tuned", "plain")
        )
        # It reads weights alone, and says so where it is given a profile.
        searched = self.model if self.stages.get(SEARCH, {}).get("method") == "magnitude" else profile
        made = plain if "export" in self.stages else tuned if "tune" in self.stages else cut
        fixed: dict[str, tuple[list[str], str | None]] = {
            "profile": ([self.model, *source, "--out", profile, "--force"], "profile"),
            "search": ([searched, "--out", plan, "--force", *(source if self.task else [])], "plan.json"),
            "cut": ([self.model, plan, "--out", cut, "--force"], "checkpoint"),
            "verify": ([cut, "--base", self.model], None),
            "tune": ([cut, *source, "--out", tuned, "--force"], "tuned"),
            "export": ([tuned, "--out", plain, "--force"], "plain"),
            "eval": ([made, "--vs", self.model, "--out", str(out / "eval.json")], "eval.json"),
            "gate": ([made, "--vs", self.model, "--out", str(out / GATE)], GATE),
            "bench": ([made, "--vs", self.model, "--results", str(out / "bench.jsonl")], None),
            "load": ([made, *source, "--out", str(out / "load"), "--force"], "load"),
        }
        work: list[Stage] = []
        digest = hashlib.sha256(_hashes([self.task, self.data]).encode())
        calibrated: list[str] = []
        for name, flags in self.stages.items():
            given = dict(flags)
            arguments, writes = fixed[name]
            verb = ["bench", str(given.pop("kind", "latency"))] if name == "bench" else [VERBS.get(name, name)]
            argv = [*verb, *arguments]
            if name == "eval":
                tasks = given.pop("task", [self.task])
                argv += [word for task in tasks for word in ("--task", task)]
                digest.update(_hashes(tasks).encode())
            if name == "gate":
                file = str(given.pop("file"))
                argv += ["--gate", file]
                digest.update(sha256_of(_existing(file)).encode())
            for flag, value in given.items():
                argv += as_flag(flag, value)
            digest.update(json.dumps(argv).encode())
            state = out / name / digest.hexdigest()[:12]
            if name == TUNE or (name == SEARCH and reads(str(given.get("method")), "state")):
                argv += ["--state", str(state)]
            if name == SEARCH and _is_positive(given.get("lambda")):
                calibrated = ["--latency", str(state / "latency.json")]
            if name == TUNE and _is_positive(_of(given, "latency-coef")):
                # The price of an expert read, as the search measured it in the engine.
                argv += calibrated
            work.append(Stage(name, tuple(argv), writes, digest.hexdigest()))
        return work


def _hashes(named: Iterable[str | None]) -> str:
    """Hashes of data files and of task files with their data, for a changed file is other data; names of tasks give none."""
    files: list[Path] = []
    for one in named:
        if one and _is_file(one):
            data = UserTask.load(Path(one)).data
            files += [Path(one), *(data.values() if isinstance(data, Mapping) else ())]
        elif one and Path(one).is_absolute():
            files.append(Path(one))
    return " ".join(sha256_of(_existing(file)) for file in files)


def _existing(file: str | Path) -> Path:
    if not Path(file).is_file():
        raise UsageError(file, "the file does not exist", "check the recipe and its task")
    return Path(file)


def _of(flags: Mapping[str, Any], name: str) -> Any:
    """A flag's value, whether it was written with dashes or underscores."""
    return flags.get(name, flags.get(name.replace("-", "_")))


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and value > 0


def _is_file(task: str) -> bool:
    return Path(task).suffix in SUFFIXES


def _resolved(recipe: Path, task: Any) -> str:
    """A task's name, or the path of its YAML file from wherever the recipe lies."""
    return str((recipe.parent / str(task)).resolve()) if _is_file(str(task)) else str(task)


def as_flag(name: str, value: Any) -> list[str]:
    """A flag of the command line: switches by true and false, lists as several values."""
    name = name.replace("_", "-")
    flag = f"--{name}"
    if isinstance(value, bool):
        return [flag] if value else [f"--no-{name}"] if name in ON_AND_OFF else []
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
    for name in STAGES:
        flags = raw.get(name) or {}
        if not isinstance(flags, dict):
            yield f"{name} is not a mapping of flags"
            continue
        for flag in flags:
            if str(flag).replace("_", "-") in OURS and (name, flag) != ("eval", "task"):
                yield f"{name}.{flag} is set by the run itself"
    yield from _wrong_flags(raw)
    tune = raw.get("tune")
    if "export" in raw and isinstance(tune, dict) and tune.get("baseline"):
        yield f"export has nothing to merge after tune.baseline {tune['baseline']}, which writes whole weights: leave it out"
    have = [name for name in STAGES if name in raw]
    for name in have:
        needs = NEEDS[name]
        if needs and needs not in have:
            yield f"{name} needs {needs}"
    if not have:
        yield "no stage is given"


def _wrong_flags(raw: Mapping[Any, Any]) -> Iterator[str]:
    search, evaluated, gate = raw.get("search"), raw.get("eval"), raw.get("gate", {"file": "gate.yaml"})
    if not (isinstance(gate, dict) and isinstance(gate.get("file"), str)):
        yield "gate.file is missing, a YAML file of bounds"
    if "eval" in raw and not raw.get("task") and not (isinstance(evaluated, dict) and evaluated.get("task")):
        yield "eval needs a task"
    if not isinstance(search, dict):
        return
    yield from _missing_for_search(str(search.get("method")), search, raw)
    for size in ("experts", "budget"):
        if isinstance(search.get(size), list) and len(search[size]) != 1:
            yield f"search.{size} lists several budgets, and a run cuts one"
    tune = raw.get("tune")
    priced = isinstance(tune, dict) and _is_positive(_of(tune, "latency-coef"))
    if priced and not (search.get("method") == "leap" and _is_positive(search.get("lambda"))):
        yield "tune.latency-coef needs search.method leap and search.lambda, whose calibration in the engine it uses"


def _missing_for_search(method: str, search: Mapping[str, Any], raw: Mapping[Any, Any]) -> Iterator[str]:
    """What the search would be refused for, but only once the profile is made."""
    profile = raw.get("profile")
    if (reads(method, "items") or reads(method, "train_items")) and not raw.get("task"):
        yield f"search.method {method} needs a task: give task in place of data"
    if method in CHANNEL_SUMS and not (isinstance(profile, dict) and profile.get("channels")):
        yield f"search.method {method} needs channel sums: give profile: {{channels: true}}"
