"""The server that users start, over real HTTP: vLLM's routes, ours, the key, how it stops, what it refuses."""

from __future__ import annotations

import gzip
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from leap_serve.errors import LeapError
from leap_serve.plan import Plan
from leap_serve.server.launch import Server
from processes import SERVER_ENV, WAIT_S, assert_all_gone, children_of

pytestmark = pytest.mark.e2e
QUESTION = "Tom has 3 apples and buys 4 more. How many apples does Tom have now?"


def client_of(server: Server, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, timeout=120, max_retries=0)


def get(server: Server, path: str, key: str | None = None) -> httpx.Response:
    return httpx.get(f"{server.url}{path}", headers={"Authorization": f"Bearer {key}"} if key else {}, timeout=30)


def test_models_health_and_metrics(server: Server) -> None:
    assert [model["id"] for model in get(server, "/v1/models").json()["data"]] == ["leap-tiny"]
    assert get(server, "/health").status_code == 200
    assert "vllm:request_success_total" in get(server, "/metrics").text


def test_leap_route_of_a_full_model(server: Server) -> None:
    told = get(server, "/leap").json()
    assert (told["model"], told["cut"], told["plan"], told["fingerprint"]) == ("leap-tiny", False, None, None)
    assert [layer["retained"] for layer in told["layers"]] == [64] * len(told["layers"])
    assert [one["layer"] for one in told["kernels"]] == [layer["layer"] for layer in told["layers"]]
    assert {(one["kernel"], one["backend"]) for one in told["kernels"]} == {("vllm", "CPU")}
    assert "/leap" in get(server, "/openapi.json").json()["paths"]


def test_completions_by_http_and_by_client_agree(server: Server) -> None:
    body = {"model": "leap-tiny", "prompt": f"Question: {QUESTION}\nAnswer:", "max_tokens": 12, "temperature": 0}
    answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200
    found = answer.json()
    assert found["usage"]["total_tokens"] == found["usage"]["prompt_tokens"] + found["usage"]["completion_tokens"]
    assert found["choices"][0]["finish_reason"] in ("stop", "length")
    again = client_of(server).completions.create(**body)
    assert again.choices[0].text == found["choices"][0]["text"] != ""


def test_chat_streams_the_same_text(server: Server) -> None:
    ask = {
        "model": "leap-tiny", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 16, "temperature": 0,
    }  # fmt: skip
    whole = client_of(server).chat.completions.create(**ask)
    parts = [
        chunk.choices[0].delta.content or ""
        for chunk in client_of(server).chat.completions.create(**ask, stream=True)
        if chunk.choices
    ]
    assert "".join(parts) == whole.choices[0].message.content
    assert len([part for part in parts if part]) > 1


def test_an_unknown_model_name_is_404(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="other"):
        client_of(server).completions.create(model="other", prompt="1", max_tokens=1)


def test_fifty_real_questions_get_well_formed_answers(server: Server, shared_data: Path) -> None:
    with gzip.open(shared_data / "gsm8k_test.jsonl.gz", "rt", encoding="utf-8") as stream:
        questions = [json.loads(line)["question"] for _, line in zip(range(50), stream, strict=False)]
    client = client_of(server)

    def ask(question: str) -> openai.types.chat.ChatCompletion:
        raw = client.chat.completions.with_raw_response.create(
            model="leap-tiny", messages=[{"role": "user", "content": question}], max_tokens=24, temperature=0
        )
        assert raw.status_code == 200
        return raw.parse()

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, questions))
    assert len(answers) == 50
    for answer in answers:
        (choice,) = answer.choices
        assert choice.finish_reason in ("stop", "length")
        assert choice.message.content
        usage = answer.usage
        assert usage is not None and 1 <= usage.completion_tokens <= 24
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        assert choice.finish_reason == "stop" or usage.completion_tokens == 24


def test_an_uneven_cut_behind_a_key_until_sigterm(uneven_cut: Path) -> None:
    with Server(uneven_cut, ["--api-key", "sk-right"], SERVER_ENV) as server:
        for path in ("/v1/models", "/leap"):
            assert get(server, path).status_code == get(server, path, "sk-wrong").status_code == 401, path
            assert get(server, path, "sk-right").status_code == 200, path
        assert get(server, "/health").status_code == 200
        told = get(server, "/leap", "sk-right").json()
        plan = Plan.load(uneven_cut / "leap.json")
        assert told["cut"] is True and told["model"] == "leap-tiny-uneven"
        assert told["fingerprint"] == plan.fingerprint
        assert [layer["retained"] for layer in told["layers"]] == plan.counts == [16, 24, 32, 40][: len(plan.counts)]
        assert [layer["top_k"] for layer in told["layers"]] == [layer.top_k for layer in plan.layers.values()]
        assert told["plan"]["retained"] == {str(i): list(layer.retained) for i, layer in plan.layers.items()}
        assert told["provenance"] == dict(plan.made_by)
        assert "sk-right" not in json.dumps(told)
        # The engine's first request, and a short one: without AMX permission it would be its last.
        answer = client_of(server, "sk-right").completions.create(model="leap-tiny-uneven", prompt="1", max_tokens=4)
        assert answer.usage is not None and answer.usage.prompt_tokens < 5
        with pytest.raises(openai.AuthenticationError):
            client_of(server, "sk-wrong").models.list()
        answer = client_of(server, "sk-right").completions.create(
            model="leap-tiny-uneven", prompt=QUESTION, max_tokens=4
        )
        assert answer.usage is not None and answer.usage.completion_tokens >= 1
        # What the ready line tells people to type works as it stands.
        line = re.search(r"^  (curl .+)$", server.log, re.MULTILINE)
        assert line is not None
        typed = subprocess.run(
            ["bash", "-c", line[1]],
            env={**os.environ, "KEY": "sk-right"},
            capture_output=True,
            timeout=WAIT_S,
            check=True,
        )
        assert json.loads(typed.stdout)["choices"][0]["finish_reason"] in ("stop", "length")
        children, port = children_of(server.pid), int(server.url.rpartition(":")[2])
        assert children
        assert server.stop(signal.SIGTERM, WAIT_S) == 0
        assert_all_gone(children, port)


def test_ctrl_c_in_the_middle_of_an_answer(uneven_cut: Path) -> None:
    with Server(uneven_cut, ["--json"], {**SERVER_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}) as server:
        children, port = children_of(server.pid), int(server.url.rpartition(":")[2])
        stream = client_of(server).completions.create(
            model="leap-tiny-uneven", prompt=QUESTION, max_tokens=1900, stream=True, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        # A terminal sends Ctrl-C to the whole process group.
        os.killpg(server.pid, signal.SIGINT)
        assert server.wait(WAIT_S) == 0
        assert_all_gone(children, port)
        assert json.dumps({"url": server.url, "model": "leap-tiny-uneven"}) in server.log.splitlines()


def test_a_dead_engine_ends_the_server_with_an_error(family_checkpoint: Callable[[str], Path]) -> None:
    flags = ["--dtype", "float32", "--", "--skip-tokenizer-init"]
    with Server(family_checkpoint("qwen3_moe"), flags, {**SERVER_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}) as server:
        children, port = children_of(server.pid), int(server.url.rpartition(":")[2])
        (engine,) = [pid for pid in children if b"EngineCor" in Path(f"/proc/{pid}/comm").read_bytes()]
        os.kill(engine, signal.SIGKILL)
        assert server.wait(WAIT_S) == 1
        assert "the engine died while serving" in server.log
        assert_all_gone(children, port)


def test_sigterm_while_loading_leaves_nothing_behind(leap_tiny: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "leap_serve.cli", "serve", str(leap_tiny), "--port", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **SERVER_ENV}, start_new_session=True,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if b"Initializing a V1 LLM engine" in line:
                break
        children = children_of(process.pid)
        assert children
        process.terminate()
        rest, _ = process.communicate(timeout=WAIT_S)
        assert process.returncode == 130
        assert b"leap serve: interrupted" in rest
        assert_all_gone(children)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def test_vllm_refusing_a_flag_or_a_setting_is_a_sentence(leap_tiny: Path) -> None:
    with pytest.raises(LeapError, match=r"status 2: --: vLLM says: .*--no-such-flag"):
        Server(leap_tiny, ["--", "--no-such-flag"], SERVER_ENV)
    with pytest.raises(LeapError, match=r"status 1: .*vLLM did not start: .*max_model_len"):
        Server(leap_tiny, ["--", "--max-model-len", "1000000"], SERVER_ENV)
