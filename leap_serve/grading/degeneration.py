"""Degenerate text: what pruned models fall into off their domain, defined so that anyone can count it."""

from __future__ import annotations

LONGEST_UNIT = 256
COPIES = 4
LOOP_CHARACTERS = 64
N_GRAM = 4
LEAST_WORDS = 32
REPEATED = 0.5


def loop_of(text: str) -> str:
    """Return the unit that a text ends in repeating, or "" where it ends in no loop.

    The end (trailing white space apart) is a loop when its last 64 characters or more are at least four copies of a
    unit of at most 256 characters, the first of them possibly cut off at its start; the shortest such unit counts.
    A unit of punctuation and white space alone is none: rulers of ``=`` and dotted lines are layout.
    """
    text = text.rstrip()
    for size in range(1, min(LONGEST_UNIT, len(text) // COPIES) + 1):
        run = size
        while run < len(text) and text[-run - 1] == text[-run - 1 + size]:
            run += 1
            if run >= max(COPIES * size, LOOP_CHARACTERS):
                unit = text[-size:]
                if any(map(str.isalnum, unit)):
                    return unit
                break
    return ""


def repetition(text: str) -> float:
    """Return the share of word 4-grams that occurred before in the text (seq-rep-4, Welleck et al. 2020), in [0, 1].

    Words are what stands between white space and holds a letter or digit.
    """
    words = _words(text)
    grams = list(zip(*(words[offset:] for offset in range(N_GRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def degenerate(text: str) -> str:
    """Say why a text is degenerate, or return "": it ends in a loop, or repeats over half of its 4-grams.

    The second counts from 32 words on; shorter texts have too few 4-grams to tell.
    """
    unit = loop_of(text)
    if unit:
        return f"loops on {unit[:60]!r}"
    share = repetition(text)
    if len(_words(text)) >= LEAST_WORDS and share > REPEATED:
        return f"repeats {100 * share:.0f} % of its 4-grams"
    return ""


def _words(text: str) -> list[str]:
    return [word for word in text.split() if any(map(str.isalnum, word))]
