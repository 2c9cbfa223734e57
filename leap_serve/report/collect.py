"""Reads what runs left on disk into one Report; what a file is, its content says."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import MANIFEST, Checkpoint, resolve_model
from leap_serve.errors import CheckpointError, LeapError
from leap_serve.flops import flops_per_token
from leap_serve.plan import Plan
from leap_serve.profile import Profile
from leap_serve.report import read
from leap_serve.report.maps import Cut, Maps
from leap_serve.report.model import Interval, Learning, Model, Origin, Report

LARGEST_BYTES = 64 << 20
"""JSON files above this are nothing that we wrote."""
DEEPEST = 6
BUNDLED = "leap-tiny"
GENERIC = ("checkpoint", "cut", "ckpt")
"""Folder names that say nothing: the run's own name stands for them."""
TUNED = ("tuned", "plain")
"""Folders of a run's tuned cut, as it is and exported: one model, beside the cut that it came from."""


def collect(runs: Sequence[Path]) -> Report:
    """Read folders and files of `leap run`, demo, search, cut, tune, eval, bench and bench/tables.py.

    Raises CheckpointError where a part is damaged, LeapError where one of ``runs`` holds nothing that a report shows.
    """
    names = [run.stem if run.is_file() else run.resolve().name for run in runs]
    collector = _Collector(several=len(runs) > 1)
    for run, name in zip(runs, names, strict=True):
        collector.add(run, name if names.count(name) == 1 else f"{run.resolve().parent.name}/{name}")
    return collector.finish()


class _Collector:
    """The state of one collection: what is known so far, and the folder that is being read."""

    def __init__(self, several: bool) -> None:
        self.report, self.maps, self.several = Report(), Maps(), several
        self.run = Path()
        self.label = ""
        self.task = ""
        self.found = 0
        self.states: list[tuple[str, str, Path, dict[str, Any]]] = []
        self.tunings: list[dict[str, Any]] = []

    def add(self, run: Path, label: str) -> None:
        """Read one folder or file."""
        if not run.exists():
            raise CheckpointError(run, "no such file or folder", "check the path")
        self.run, self.label, self.task, self.found = run, label, "", 0
        for path in [run] if run.is_file() else _interesting(run):
            self._read(path)
        if not self.found:
            raise LeapError(
                run, "holds nothing that a report shows",
                "give a folder that leap run, demo, search, cut, tune or bench wrote, or the JSON of leap eval",
            )  # fmt: skip
        self.report.runs.append(self.label)

    def finish(self) -> Report:
        """Join what only makes sense together."""
        for label, task, folder, header in self.states:
            found = read.search_state(folder, header, task or label, self.maps.plans())
            if found is not None:
                self._learning(found)
        self.report.maps = self.maps.build()
        methods = self.maps.methods()
        for model in self.report.models.values():
            model.kind = methods.get(model.fingerprint or "", model.kind)
        # As they were run; what has no time keeps its place.
        self.report.origins.sort(key=lambda origin: origin.time)
        return self.report

    def _read(self, path: Path) -> None:
        if path.is_dir():
            self._folder(path)
        elif path.suffix == ".jsonl":
            for row in read.rows(path):
                self._row(row, path)
        else:
            value = read.json_of(path)
            for keys, take in self._kinds():
                if isinstance(value, dict) and keys <= value.keys():
                    self._guarded(take, value, path)
                    return

    def _kinds(self) -> Iterator[tuple[set[str], Callable[[dict[str, Any], Path], None]]]:
        """What each kind of file holds, and who reads it; the first that fits."""
        yield {"retained", "fingerprint", "base_model"}, self._plan
        yield {"stages", "made_by"}, self._run_record
        yield {"models", "items_per_task"}, self._demo
        yield {"curve", "labels", "config"}, self._tune
        yield {"tensors", "progress", "settings"}, self._state
        yield {"passed", "checks"}, self._gate
        yield {"model", "tasks"}, self._eval
        yield {"bench", "rows"}, self._bench
        yield {"tables"}, self._tables
        yield {"plans", "method"}, self._origin

    def _guarded(self, take: Callable[[dict[str, Any], Path], None], value: dict[str, Any], path: Path) -> None:
        try:
            take(value, path)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(path, f"is incomplete or ill-formed ({error!r})", "make it again") from None
        self.found += 1

    def _folder(self, path: Path) -> None:
        """A profile, or a checkpoint with what lies beside it."""
        self.found += 1
        if (path / "profile.json").exists():
            profile = Profile.load(path)
            self.maps.add_profile(profile)
            self._origin({"made_by": profile.made_by}, path)
            return
        checkpoint = Checkpoint.open(path)
        assert checkpoint.plan is not None
        model = self._model(self._name(path), checkpoint.plan.fingerprint)
        _measure(model, checkpoint)
        tuned = bool(checkpoint.overlays or checkpoint.exported or checkpoint.trained)
        self.maps.add_plan(checkpoint.plan, model.name, Cut(path.name, checkpoint.identity().sha256, tuned))
        self._origin({"made_by": {**checkpoint.plan.made_by, **(checkpoint.manifest or {}).get("made_by", {})}}, path)
        if (path / "tune.json").exists():
            self._read(path / "tune.json")

    def _plan(self, value: dict[str, Any], path: Path) -> None:
        plan = Plan.from_json(value, path)
        self.maps.add_plan(plan, self._name(path))
        found = read.search_curve(plan)
        if found is not None:
            self._learning(found)
        self._origin(value, path)

    def _run_record(self, value: dict[str, Any], path: Path) -> None:
        self._origin({"made_by": {**value["made_by"], "argv": ["leap", "run", value.get("recipe", "")]}}, path)
        for name, stage in value["stages"].items():
            argv = [str(word) for word in stage["argv"]]
            self.task = argv[argv.index("--task") + 1] if "--task" in argv else self.task
            made = {**value["made_by"], "argv": ["leap", *argv]}
            self._origin({"made_by": made}, path.parent / name)
            result = stage.get("result")
            for keys, take in self._kinds():
                if isinstance(result, dict) and keys <= result.keys() and take in (self._eval, self._bench, self._gate):
                    take({**result, "made_by": None}, path)
                    break

    def _demo(self, value: dict[str, Any], path: Path) -> None:
        items = int(value["items_per_task"])
        for name, found in value["models"].items():
            full = name == "full"
            model = self._model(f"{value['model']} (full)" if full else self._prefixed(name), None)
            model.kind = "full" if full else "leap" if name.startswith("leap") else "other"
            metrics = found.get("metrics") or {}
            for task, score in found["scores"].items():
                model.scores[task] = read.score(
                    {"metric": metrics.get(task, ""), "score": score, "loss": found["losses"][task], "items": items},
                    task,
                )
            model.tpot_ms |= {int(batch): Interval(float(ms)) for batch, ms in found["tpot_ms"].items()}
            if found["tpot_ms"]:
                model.tok_s[max(map(int, found["tpot_ms"]))] = Interval(float(found["tok_s"]))
            model.weights_bytes, model.counts = float(found["weights_bytes"]), tuple(map(int, found["retained"]))
            model.flops_per_token = read.number(found.get("flops_per_token")) or model.flops_per_token
        self._setting(value)
        self._origin(value, path)

    def _tune(self, value: dict[str, Any], path: Path) -> None:
        if value in self.tunings:
            return  # an export carries its origin's
        self.tunings.append(value)
        plan = self.maps.plan(str(value.get("fingerprint")))
        self._learning(read.tuning(value, self._name(path.parent), plan))
        self._setting(value)
        self._origin(value, path)

    def _state(self, value: dict[str, Any], path: Path) -> None:
        self.states.append((path.parent.relative_to(self.run.parent).as_posix(), self.task, path.parent, value))

    def _gate(self, value: dict[str, Any], path: Path) -> None:
        name = self._given(str(value["model"]))[0] if "model" in value else self.label
        found = read.gate(value, name)
        self.report.gates += [found] if found not in self.report.gates else []  # leap run records it, too
        self._setting(value)
        self._origin(value, path)

    def _eval(self, value: dict[str, Any], path: Path) -> None:
        other = value.get("vs") or {}
        differences = value.get("differences") or {}
        self._scored(str(value["model"]), value["tasks"], differences)
        if other:
            self._scored(str(other["model"]), other["tasks"], {})
        self._setting(value)
        self._origin(value, path)

    def _scored(self, given: str, found: dict[str, Any], differences: dict[str, Any]) -> None:
        name, full = self._given(given)
        model = self._model(name, None)
        if full:
            model.kind = "full"
            # The bundled model is at hand; others are looked for on disk, never on a hub.
            folder = resolve_model(BUNDLED) if given == BUNDLED else Path(given)
            if (folder / "config.json").exists():
                _measure(model, Checkpoint.open(folder))
        for task, one in found.items():
            model.scores[task] = read.score(one, task, differences.get(task))

    def _given(self, given: str) -> tuple[str, bool]:
        """What a model is called that a command line named, and whether it is a full one."""
        path = Path(given)
        bases = {plan.base.id for plan in self.maps.plans()} | {BUNDLED}
        if given in bases or path.name in bases or ((path / "config.json").exists() and not (path / MANIFEST).exists()):
            return f"{path.name if path.name in bases or path.exists() else given} (full)", True
        return self._name(path), False

    def _bench(self, value: dict[str, Any], path: Path) -> None:
        for row in value["rows"]:
            self._row(row, path)

    def _tables(self, value: dict[str, Any], path: Path) -> None:
        self.report.tables += [read.table(one) for one in value["tables"]]
        self._origin(value, path)

    def _row(self, row: dict[str, Any], path: Path) -> None:
        """A row of bench/results, or of leap bench."""
        try:
            if row.get("bench") == "search-methods":
                self._learning(read.search_row(row))
            elif row.get("bench") == "tune" and row.get("curve"):
                self._learning(read.tuning_row(row))
            elif row.get("bench") in ("latency", "throughput", "serve", "memory", "batch"):
                for side in row["contenders"]:
                    self._contender(side, row)
            else:
                return
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise CheckpointError(path, f"holds an ill-formed row ({error!r})", "make it again") from None
        self.found += 1
        self._setting(row)
        made = {"argv": shlex.split(str(row.get("command", ""))), "time": row.get("time", "")}
        self._origin({"made_by": {**made, "version": (row.get("versions") or {}).get("leap-serve", "")}}, path)

    def _contender(self, side: dict[str, Any], row: dict[str, Any]) -> None:
        label, fingerprint = str(side["label"]), side.get("fingerprint")
        full = fingerprint is None
        name = f"{label} (full)" if full else self._name(Path(label))
        model = self._model(name, fingerprint)
        model.kind = "full" if full else model.kind
        model.weights_bytes = read.number(side.get("weights_bytes_on_disk")) or model.weights_bytes
        model.flops_per_token = read.number(side.get("flops_per_token")) or model.flops_per_token
        model.counts = tuple(map(int, side.get("retained", ()))) or model.counts
        model.group = row["bench"] if row["bench"] == "batch" else model.group
        batch = int(row["workload"]["batch"])
        for metric, into in (("tpot_ms", model.tpot_ms), ("output_tok_s", model.tok_s)):
            if metric in side["metrics"]:
                found = side["metrics"][metric]
                into[batch] = Interval(float(found["median"]), float(found["p10"]), float(found["p90"]))

    def _model(self, name: str, fingerprint: str | None) -> Model:
        model = self.report.models.setdefault(name, Model(name))
        model.fingerprint = fingerprint or model.fingerprint
        return model

    def _name(self, path: Path) -> str:
        """What a path is called: below the run's folder, without suffix; generic names give way to the run's own."""
        try:
            parts = path.resolve().relative_to(self.run.resolve()).parts
        except ValueError:
            parts = (path.name,)
        parts = tuple(part for part in (*parts[:-1], Path(parts[-1]).stem if parts else "") if part)
        if parts and parts[-1] not in (*GENERIC, *TUNED, "plan"):
            return self._prefixed("/".join(parts))
        own = self._prefixed("/".join(parts[:-1])) if parts[:-1] else self.label
        return f"{own}, tuned" if parts and parts[-1] in TUNED else own

    def _prefixed(self, name: str) -> str:
        return f"{self.label}/{name}" if self.several else name

    def _learning(self, learning: Learning) -> None:
        own = self.report.learning.setdefault(f"{learning.agent} {learning.title}", learning)
        if own is not learning:
            for lines, more in (
                (own.curves, learning.curves), (own.exact, learning.exact), (own.held_out, learning.held_out),
                (own.scores, learning.scores),
            ):  # fmt: skip
                lines += [curve for curve in more if curve not in lines]
            own.notes += [note for note in learning.notes if note not in own.notes]

    def _setting(self, value: Mapping[str, Any]) -> None:
        """Remember the versions and the hardware of what is measured; the last word counts."""
        self.report.versions |= {str(k): str(v) for k, v in (value.get("versions") or {}).items()}
        self.report.hardware |= {str(k): str(v) for k, v in (value.get("hardware") or {}).items() if v}

    def _origin(self, value: Mapping[str, Any], path: Path) -> None:
        """Remember a command; the same one is listed once."""
        made = value.get("made_by") or {}
        words = [str(word) for word in made.get("argv") or () if word != "--json"]
        if words and words[0].endswith(".py") and not words[0].startswith("_"):
            words[:1] = ["python", f"bench/{words[0]}"]
        command = shlex.join(words)
        if not command or any(one.command == command for one in self.report.origins):
            return
        try:
            place = path.resolve().relative_to(self.run.resolve().parent).as_posix()
        except ValueError:
            place = path.name
        self.report.origins.append(Origin(place, command, str(made.get("time", "")), str(made.get("version", ""))))


def _measure(model: Model, checkpoint: Checkpoint) -> None:
    """Note what a checkpoint's headers say."""
    plan = checkpoint.plan
    model.weights_bytes, model.flops_per_token = checkpoint.weight_bytes, flops_per_token(checkpoint)
    model.counts = tuple(plan.counts if plan else [checkpoint.num_experts] * len(checkpoint.moe_layers))


def _interesting(run: Path) -> Iterator[Path]:
    """Files and folders below a run that may be shown; neither hidden ones nor what lies inside a checkpoint."""
    for folder, below, files in os.walk(run):
        here = Path(folder)
        below[:] = sorted(name for name in below if not name.startswith("."))
        if len(here.relative_to(run).parts) >= DEEPEST:
            below.clear()
        if "profile.json" in files:
            yield here
            below.clear()
        elif "config.json" in files:
            below.clear()
            if MANIFEST in files:
                yield here
        else:
            # run.json first: it says what the rest is of.
            wanted = [name for name in files if name.endswith((".json", ".jsonl")) and not name.startswith(".")]
            for name in sorted(wanted, key=lambda name: (name != "run.json", name)):
                if (here / name).stat().st_size <= LARGEST_BYTES:
                    yield here / name
