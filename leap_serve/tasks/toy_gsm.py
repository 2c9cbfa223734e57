"""toy-gsm: arithmetic word problems in GSM8K's format, scored by GSM8K's own rule."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from leap_serve.tasks.base import Item, Split, take
from leap_serve.tasks.gsm8k import both_matches, exact_match

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Karen", "Leo",
    "Maria", "Noah", "Olga", "Paul", "Rosa", "Sam", "Tina", "Victor", "Wendy", "Zoe",
)  # fmt: skip
THINGS = (
    "apples", "books", "cards", "coins", "eggs", "flowers", "marbles", "pencils", "shells", "stamps",
    "stickers", "tickets", "cookies", "balls", "stones", "pears",
)  # fmt: skip
BOXES = ("boxes", "bags", "baskets", "jars", "trays", "crates")


def _problem(rng: random.Random) -> tuple[str, list[tuple[int, str, int]]]:
    """Draw a question and its steps (left operand, operator, right operand)."""
    who, other = rng.sample(NAMES, 2)
    what, box = rng.choice(THINGS), rng.choice(BOXES)
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    small, big = sorted((a, b))
    m, n = rng.randint(2, 9), rng.randint(2, 9)
    kind = rng.randrange(10)
    if kind == 0:
        return f"{who} has {a} {what} and buys {b} more. How many {what} does {who} have now?", [(a, "+", b)]
    if kind == 1:
        return f"{who} had {big} {what} and gave {small} to {other}. How many {what} are left?", [(big, "-", small)]
    if kind == 2:
        return f"There are {m} {box} with {n} {what} in each. How many {what} are there in all?", [(m, "*", n)]
    if kind == 3:
        return (
            f"{who} found {a} {what} on Monday and {b} on Tuesday. Then {who} lost {min(c, a + b)} of them. "
            f"How many {what} does {who} have?",
            [(a, "+", b), (a + b, "-", min(c, a + b))],
        )
    if kind == 4:
        return (
            f"{who} has {a} {what}. {other} has {b} more than {who}. How many {what} do they have together?",
            [(a, "+", b), (a, "+", a + b)],
        )
    if kind == 5:
        return (
            f"{who} has {m} {box} with {n} {what} in each and {a} loose {what}. How many {what} does {who} have?",
            [(m, "*", n), (m * n, "+", a)],
        )
    if kind == 6:
        return (
            f"A shop had {big} {what}. It sold {small} of them and then got {c} new ones. "
            f"How many {what} does the shop have?",
            [(big, "-", small), (big - small, "+", c)],
        )
    if kind == 7:
        return (
            f"{who} has {big} {what}, {other} has {small} fewer. How many {what} do they have together?",
            [(big, "-", small), (big, "+", big - small)],
        )
    if kind == 8:
        return (
            f"{who} fills {m} {box} with {n} {what} each from a pile of {a + 62}. How many {what} stay in the pile?",
            [(m, "*", n), (a + 62, "-", m * n)],
        )
    return (
        f"{who}, {other} and a friend have {a}, {b} and {c} {what}. How many {what} do they have in all?",
        [(a, "+", b), (a + b, "+", c)],
    )


_APPLY = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def generate(rng: random.Random) -> Iterator[Item]:
    """Yield word problems without end; numbers have up to two digits, results up to three."""
    while True:
        question, steps = _problem(rng)
        results = [_APPLY[operator](left, right) for left, operator, right in steps]
        lines = [f"{le}{op}{ri}={re}" for (le, op, ri), re in zip(steps, results, strict=True)]
        answer = str(results[-1])
        prompt = f"Question: {question}\nAnswer:"
        yield Item(
            id=f"toy-gsm/{question}",
            prompt=prompt,
            answer=" " + ", ".join(lines) + f"\n#### {answer}",
            reference={"answer": answer, "question": question},
        )


class ToyGsm:
    """Arithmetic word problems; exact match of the number after ####."""

    name = "toy-gsm"
    metric = "exact match"
    stop: tuple[str, ...] = ("\n\n", "Question:")
    max_tokens = 48

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return ``limit`` (default 500) distinct problems of a split."""
        return take(generate(random.Random(f"{self.name}/{split}/{seed}")), split, 500 if limit is None else limit)

    def score(self, items: Sequence[Item], completions: Sequence[str]) -> list[float]:
        """GSM8K's exact match."""
        return exact_match(items, completions)

    def details(self, items: Sequence[Item], completions: Sequence[str]) -> dict[str, list[float]]:
        """Official and flexible extraction."""
        return both_matches(items, completions)
