"""What counts as degenerate: planted loops are found, and real texts hold none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from leap_serve.grading.degeneration import degenerate, loop_of, repetition

PROSE = (
    "The line that data travels begins with a model and a task, and each stage writes what the next one reads; "
    "whoever looks at a result finds in it the command that made it, the versions, and the numbers themselves."
)


@pytest.mark.parametrize("unit", ["ha ", "the same thing ", "a", "12+34=46, ", "Ja. ", "你好", "\n  x = x + 1"])
def test_a_loop_at_the_end_is_found_and_named(unit: str) -> None:
    text = PROSE + unit * (80 // len(unit) + 5)
    found = loop_of(text)
    assert len(found.strip()) <= len(unit) and set(found) <= set(unit), "the shortest unit, wherever it is cut"
    assert "loops on" in degenerate(text)
    assert loop_of(text + " \n") == loop_of(text), "white space behind it does not hide it"
    assert loop_of(text[: len(PROSE) + 3 * len(unit)]) == "" or len(unit) == 1, "three copies are none"


def test_long_units_up_to_the_limit() -> None:
    unit = "".join(chr(97 + i % 26) + str(i) for i in range(70))
    assert loop_of(unit * 4) != "" and loop_of(unit * 3) == ""
    longer = unit + "x" * (257 - len(unit))
    assert loop_of(longer * 4) == ""


def test_layout_is_no_loop() -> None:
    for ruler in ("=" * 100, "- " * 60, "." * 90):
        assert degenerate(f"{PROSE}\n{ruler}") == ""
    assert degenerate("") == degenerate("no no no no") == degenerate(PROSE) == ""


def test_repetition_that_is_no_loop_at_the_end() -> None:
    text = " ".join(["one two three four five six seven"] * 9) + " and then it found another way out of it all at last"
    assert loop_of(text) == ""
    assert repetition(text) > 0.5 and "repeats" in degenerate(text)
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert degenerate("a b c d " * 3) == "", "too short to tell"


def test_hardly_a_real_text_is_flagged(shared_data: Path) -> None:
    def texts(name: str, field: str, count: int) -> list[str]:
        with gzip.open(shared_data / name, "rt", encoding="utf-8") as lines:
            return [json.loads(line)[field] for line, _ in zip(lines, range(count), strict=False)]

    def pieces(name: str) -> list[str]:
        with gzip.open(shared_data / name, "rt", encoding="utf-8") as stream:
            text = stream.read()
        return [text[start : start + 600] for start in range(0, 300_000, 1500)]

    real = {
        "C4": [text[:2000] for text in texts("c4_en_300.jsonl.gz", "text", 300)],
        "GSM8K": texts("gsm8k_test.jsonl.gz", "answer", 300),
        "HumanEval": texts("HumanEval.jsonl.gz", "canonical_solution", 164),
        "summaries": texts("scitldr_a_test.jsonl.gz", "summary", 300),
        "WikiText": pieces("wikitext2_test.txt.gz"),
        "Shakespeare": pieces("tinyshakespeare.txt.gz"),
    }
    for name, found in real.items():
        flagged = [(why, text[-120:]) for text in found if (why := degenerate(text))]
        assert len(flagged) <= len(found) / 100, f"{name}: {flagged}"
        looped = [text + f" {text[-30:]}" * 6 for text in found if len(text) > 40]
        assert all(map(degenerate, looped)), name
