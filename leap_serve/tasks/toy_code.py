"""toy-code: complete a Python function from its description, in HumanEval's format and by its rule."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

from leap_serve.tasks.base import Item, Split, take
from leap_serve.tasks.humaneval import Functions

VERBS = ("compute", "find", "get", "make", "solve", "build", "derive", "work_out")
NOUNS = ("value", "result", "answer", "output", "total", "thing", "item", "entry")
LISTS = ("values", "numbers", "xs", "data", "items", "nums")
SCALARS = ("x", "n", "a", "k", "number")
STRINGS = ("text", "word", "s", "line", "name")

_Draw = Callable[[random.Random], object]


def _list_function(rng: random.Random) -> tuple[str, str, str, _Draw]:
    """An aggregate of a map over a filter: (parameter, description, expression, argument sampler)."""
    arg, c, d = rng.choice(LISTS), rng.randint(2, 9), rng.randint(2, 9)
    where, condition = rng.choice((
        ("", ""), (f" greater than {c}", f" if v > {c}"), (f" less than {c}", f" if v < {c}"),
        (" that are even", " if v % 2 == 0"), (" that are odd", " if v % 2 == 1"),
        (f" divisible by {c}", f" if v % {c} == 0"),
    ))  # fmt: skip
    change, value = rng.choice((
        ("", "v"), (f", each plus {d}", f"v + {d}"), (f", each times {d}", f"v * {d}"),
        (", each squared", "v ** 2"), (", each negated", "-v"),
    ))  # fmt: skip
    if rng.random() < 0.2:
        what, expression = f"how many elements of {arg}{where or ' there are'}", f"sum(1 for v in {arg}{condition})"
    else:
        what, call = rng.choice((
            ("the list of", "[{}]"), ("the sum of", "sum({})"), ("the sorted list of", "sorted({})"),
            ("the set of", "{{{}}}"),
        ))  # fmt: skip
        what, expression = f"{what} elements of {arg}{where}{change}", call.format(f"{value} for v in {arg}{condition}")
    return arg, what, expression, lambda r: [r.randint(-20, 40) for _ in range(r.randint(3, 9))]


def _scalar_function(rng: random.Random) -> tuple[str, str, str, _Draw]:
    arg, c, d = rng.choice(SCALARS), rng.randint(2, 99), rng.randint(2, 9)
    what, expression = rng.choice((
        (f"{arg} plus {c}", f"{arg} + {c}"), (f"{arg} times {c}", f"{arg} * {c}"), (f"{arg} minus {c}", f"{arg} - {c}"),
        (f"{arg} times {d} plus {c}", f"{arg} * {d} + {c}"), (f"{arg} squared minus {c}", f"{arg} ** 2 - {c}"),
        (f"whether {arg} is divisible by {d}", f"{arg} % {d} == 0"), (f"whether {arg} is greater than {c}", f"{arg} > {c}"),
        (f"the larger of {arg} and {c}", f"max({arg}, {c})"), (f"the smaller of {arg} and {c}", f"min({arg}, {c})"),
        (f"the remainder of {arg} by {d}", f"{arg} % {d}"), (f"the last digit of {arg} plus {c}", f"{arg} % 10 + {c}"),
    ))  # fmt: skip
    return arg, what, expression, lambda r: r.randint(0, 200)


def _string_function(rng: random.Random) -> tuple[str, str, str, _Draw]:
    arg, c, letter = rng.choice(STRINGS), rng.randint(2, 9), rng.choice("abcdefghijklmnopqrstuvwxyz")
    what, expression = rng.choice((
        (f"{arg} reversed", f"{arg}[::-1]"), (f"{arg} in upper case", f"{arg}.upper()"),
        (f"{arg} repeated {c} times", f"{arg} * {c}"), (f"the first {c} characters of {arg}", f"{arg}[:{c}]"),
        (f"the last {c} characters of {arg}", f"{arg}[-{c}:]"), (f"how often '{letter}' occurs in {arg}", f"{arg}.count('{letter}')"),
        (f"{arg} without '{letter}'", f"{arg}.replace('{letter}', '')"), (f"whether {arg} starts with '{letter}'", f"{arg}.startswith('{letter}')"),
        (f"whether {arg} is longer than {c}", f"len({arg}) > {c}"), (f"the length of {arg} plus {c}", f"len({arg}) + {c}"),
        (f"{arg} without its first {c} characters", f"{arg}[{c}:]"),
    ))  # fmt: skip
    return arg, what, expression, lambda r: "".join(r.choices("abcdefghijklmnopqrstuvwxyz ", k=r.randint(1, 14)))


def generate(rng: random.Random) -> Iterator[Item]:
    """Yield functions to complete, each with five asserted calls, without end."""
    while True:
        family = rng.choices((_list_function, _scalar_function, _string_function), (4, 3, 3))[0]
        arg, what, expression, draw = family(rng)
        function = f"{rng.choice(VERBS)}_{rng.choice(NOUNS)}"
        prompt = f'def {function}({arg}):\n    """Return {what}."""\n'
        # The expression is ours, not a model's: evaluating it here is how the tests get their values.
        solve = eval(f"lambda {arg}: {expression}", {})
        calls = [draw(rng) for _ in range(5)]
        asserts = "".join(f"    assert candidate({call!r}) == {solve(call)!r}\n" for call in calls)
        yield Item(
            id=f"toy-code/{prompt}",
            prompt=prompt,
            answer=f"    return {expression}\n",
            reference={"entry_point": function, "test": f"def check(candidate):\n{asserts}"},
        )


class ToyCode(Functions):
    """Python functions from their descriptions; pass@1 on executed code."""

    name = "toy-code"
    max_tokens = 40

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return ``limit`` (default 500) distinct functions of a split."""
        return take(generate(random.Random(f"{self.name}/{split}/{seed}")), split, 500 if limit is None else limit)
