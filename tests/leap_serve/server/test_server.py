"""What leap serve decides before and around vLLM: the port, the flags, the checkpoint, GET /leap and its key."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from leap_serve.bench.contenders import Worker
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.errors import LeapError, UsageError
from leap_serve.server.app import ServeOptions, bind, describe, leap_router
from processes import assert_all_gone, children_of, state_of


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        yield holder.getsockname()[1]


def test_bind_takes_a_free_port_and_holds_it() -> None:
    with bind("127.0.0.1", 0) as sock:
        port = sock.getsockname()[1]
        with pytest.raises(LeapError, match=f"127.0.0.1:{port}: the port is taken; .*--port"):
            bind("127.0.0.1", port)
    bind("127.0.0.1", port).close()


def test_bind_names_a_host_that_is_none() -> None:
    with pytest.raises(LeapError, match=r"no-such-host\.invalid:0: the host cannot be resolved"):
        bind("no-such-host.invalid", 0)


def test_port_taken_ends_before_vllm_loads(
    taken_port: int, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(family_checkpoint("qwen3_moe")), "--port", str(taken_port)]) == 1
    error = capsys.readouterr().err
    assert f"leap serve: 127.0.0.1:{taken_port}: the port is taken" in error
    assert "Traceback" not in error


@pytest.mark.parametrize("port", ["-1", "65536"])
def test_impossible_ports_are_usage_errors(
    port: str, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(family_checkpoint("qwen3_moe")), f"--port={port}"]) == 2
    assert f"--port: is {port}" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--port=1", "--host", "--model", "--uds=/x", "--headless"])
def test_flags_that_leap_serve_sets_itself_are_refused_after_the_dashes(flag: str) -> None:
    with pytest.raises(UsageError, match=f"{flag}.* stands after `--`"):
        ServeOptions(rest=("--max-model-len", "64", flag))
    assert ServeOptions(rest=("--max-model-len", "64")).rest[0] == "--max-model-len"


def test_a_missing_model_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(tmp_path / "absent")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"leap serve: {tmp_path / 'absent'}: no such folder")
    assert "Traceback" not in error


def test_a_truncated_shard_is_refused_before_the_port_is_bound(
    tmp_path: Path, taken_port: int, family_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(family_checkpoint("qwen3_moe"), folder)
    weights = folder / "model.safetensors"
    os.truncate(weights, weights.stat().st_size - 1)
    assert main(["serve", str(folder), "--port", str(taken_port)]) == 1
    error = capsys.readouterr().err
    assert "model.safetensors" in error and "the port is taken" not in error


def test_a_full_model_says_that_it_is_not_cut(family_checkpoint: Callable[[str], Path]) -> None:
    told = describe(Checkpoint.open(family_checkpoint("qwen3_moe")), "m")
    assert told["cut"] is False
    assert told["plan"] is told["fingerprint"] is told["provenance"] is None
    assert "full model" in told["what"]
    assert [layer["retained"] for layer in told["layers"]] == [8] * 4


def client(*keys: str) -> TestClient:
    app = FastAPI()
    app.include_router(leap_router({"model": "m"}, keys))
    return TestClient(app)


def test_leap_route_is_open_without_a_key() -> None:
    assert client().get("/leap").json() == {"model": "m"}


@pytest.mark.parametrize("header", [None, "Bearer wrong", "Bearer ", "Basic right", "right", "Bearer right2"])
def test_leap_route_refuses_all_but_the_key(header: str | None) -> None:
    answer = client("right", "other").get("/leap", headers={"Authorization": header} if header else {})
    assert answer.status_code == 401
    assert "model" not in answer.json()


def test_leap_route_knows_every_key() -> None:
    for key in ("right", "other"):
        headers = {"Authorization": f"Bearer {key}"}
        assert client("right", "other").get("/leap", headers=headers).json() == {"model": "m"}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_an_idle_contender_takes_no_core_and_errors_keep_their_text(tmp_path: Path) -> None:
    worker = Worker("a")
    try:
        with pytest.raises(LeapError, match="absent: no such folder"):
            worker.ask("open", 60, model=str(tmp_path / "absent"), engine={})
        deadline = time.monotonic() + 10
        while state_of(worker.pid) != "T" and time.monotonic() < deadline:
            time.sleep(0.01)
        assert state_of(worker.pid) == "T"
        with pytest.raises(LeapError, match=r"(?s)a: its process ended with status 1.*has no attribute 'dance'"):
            worker.ask("dance", 60)
    finally:
        worker.close()
    assert not Path(f"/proc/{worker.pid}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_stopped_contender_dies_with_its_parent() -> None:
    code = (
        "import time; from leap_serve.bench.contenders import Worker; from leap_serve.errors import LeapError\n"
        "worker = Worker('a')\n"
        "try: worker.ask('open', 60, model='/absent', engine={})\n"
        "except LeapError: print(worker.pid, flush=True); time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, "-P", "-c", code], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert_all_gone({pid})


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_child_whose_parent_ended_before_it_could_ask_for_a_signal_ends_at_once() -> None:
    script = """
import os, signal, time
from leap_serve.server.launch import dying_with_parent
bind, parent = dying_with_parent(signal.SIGTERM), os.getpid()
if os.fork() == 0:
    while os.getppid() == parent:
        time.sleep(0.01)
    print("orphan", flush=True)
    bind()
    print("alive", flush=True)
"""
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True, timeout=60)
    assert done.stdout == "orphan\n", done.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="parent-death signals are Linux's")
def test_a_server_ends_with_the_process_that_started_it(family_checkpoint: Callable[[str], Path]) -> None:
    folder = family_checkpoint("qwen3_moe")
    parent = subprocess.Popen(
        [sys.executable, "-P", "-c", f"from leap_serve.server.launch import Server; Server({str(folder)!r})"]
    )
    deadline = time.monotonic() + 30
    while not (children := children_of(parent.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert children
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert_all_gone(children)
