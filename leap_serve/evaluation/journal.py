"""Answers on record: each is appended to a JSON Lines file as it comes, so that nothing is asked twice after a kill."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, TypeVar

from leap_serve.encoding import Encoded
from leap_serve.engine import Completion, Model, Progress, Score
from leap_serve.errors import LeapError
from leap_serve.tasks.base import Item

Kind = Literal["completion", "score"]
Outcome = TypeVar("Outcome", Completion, Score)
SUFFIXES = (".safetensors", ".json", ".jinja", ".model")


class Journal:
    """A JSON Lines file of answers by key, one writer at a time; a line that a kill left unfinished is dropped.

    Raises LeapError where the file is damaged elsewhere, or another process writes it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._stream: IO[bytes] = path.open("a+b")
        except OSError as error:
            raise LeapError(path, f"cannot be written ({error.strerror})", "choose another place") from None
        try:
            fcntl.flock(self._stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.known = self._read()
        except BlockingIOError:
            self._stream.close()
            raise LeapError(path, "another process writes it", "wait for it, or choose another place") from None
        except BaseException:
            self._stream.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def add(self, key: str, row: Mapping[str, Any]) -> None:
        """Append one answer; it is in the file when this returns, whatever becomes of the process."""
        self._stream.write(json.dumps({"key": key, **row}).encode() + b"\n")
        self._stream.flush()
        self.known[key] = dict(row)

    def close(self) -> None:
        """Let go of the file."""
        self._stream.close()

    def done(self, keep: bool) -> None:
        """Let go of the file, and remove it unless it is to be kept beside the result."""
        self.close()
        if not keep:
            self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, dict[str, Any]]:
        self._stream.seek(0)
        content = self._stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            os.ftruncate(self._stream.fileno(), whole)
        known: dict[str, dict[str, Any]] = {}
        for number, line in enumerate(content[:whole].splitlines(), 1):
            try:
                row = json.loads(line)
                known[row.pop("key")] = row
            except (ValueError, KeyError, TypeError, AttributeError):
                where = f"{self.path}:{number}"
                raise LeapError(where, "is no answer on record", "remove the line, or choose another place") from None
        return known


class Recorded:
    """A model whose answers are kept: what the journal holds is not asked again. Opened when it is first needed.

    Args:
        opened: opens the model.
        journal: where answers are kept.
        identity: whatever decides an answer besides what is asked: the weights, the engine, its settings.
        label: written beside each answer, for people.
    """

    def __init__(
        self, opened: Callable[[], Model], journal: Journal, identity: Mapping[str, Any], label: str = ""
    ) -> None:
        self._open, self._journal, self.label = opened, journal, label
        self._identity = json.dumps(identity, sort_keys=True)
        self._model: Model | None = None

    def tokenize(self, texts: Sequence[str], *, prefix: bool = False) -> list[list[int]]:
        """Encode texts; not kept."""
        return self._opened().tokenize(texts, prefix=prefix)

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        progress: Progress | None = None,
        each: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt, those on record apart."""
        how = [max_tokens, list(stop), temperature, seed]
        keys = [self._key("completion", prompt, how) for prompt in prompts]

        def ask(places: Sequence[int], part: Progress | None, kept: Callable[[int, Completion], None]) -> object:
            chosen = [prompts[place] for place in places]
            return self._opened().generate(chosen, max_tokens, stop, temperature, seed, part, kept)

        return self._answered("completion", keys, ask, progress, each, _completion)

    def score(
        self,
        items: Sequence[Item],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each item's answer, those on record apart."""
        keys = [self._key("score", item.prompt, item.answer) for item in items]

        def ask(places: Sequence[int], part: Progress | None, kept: Callable[[int, Score], None]) -> object:
            return self._opened().score([items[place] for place in places], part, kept)

        return self._answered("score", keys, ask, progress, each, _score)

    def score_ids(
        self,
        sequences: Sequence[Encoded],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each answer's token ids, those on record apart."""
        keys = [self._key("score", one.prompt, one.answer) for one in sequences]

        def ask(places: Sequence[int], part: Progress | None, kept: Callable[[int, Score], None]) -> object:
            return self._opened().score_ids([sequences[place] for place in places], part, kept)

        return self._answered("score", keys, ask, progress, each, _score)

    def close(self) -> None:
        """Free the model, if it was opened; the journal stays open."""
        if self._model is not None:
            self._model.close()
            self._model = None

    def _opened(self) -> Model:
        if self._model is None:
            self._model = self._open()
        return self._model

    def _key(self, kind: Kind, *asked: object) -> str:
        """Identify a question: who is asked, how, and what."""
        return hashlib.sha256(json.dumps([self._identity, kind, *asked]).encode()).hexdigest()[:32]

    def _answered(
        self,
        kind: Kind,
        keys: Sequence[str],
        ask: Callable[[Sequence[int], Progress | None, Callable[[int, Outcome], None]], object],
        progress: Progress | None,
        each: Callable[[int, Outcome], None] | None,
        parse: Callable[[Mapping[str, Any]], Outcome],
    ) -> list[Outcome]:
        """Ask for what is not on record, and return all outcomes in order; equal questions are asked once."""
        first = {key: place for place, key in reversed(list(enumerate(keys)))}
        places = sorted(place for key, place in first.items() if key not in self._journal.known)
        before = len(keys) - len(places)
        if progress is not None:
            progress(before, len(keys))

        def kept(number: int, outcome: Outcome) -> None:
            row = {"kind": kind, "for": self.label, **_row(outcome)}
            self._journal.add(keys[places[number]], row)

        if places:
            ask(places, None if progress is None else lambda done, _: progress(before + done, len(keys)), kept)
        found = [parse(self._journal.known[key]) for key in keys]
        if each is not None:
            for place, outcome in enumerate(found):
                each(place, outcome)
        return found


def folder_identity(folder: Path) -> str:
    """Identify the files of a checkpoint by name, size and time of change: 32 hex digits, without reading weights."""
    facts = [
        (path.relative_to(folder).as_posix(), path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.suffix in SUFFIXES and path.is_file()
    ]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]


def _row(outcome: Completion | Score) -> dict[str, Any]:
    if isinstance(outcome, Score):
        return {"logprob": outcome.logprob, "tokens": outcome.tokens}
    return {"text": outcome.text, "token_ids": list(outcome.token_ids), "finish_reason": outcome.finish_reason}


def _completion(row: Mapping[str, Any]) -> Completion:
    return Completion(row["text"], tuple(row["token_ids"]), row["finish_reason"])


def _score(row: Mapping[str, Any]) -> Score:
    return Score(row["logprob"], row["tokens"])
