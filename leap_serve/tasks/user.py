"""A task of one's own: a short YAML file with a prompt template, an answer field, a metric and the splits' files.

    prompt: "Ticket: {ticket}\\nTeam:"
    answer: team                   # a field; a list of strings holds several right answers
    metric: exact match
    splits: {train: train.jsonl, test: test.jsonl}      # or hub: {id: org/name, config: main, splits: [train, test]}
    stop: ["\\n"]
    max_tokens: 16

A template is text with {fields}, nothing else: no code is in such a file, and none is run.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_serve.errors import LeapError, UsageError
from leap_serve.files import read_yaml
from leap_serve.grading.metrics import METRICS
from leap_serve.tasks.base import SPLITS, Item, Split
from leap_serve.tasks.rows import Data, Row, Source

KEYS = ("name", "prompt", "answer", "metric", "splits", "hub", "separator", "stop", "max_tokens")
HUB_KEYS = ("id", "config", "revision", "splits")
SUFFIXES = (".yaml", ".yml")
_FIELD = re.compile(r"\{\{|\}\}|\{([A-Za-z_]\w*)\}|[{}]")


@dataclass(frozen=True, slots=True)
class UserTask:
    """A task as its YAML file defines it.

    Args:
        prompt: template; ``{field}`` stands for a field of the row, ``{{`` and ``}}`` for braces.
        answer: field of the right answer, or of a list of them; the first one is what loss and tuning take.
        metric: one of leap_serve.grading.metrics.METRICS.
        separator: stands between prompt and answer.
        data: files by split; None where the rows come from the hub.
    """

    name: str
    metric: str
    stop: tuple[str, ...]
    max_tokens: int
    prompt: str
    answer: str
    separator: str
    source: Source
    data: Data | None

    @classmethod
    def load(cls, path: Path, data: Path | None = None) -> UserTask:
        """Read and check a task file; ``data`` replaces its splits. Raises LeapError that lists all that is wrong."""
        try:
            raw = read_yaml(path)
        except FileNotFoundError:
            raise UsageError("--task", f"{path} does not exist", "check the path") from None
        if not isinstance(raw, dict):
            raise LeapError(path, "is not a mapping", "give prompt, answer, metric and splits")
        problems = list(_problems(raw))
        if problems:
            raise LeapError(path, "; ".join(problems), f"known keys are {', '.join(KEYS)}")
        name, hub = str(raw.get("name", path.stem)), raw.get("hub") or {}
        files: Mapping[Split, Path] = {split: path.parent / file for split, file in raw.get("splits", {}).items()}
        splits = SPLITS if data is not None else tuple(split for split in SPLITS if split in (files or hub["splits"]))
        return cls(
            name, raw["metric"], tuple(raw.get("stop", ["\n"])), raw.get("max_tokens", 64), raw["prompt"],
            raw["answer"], raw.get("separator", " "),
            Source(name, hub.get("id", ""), hub.get("config"), hub.get("revision"), splits), data or files or None,
        )  # fmt: skip

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the items of a split; of a task without validation rows, 5 % of train are held out for it."""
        return self.source.items(split, self._item, self.data, limit, seed)

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """Compare each completion with the right answers by the task's metric."""
        metric = METRICS[self.metric]
        return [
            metric(json.loads(item.reference["answers"]), text) for item, text in zip(items, completions, strict=True)
        ]

    def _item(self, row: Row, where: str) -> Item:
        found = row.get(self.answer)
        answers = found if isinstance(found, list) else [found]
        golds = [str(answer) for answer in answers if isinstance(answer, (str, int, float)) and str(answer).strip()]
        if not golds or len(golds) < len(answers):
            raise LeapError(where, f"{self.answer!r} holds no answer: {found!r}", "give a text, a number or a list")
        prompt = filled(self.prompt, row, where)
        name = f"{self.name}/{row.get('id', prompt)}"
        return Item(name, prompt, f"{self.separator}{golds[0]}", {"answers": json.dumps(golds)})


def filled(template: str, row: Row, where: str) -> str:
    """Put a row's fields into a template. Raises LeapError for a field that the row has not, or that is no text."""

    def value(match: re.Match[str]) -> str:
        if match[1] is None:
            return match[0][0]
        found = row.get(match[1])
        if not isinstance(found, (str, int, float)):
            raise LeapError(where, f"{match[1]!r} is {found!r}", f"give texts or numbers; it has {', '.join(row)}")
        return str(found)

    return _FIELD.sub(value, template)


def _problems(raw: Mapping[Any, Any]) -> Iterator[str]:
    yield from (f"unknown key {key!r}" for key in raw if key not in KEYS)
    for key in ("prompt", "answer"):
        if not isinstance(raw.get(key), str) or not raw[key]:
            yield f"{key} is {raw.get(key)!r}, not a text"
    template = raw.get("prompt")
    if isinstance(template, str):
        found = list(_FIELD.finditer(template))
        if any(match[0] in ("{", "}") for match in found):
            yield "prompt has a brace that is no {field}; write {{ or }}"
        elif not any(match[1] for match in found):
            yield "prompt names no {field}"
    if raw.get("metric") not in METRICS:
        yield f"metric is {raw.get('metric')!r}, not one of {', '.join(METRICS)}"
    if not isinstance(raw.get("name", "task"), str) or not isinstance(raw.get("separator", " "), str):
        yield "name or separator is not a text"
    stop = raw.get("stop", [])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        yield "stop is not a list of texts"
    if type(raw.get("max_tokens", 1)) is not int or raw.get("max_tokens", 1) < 1:
        yield f"max_tokens is {raw.get('max_tokens')!r}, not a count"
    yield from _source_problems(raw)


def _source_problems(raw: Mapping[Any, Any]) -> Iterator[str]:
    splits, hub = raw.get("splits"), raw.get("hub")
    if (splits is None) == (hub is None):
        yield "give either splits (files) or hub"
    elif splits is not None:
        if not isinstance(splits, dict) or not splits:
            yield f"splits does not map {', '.join(SPLITS)} to files"
        else:
            yield from (f"splits.{split} is none of {', '.join(SPLITS)}" for split in splits if split not in SPLITS)
            yield from (f"splits.{s} is {f!r}, not a file" for s, f in splits.items() if not isinstance(f, str))
    elif not isinstance(hub, dict) or not isinstance(hub.get("id"), str):
        yield "hub has no id"
    else:
        yield from (f"unknown key hub.{key}" for key in hub if key not in HUB_KEYS)
        named = hub.get("splits")
        if not isinstance(named, list) or not named or not set(named) <= set(SPLITS):
            yield f"hub.splits is {named!r}, not a list of {', '.join(SPLITS)}"
