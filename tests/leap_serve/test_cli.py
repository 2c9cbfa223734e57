"""The command line: usage errors, exit statuses, and that help needs neither torch nor vLLM."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from leap_serve.cli import VERBS, main
from leap_serve.provenance import command, made_by


def test_importing_the_product_loads_neither_torch_nor_vllm() -> None:
    code = (
        "import sys, leap_serve, leap_serve.plan, leap_serve.architectures, leap_serve.cli, leap_serve.engine;"
        "print([m for m in ('torch', 'vllm', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help_and_json(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert "--json" in capsys.readouterr().out


def test_usage_errors_exit_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in (["fly"], [], ["eval"]):
        with pytest.raises(SystemExit) as stop:
            main(argv)
        assert stop.value.code == 2
    assert main(["eval", "leap-tiny", "--task", "nope"]) == 2
    assert main(["eval", "leap-tiny", "--task", "toy-gsm", "--limit", "0"]) == 2
    assert main(["eval", "leap-tiny", "--task", "toy-gsm", "--", "--enforce-eager"]) == 2
    err = capsys.readouterr().err
    assert "there is no task 'nope'" in err
    assert "Traceback" not in err


def test_a_model_that_is_not_there_is_one_sentence() -> None:
    out = subprocess.run(
        [sys.executable, "-m", "leap_serve.cli", "eval", "/no/such/model", "--task", "toy-gsm", "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert out.returncode == 1
    assert "/no/such/model" in out.stderr
    assert "Traceback" not in out.stderr


def test_inspect_json_is_the_last_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "leap-tiny", "--json"]) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert json.loads(last)


@pytest.mark.parametrize(
    ("program", "typed"),
    [
        ("/some/leap_serve/cli/__main__.py", "leap"), ("/bin/leap", "leap"), ("/some/pytest/__main__.py", "__main__.py"),
        ("bench/tables.py", "tables.py"),
    ],
)  # fmt: skip
def test_a_command_is_on_record_as_one_would_type_it(monkeypatch: pytest.MonkeyPatch, program: str, typed: str) -> None:
    """``leap run`` starts its stages by python -m leap_serve.cli."""
    monkeypatch.setattr(sys, "argv", [program, "cut", "a b"])
    assert made_by()["argv"] == [typed, "cut", "a b"] and command() == f"{typed} cut 'a b'"
