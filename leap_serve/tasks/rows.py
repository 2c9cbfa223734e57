"""Rows of published data sets: from the Hugging Face Hub by their id, or from the user's own files."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import SPLITS, Item, Split, fingerprint

HELD_OUT = 0.05
"""Part of the train split that becomes the validation split where the paper says so (LEAP appendix D)."""
REACH_S = 10
"""Seconds to wait for the hub's first answer."""
Row = Mapping[str, Any]
Make = Callable[[Row, str], Item]
"""Turns a row into an item; the text names the row in errors."""
Data = Path | Mapping[Split, Path]
"""A file, a folder of files named after task and split, or a file for each split."""


class MissingSplitError(LeapError):
    """Files that hold no row of a split; those of another may be there."""


@dataclass(frozen=True, slots=True)
class Source:
    """A published data set.

    Args:
        task: name of the task, and of its files: ``{task}.jsonl`` or ``{task}_{split}.jsonl``, plain or .gz.
        hub: id on the Hugging Face Hub, with its config and revision.
        splits: the official splits that we use. Without an official "validation", 5 % of train are held out.
        only: the split of files that do not say which one they hold; None refuses them.
        alias: another beginning of its files' names.
    """

    task: str
    hub: str
    config: str | None
    revision: str | None = None
    splits: tuple[Split, ...] = ("train", "test")
    only: Split | None = None
    alias: str | None = None

    def items(self, split: Split, make: Make, data: Data | None, limit: int | None, seed: int) -> list[Item]:
        """Return a split's items: test in its official order, train and validation shuffled by the seed.

        Train and validation hold no copy of a test item, which some published data sets do.
        """
        if split == "test" or split not in (*self.splits, "validation"):
            return self._official(split, make, data)[:limit]
        if split in self.splits and "validation" in self.splits:
            found = self._official(split, make, data)
        else:
            found = held_out(self._official("train", make, data))[split == "validation"]
        # A file of train rows alone cannot be compared; the pool is checked again where it is used.
        tests = set() if "test" not in self.splits or (data is not None and not self._holds("test", data)) else {
            fingerprint(item) for item in self._official("test", make, data)
        }  # fmt: skip
        found = [item for item in found if fingerprint(item) not in tests]
        random.Random(f"{self.task}/{split}/{seed}").shuffle(found)
        return found[:limit]

    def rows(self, split: Split, data: Data | None = None) -> Iterator[tuple[str, Row]]:
        """Yield a split's rows in their order, each with what names it in errors. Raises LeapError."""
        if split not in self.splits:
            has = " and ".join(self.splits)
            raise UsageError("--task", f"{self.task} has no {split} split, only {has}", f"use its {has} split")
        return self._from_hub(split) if data is None else self._from_files(split, data)

    def _official(self, split: Split, make: Make, data: Data | None) -> list[Item]:
        return [make(row, where) for where, row in self.rows(split, data)]

    def _from_hub(self, split: Split) -> Iterator[tuple[str, Row]]:
        remedy = f"give its rows with --data, as {self.task}_{split}.jsonl or the folder of it"
        loaded = load_hub(self.task, remedy, self.hub, self.config, split=split, revision=self.revision)
        return ((f"{self.hub} {split} row {number}", row) for number, row in enumerate(loaded, 1))

    def _from_files(self, split: Split, data: Data) -> Iterator[tuple[str, Row]]:
        found = False
        for where, row in self._rows_of(split, data):
            found = True
            yield where, row
        if not found:
            # A file that was named for the split is a mistake where it is empty; a file or folder may just be without it.
            file, error = (data[split], LeapError) if isinstance(data, Mapping) else (data, MissingSplitError)
            raise error(
                file, f"holds no {split} rows of {self.task}",
                f'name the file {self.task}_{split}.jsonl, or give its rows the field "split"',
            )  # fmt: skip

    def _holds(self, split: Split, data: Data) -> bool:
        return split in self.splits and next(self._rows_of(split, data), None) is not None

    def _rows_of(self, split: Split, data: Data) -> Iterator[tuple[str, Row]]:
        if isinstance(data, Mapping):
            # A file that a split was given for holds that split, whatever its name or its rows say.
            yield from read_rows(data[split])
            return
        for path in self._files(data):
            for where, row in read_rows(path):
                if (row.get("split") or self._split_of_file(path)) == split:
                    yield where, row

    def _files(self, data: Path) -> list[Path]:
        if not data.is_dir():
            return [data]
        stems = {f"{name}{end}" for name in (self.task, self.alias) for end in ("", *(f"_{s}" for s in SPLITS))}
        names = {f"{stem}{suffix}" for stem in stems for suffix in (".jsonl", ".jsonl.gz")}
        return sorted(path for path in data.iterdir() if path.name.lower() in names)

    def _split_of_file(self, path: Path) -> str | None:
        last = path.name.lower().split(".")[0].rpartition("_")[2]
        return last if last in SPLITS else self.only


def load_hub(task: str, remedy: str, *args: Any, **kwargs: Any) -> Any:
    """Call datasets.load_dataset; a set that cannot be had is a LeapError that names the hub and the ``remedy``.

    Where the hub cannot be reached, a copy in datasets' cache serves, and nothing is asked again and again.
    """
    try:
        import datasets
    except ImportError:
        raise LeapError(task, "needs the package datasets", "pip install 'leap-serve[eval]'") from None
    unreachable = _unreachable()
    try:
        with _offline() if unreachable else nullcontext():
            return datasets.load_dataset(*args, **kwargs)
    except Exception as error:  # whatever datasets, the hub's client and three formats raise
        reason = unreachable or f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0][:160]}"
        raise LeapError(
            f"--task {task}",
            f"{args[0]} cannot be had from the Hugging Face Hub ({reason})",
            f"check the network, or {remedy}",
        ) from None


def _unreachable() -> str:
    """Why the hub cannot be reached, or nothing: asked once, since its client tries six times in half a minute."""
    from huggingface_hub import constants, get_session

    try:
        get_session().head(constants.ENDPOINT, timeout=REACH_S)
    except Exception as error:  # its client is requests, httpx or httpx2, by its release
        return " ".join(str(error).split())[:160] or type(error).__name__
    return ""


@contextmanager
def _offline() -> Iterator[None]:
    """As with HF_HUB_OFFLINE=1, which both packages read only when they are imported."""
    import datasets
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE = before


def held_out(items: Sequence[Item], share: float = HELD_OUT) -> tuple[list[Item], list[Item]]:
    """Divide items into train and validation: the ``share`` with the lowest fingerprints, whatever their order."""
    keys = [fingerprint(item) for item in items]
    bound = sorted(keys)[: max(1, round(share * len(keys)))][-1:]
    parts: tuple[list[Item], list[Item]] = [], []
    for item, key in zip(items, keys, strict=True):
        parts[[key] <= bound].append(item)
    return parts


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yield the objects of a JSON Lines file, plain or gzipped, each with "file:line"; errors name the line."""
    for number, line in enumerate(read_lines(path, "JSON Lines"), 1):
        if line.strip():
            yield f"{path}:{number}", _parsed(line, f"{path}:{number}")


def read_lines(path: Path, what: str) -> Iterator[str]:
    """Yield the lines of a text file, plain or gzipped; ``what`` it should hold stands in the error."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as lines:
            yield from lines
    except FileNotFoundError:
        raise UsageError(path, "the file does not exist", "check --data") from None
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise LeapError(path, f"cannot be read ({error})", f"give {what} in UTF-8, plain or .gz") from None


def text_of(row: Row, field: str, where: str) -> str:
    """Return a field that must be a non-empty string."""
    value = row.get(field)
    if not isinstance(value, str) or not value:
        raise LeapError(where, f'"{field}" is not a non-empty string', "give the data set's own rows")
    return value


def _parsed(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise LeapError(where, f"not valid JSON ({error})", "give one JSON object per line") from None
    if not isinstance(row, dict):
        raise LeapError(where, "not a JSON object", "give one JSON object per line")
    return row
