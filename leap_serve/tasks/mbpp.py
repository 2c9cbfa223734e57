"""MBPP (Austin et al. 2021) in HumanEval's form: the training pool for code (methods: §7)."""

from __future__ import annotations

import ast
from pathlib import Path

from leap_serve.errors import LeapError
from leap_serve.tasks.base import Item, Split
from leap_serve.tasks.humaneval import Functions
from leap_serve.tasks.rows import Row, Source, text_of

SOURCE = Source("mbpp", "google-research-datasets/mbpp", "full", splits=("train", "validation", "test"))


class Mbpp(Functions):
    """Short Python functions from a sentence and an example; pass@1 on MBPP's own asserts, in the sandbox."""

    name = "mbpp"

    def __init__(self, data: Path | None = None) -> None:
        self._data = data

    def items(self, split: Split, limit: int | None = None, seed: int = 0) -> list[Item]:
        """Return the functions of an official split; the ten few-shot rows belong to none."""
        return SOURCE.items(split, _item, self._data, limit, seed)


def _item(row: Row, where: str) -> Item:
    """Make a header with docstring and example of the function that the tests call; its body is the answer.

    Code is printed anew from its syntax tree (MBPP mixes tabs, blanks and CRLF), which drops comments. Imports,
    helpers and constants beside the function come first, as they do in HumanEval.
    """
    text, code = text_of(row, "text", where), text_of(row, "code", where)
    tests, setup = row.get("test_list"), row.get("test_setup_code") or ""
    try:
        asserts = [ast.parse(test).body[0] for test in tests or ()]
        called = {n.func.id for a in asserts for n in ast.walk(a) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)}  # fmt: skip
        module = ast.parse(code.replace("\r\n", "\n"))
    except (SyntaxError, TypeError, ValueError) as error:
        raise LeapError(where, f"its code or tests are not Python ({error})", "give MBPP's own rows") from None
    wanted = [f for f in module.body if isinstance(f, ast.FunctionDef) and f.name in called]
    if len(wanted) != 1 or not asserts:
        what = f"its tests call {len(wanted)} of the functions in its code, not one"
        raise LeapError(where, what, "give MBPP's own rows")
    function = wanted[0]
    before = "".join(f"{ast.unparse(part)}\n\n" for part in module.body if part is not function)
    header, body = _header_and_body(function)
    docstring = "\n    ".join([text.strip().replace("\\", "\\\\").replace('"""', "'''"), *_example(asserts[0])])
    # The asserts stand before check() and not in it: some of MBPP's own functions are called check.
    lines = [setup.replace("\r\n", "\n"), *map(ast.unparse, asserts), "def check(candidate):", "    pass"]
    return Item(
        id=f"mbpp/{row.get('task_id', where)}",
        prompt=f'{before}{header}\n    """{docstring}\n    """\n',
        answer=f"{body}\n",
        reference={"entry_point": function.name, "test": "\n".join(lines) + "\n"},
    )


def _header_and_body(function: ast.FunctionDef) -> tuple[str, str]:
    """Print a function as its first line and the rest, without the docstring."""
    if ast.get_docstring(function) is not None and len(function.body) > 1:
        function.body = function.body[1:]
    header, _, body = ast.unparse(function).partition("\n")
    return header, body


def _example(test: ast.stmt) -> list[str]:
    """Print ``assert f(…) == value`` as a doctest; nothing for an assert of another form."""
    if isinstance(test, ast.Assert) and isinstance(test.test, ast.Compare) and isinstance(test.test.ops[0], ast.Eq):
        return [f">>> {ast.unparse(test.test.left)}", ast.unparse(test.test.comparators[0])]
    return []
