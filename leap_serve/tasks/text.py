"""Running text and its windows: perplexity of a text file, of WikiText-2 or of C4."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leap_serve.encoding import Encoded
from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import Split
from leap_serve.tasks.rows import load_hub, read_lines, read_rows, text_of

WINDOW, STRIDE = 1024, 512
WIKITEXT, C4 = "Salesforce/wikitext", "allenai/c4"
C4_DOCUMENTS = 1100


@dataclass(frozen=True, slots=True)
class Text:
    """A text to measure perplexity on.

    Args:
        source: a file (plain text, or JSON Lines with "text"; also .gz), or one of the hub ids ``Salesforce/wikitext``
            (wikitext-2-raw-v1, documents joined by blank lines) and ``allenai/c4`` (of English, the first 1,100
            documents of the first validation shard, joined by spaces, as quantisation papers do).
        window: tokens that the model sees at a time; it must take one more.
        stride: tokens from one window's beginning to the next one's. Each token is scored once, by the first window
            that holds it; less than ``window``, and the tokens have context; equal, and windows do not overlap.
    """

    source: str = WIKITEXT
    window: int = WINDOW
    stride: int = STRIDE

    name = "perplexity"

    def __post_init__(self) -> None:
        if not 1 <= self.stride <= self.window or self.window < 2:
            what = f"are {self.window} and {self.stride}"
            raise UsageError("--window, --stride", what, "give a window of 2 or more and a stride up to it")
        if not self.on_hub and not Path(self.source).is_file():
            raise UsageError(
                "--data",
                f"{self.source} is no text file, and not {WIKITEXT} or {C4}",
                "give a file, or one of these ids",
            )

    @property
    def on_hub(self) -> bool:
        """Whether the text comes from the Hugging Face Hub; a file of that name goes first."""
        return self.source in (WIKITEXT, C4) and not Path(self.source).is_file()

    def read(self, split: Split) -> str:
        """Return the whole text; a file has no splits. Raises LeapError where it is empty or cannot be had."""
        found = "".join(self._pieces(split))
        if not found.strip():
            raise LeapError(self.source, "holds no text", "give a file with some")
        return found

    def windows(self, ids: Sequence[int]) -> list[Encoded]:
        """Divide token ids [T] into windows: of each, the context (prompt) and the tokens that it scores (answer).

        The first token of a window without context is not scored: nothing precedes it.
        """
        out: list[Encoded] = []
        done = 0
        for begin in itertools.count(0, self.stride):
            end = min(begin + self.window, len(ids))
            out.append(Encoded(list(ids[begin:done]), list(ids[done:end])))
            done = end
            if end == len(ids):
                return out
        raise AssertionError("a count does not end")

    def _pieces(self, split: Split) -> Iterator[str]:
        remedy = "give a text file with --data"
        if not self.on_hub:
            path = Path(self.source)
            if ".jsonl" in path.suffixes:
                return _joined((text_of(row, "text", where) for where, row in read_rows(path)), "\n\n")
            return read_lines(path, "text")
        if self.source == WIKITEXT:
            rows = load_hub(self.name, remedy, WIKITEXT, "wikitext-2-raw-v1", split=split)
            return _joined((row["text"] for row in rows), "\n\n")
        files = {"validation": "en/c4-validation.00000-of-00008.json.gz"}
        rows = load_hub(self.name, remedy, C4, data_files=files, split="validation")
        return _joined((row["text"] for row in itertools.islice(rows, C4_DOCUMENTS)), " ")


def _joined(pieces: Iterator[str], between: str) -> Iterator[str]:
    for number, piece in enumerate(pieces):
        yield between + piece if number else piece
