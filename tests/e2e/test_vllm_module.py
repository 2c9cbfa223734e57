"""vLLM's own server module serves an uneven cut: installing the plugin is all it takes."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest

from processes import SERVER_ENV

pytestmark = pytest.mark.e2e


def test_the_server_module_of_vllm_serves_an_uneven_cut(uneven_cut: Path, tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # The `vllm` command itself is broken on the CPU build; this is the module that it would start.
    command = [
        sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", str(uneven_cut), "--host", "127.0.0.1",
        "--port", str(port), "--served-model-name", "cut", "--enforce-eager", "--max-model-len", "256",
    ]  # fmt: skip
    log = tmp_path / "server.log"
    with log.open("wb") as stream:
        process = subprocess.Popen(
            command, env={**os.environ, **SERVER_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"},
            stdout=stream, stderr=stream, start_new_session=True,
        )  # fmt: skip
    try:
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while True:
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            try:
                if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                    break
            except httpx.TransportError:
                time.sleep(0.2)
        body = {"model": "cut", "prompt": "Question: Anna has 23 apples.\nAnswer:", "max_tokens": 8, "temperature": 0}
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] >= 1
        assert "LeapQwen3MoeForCausalLM" in log.read_text()
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
