"""ESP in the worker: which rows of a step are whose answer tokens, and how many of them go together."""

from __future__ import annotations

import pytest

from leap_vllm.compat import check_signatures
from leap_vllm.compat_prompts import V1_PROBES, V2_PROBES, Prefilled
from leap_vllm.esp import REQUEST_KEY, Wanted, packed, wanted_of

PROMPT = list(range(100, 110))
"""Ten tokens, of which the answer begins at position 6: rows 5 to 8 predict it."""


@pytest.mark.parametrize(
    ("start", "tokens", "row", "at", "rows", "targets"),
    [
        (0, 10, 0, 0, range(5, 9), [106, 107, 108, 109]),
        (0, 10, 40, 0, range(45, 49), [106, 107, 108, 109]),
        (4, 3, 7, 0, range(8, 10), [106, 107]),  # a chunk that reaches into the answer
        (7, 3, 2, 2, range(2, 4), [108, 109]),  # and the next one
        (5, 1, 0, 0, range(0, 1), [106]),
    ],
)
def test_rows_that_predict_the_answer(
    start: int, tokens: int, row: int, at: int, rows: range, targets: list[int]
) -> None:
    found = wanted_of(Prefilled(PROMPT, {REQUEST_KEY: (3, 1, 6, True)}, start, tokens, row))
    assert found == Wanted(3, 1, True, at, rows, targets, answer=4)


@pytest.mark.parametrize(
    ("extra", "start", "tokens"),
    [
        ({}, 0, 10),
        ({REQUEST_KEY: (0, 0, 6, False)}, 0, 5),  # the prompt only
        ({REQUEST_KEY: (0, 0, 6, False)}, 9, 1),  # the last token predicts what comes after the answer
        ({REQUEST_KEY: (0, 0, 6, False)}, 10, 1),  # decoding
        ({REQUEST_KEY: (0, 0, 10, False)}, 0, 10),  # an empty answer
    ],
)
def test_steps_without_an_answer(extra: dict[str, object], start: int, tokens: int) -> None:
    assert wanted_of(Prefilled(PROMPT, extra, start, tokens, 0)) is None


def test_groups_hold_what_fits() -> None:
    wanted = [Wanted(tag, 0, False, 0, range(size), [0] * size, size) for tag, size in enumerate((2, 2, 3, 9, 1, 1))]
    groups = [[one.tag for one in group] for group in packed(wanted, 5)]
    assert groups == [[0, 1], [2], [3], [4, 5]]
    assert list(packed([], 5)) == []


@pytest.mark.e2e
def test_vllm_has_what_both_hooks_rely_on() -> None:
    check_signatures(V1_PROBES)
    check_signatures(V2_PROBES)
