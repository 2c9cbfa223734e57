"""Generated code: what passes, what fails, and what the limits stop."""

from __future__ import annotations

from pathlib import Path

import pytest

from leap_serve.sandbox import run_python


def test_a_clean_exit_passes_and_the_reason_of_a_failure_is_kept() -> None:
    assert run_python("assert sum([1, 2]) == 3").passed
    outcome = run_python("assert 1 == 2, 'one is not two'")
    assert not outcome.passed
    assert "one is not two" in outcome.reason


def test_exit_status_counts() -> None:
    assert not run_python("raise SystemExit(3)").passed
    assert not run_python("def f(:").passed


@pytest.mark.parametrize(
    ("name", "source"),
    [
        ("wall clock", "import time\ntime.sleep(60)"),
        ("cpu", "while True: pass"),
        ("memory", "x = bytearray(2 << 30)"),
        ("file size", "open('big', 'wb').write(b'x' * (8 << 20))"),
        ("open files", "fs = [open('program.py') for _ in range(100)]"),
        ("fork", "import os\nos.fork()"),
        ("fork through C", "import _posixsubprocess"),
        ("subprocess", "import subprocess\nsubprocess.run(['true'])"),
        ("shell", "import os\nassert os.system('true') == 0"),
        ("socket", "import socket\nsocket.socket()"),
        ("_socket", "import _socket\n_socket.socket()"),
        ("asyncio connection", "import asyncio\nasyncio.run(asyncio.open_connection('127.0.0.1', 9))"),
        ("kill the parent", "import os, signal\nos.kill(os.getppid(), signal.SIGTERM)"),
        ("environment", "import os\nassert 'HOME' in os.environ or 'PATH' in os.environ"),
    ],
)
def test_limits(name: str, source: str) -> None:
    if name == "fork through C":
        source += "\nimport os\nos.posix_spawn('/bin/true', ['true'], {})"
    assert not run_python(source, wall_s=3.0).passed


def test_output_floods_are_harmless_and_the_working_folder_is_removed(tmp_path: Path) -> None:
    assert run_python("for _ in range(10000): print('x' * 1000)").passed
    seen = run_python("import os\nopen('left', 'w').write('x')\nraise SystemExit(os.getcwd())")
    assert "leap-sandbox-" in seen.reason
    assert not Path(seen.reason).exists()


def test_children_left_behind_are_killed() -> None:
    before = {path for path in Path("/proc").iterdir() if path.name.isdigit()}
    run_python("import threading, time\nthreading.Thread(target=time.sleep, args=(30,)).start()", wall_s=1.0)
    after = {path for path in Path("/proc").iterdir() if path.name.isdigit()}
    ours = [path for path in after - before if b"program.py" in _command_line(path)]
    assert not ours


def _command_line(process: Path) -> bytes:
    try:
        return (process / "cmdline").read_bytes()
    except OSError:
        return b""
