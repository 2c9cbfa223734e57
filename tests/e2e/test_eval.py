"""``leap eval`` against a real ``leap serve``: what it asks, what it makes of faults, and what a SIGKILL costs."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from transformers import AutoTokenizer

from leap_serve.checkpoint import resolve_model
from leap_serve.cli import main
from leap_serve.encoding import Encoded
from leap_serve.engine import NoLogprobsError, mean_loss
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.errors import LeapError, UsageError
from leap_serve.evaluation.endpoint import Endpoint
from leap_serve.evaluation.evaluate import evaluate_text
from leap_serve.server.launch import Server
from leap_serve.tasks.chat import INSTRUCTION
from leap_serve.tasks.registry import load_task
from leap_serve.tasks.text import Text
from processes import SERVER_ENV, WAIT_S
from proxy import Proxy, proxy_before

pytestmark = pytest.mark.e2e
ITEMS = load_task("toy-gsm").items("test", 6)


@pytest.fixture
def proxy(server: Server) -> Iterator[Proxy]:
    with proxy_before(server.url) as running:
        yield running


def leap(capsys: pytest.CaptureFixture[str], *argv: str | Path) -> tuple[int, Any, str]:
    status = main(["eval", *map(str, argv), "--json"])
    said = capsys.readouterr()
    lines = said.out.strip().splitlines()
    return status, json.loads(lines[-1]) if lines and lines[-1].startswith("{") else None, said.err


def test_an_endpoint_tells_what_the_server_knows(server: Server) -> None:
    endpoint = Endpoint(f"{server.url}/v1/", concurrency=4)
    assert endpoint.model == "leap-tiny" and endpoint.identity["leap"][0] is None
    ids = endpoint.tokenize(["1+2", ""])
    assert len(ids[0]) == 3 and ids[1] == [] and endpoint.tokenize(["1+2"], prefix=True) == ids[:1]
    seen: dict[int, Any] = {}
    answers = endpoint.generate([item.prompt for item in ITEMS], 48, ["\n\n"], each=seen.__setitem__)
    assert [seen[place] for place in range(6)] == answers and {a.finish_reason for a in answers} == {"stop"}
    assert sum(load_task("toy-gsm").score(ITEMS, [answer.text for answer in answers])) >= 5
    # More stop strings than OpenAI's interface takes, and one that the server is not told of.
    (cut,) = endpoint.generate([ITEMS[0].prompt], 48, ["@1", "@2", "@3", "@4", "####"])
    assert (cut.text, cut.finish_reason) == (answers[0].text.split("####")[0], "stop")
    # The same question by another way: vLLM's own prompt_logprobs.
    scores = endpoint.score(ITEMS)
    end = endpoint.end_of_text
    assert end == AutoTokenizer.from_pretrained(resolve_model("leap-tiny"))("<|endoftext|>")["input_ids"]
    for item, score in zip(ITEMS, scores, strict=True):
        prompt, answer = endpoint.tokenize([item.prompt, item.answer])
        answer += end
        body = {"model": "leap-tiny", "prompt": prompt + answer, "max_tokens": 1, "prompt_logprobs": 0}
        told = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).json()["choices"][0]["prompt_logprobs"]
        wanted = sum(told[len(prompt) + at][str(token)]["logprob"] for at, token in enumerate(answer))
        assert score.tokens == len(answer) and score.logprob == pytest.approx(wanted, abs=0.3)
    assert endpoint.score_ids([Encoded([], ids[0][:1])])[0].tokens == 0
    endpoint.close()


def test_perplexity_through_an_endpoint_is_the_reference_s(server: Server, tmp_path: Path, shared_data: Path) -> None:
    with gzip.open(shared_data / "tinyshakespeare.txt.gz", "rt") as stream:
        (tmp_path / "t.txt").write_text(stream.read()[:900])
    text = Text(str(tmp_path / "t.txt"), 96, 48)
    endpoint, reference = Endpoint(server.url), TorchEngine("leap-tiny", dtype="bfloat16", device="cpu")
    found, expected = (evaluate_text(model, text, "test", 6) for model in (endpoint, reference))
    assert [s.tokens for s in found.scores] == [s.tokens for s in expected.scores]
    assert found.loss == pytest.approx(expected.loss, rel=0.01)
    endpoint.close(), reference.close()


def test_the_loss_is_that_of_the_engine(leap_tiny: Path) -> None:
    """In float32, where the order of additions is all that differs; the end of the text is counted by both."""
    reference = TorchEngine(leap_tiny, dtype="float32", device="cpu")
    expected = reference.score(ITEMS)
    reference.close()
    env = {**SERVER_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    with Server(leap_tiny, ["--name", "leap-tiny", "--dtype", "float32"], env) as exact:
        endpoint = Endpoint(exact.url)
        found = endpoint.score(ITEMS)
        endpoint.close()
    assert [score.tokens for score in found] == [score.tokens for score in expected]
    assert mean_loss(found) == pytest.approx(mean_loss(expected), abs=1e-4)
    assert [score.logprob for score in found] == pytest.approx([score.logprob for score in expected], abs=1e-3)


def test_a_loss_without_the_end_of_text_says_so(proxy: Proxy, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    command = ("--task", "toy-gsm", "--limit", "3", "--model", "leap-tiny")
    status, whole, said = leap(capsys, proxy.url, *command)
    assert status == 0 and "notes" not in whole and "Note" not in said
    proxy.absent = "/leap"  # as any other server
    status, found, _ = leap(capsys, proxy.url, *command, "-o", "r.json")
    assert status == 0 and len(found["notes"]) == 1 and found["engine"] == "endpoint"
    assert re.search("leaves out the end of text, .* not comparable with one measured in this process", found["notes"][0])  # fmt: skip
    tokens = [row["tokens"] for row in json.loads(Path("r.json").read_text())["tasks"]["toy-gsm"]["per_item"]]
    endpoint = Endpoint(proxy.url)
    assert endpoint.end_of_text is None
    assert tokens == [len(ids) for ids in endpoint.tokenize([item.answer for item in ITEMS[:3]])]
    endpoint.close()


def test_chat_has_no_loss_and_says_why(server: Server, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, found, _ = leap(capsys, server.url, "--chat", "--task", "toy-gsm", "--limit", "4")
    told = found["tasks"]["toy-gsm"]
    assert status == 0 and told["loss"] is None and told["no_loss"].startswith("chat endpoints do not tell")
    (tmp_path / "t.txt").write_text("some text")
    status, _, said = leap(capsys, server.url, "--chat", "--task", "perplexity", "--data", "t.txt")
    assert status == 1 and "chat endpoints do not tell" in said and "Traceback" not in said


def test_chat_asks_for_code_in_words_and_sends_no_stop_strings(proxy: Proxy, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    status, found, _ = leap(capsys, proxy.url, "--chat", "--task", "toy-code", "--task", "toy-gsm", "--limit", "2")
    assert status == 0 and set(found["tasks"]) == {"toy-code", "toy-gsm"}
    bodies = [body for path, body, _ in proxy.asked if path == "/v1/chat/completions"]
    assert len(bodies) == 4 and not any("stop" in body for body in bodies)
    code = [body for body in bodies if body["messages"][0]["content"].startswith(INSTRUCTION)]
    assert len(code) == 2 and {body["max_tokens"] for body in code} == {1024}


def test_nothing_is_asked_twice_after_a_sigkill(proxy: Proxy, tmp_path: Path) -> None:
    out, kept = tmp_path / "r.json", tmp_path / "r.answers.jsonl"
    command = [sys.executable, "-P", "-m", "leap_serve.cli", "eval", proxy.url, "--task", "toy-gsm", "--limit", "40",
               "--concurrency", "2", "-o", str(out), "--json"]  # fmt: skip
    first = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not kept.exists() or kept.read_bytes().count(b"\n") < 8:
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    first.send_signal(signal.SIGKILL)
    first.wait()
    before = [json.loads(line) for line in kept.read_text().splitlines() if line.endswith("}")]
    assert 8 <= len(before) < 40 and {row["kind"] for row in before} == {"completion"} and not out.exists()
    # What the killed process had sent may still arrive: the next ones are told apart by their keys.
    second, third = ({**os.environ, "OPENAI_API_KEY": key} for key in ("second", "third"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=second)
    assert done.returncode == 0, done.stderr
    texts = [prompt for prompt in proxy.prompts("second") if isinstance(prompt, str)]
    assert len(texts) == len(set(texts)) == 40 - len(before)
    rows = [json.loads(line) for line in kept.read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) == 80
    assert {row["key"] for row in before} <= {row["key"] for row in rows}
    result = json.loads(out.read_text())["tasks"]["toy-gsm"]
    assert (
        result["score"] > 0.8
        and [row["text"] for row in result["per_item"]]
        == [row["text"] for item in result["per_item"] for row in rows if row.get("text") == item["text"]][
            : len(result["per_item"])
        ]
    )
    again = subprocess.run(command, capture_output=True, text=True, timeout=300, env=third)
    assert again.returncode == 0 and json.loads(again.stdout.splitlines()[-1])["tasks"]["toy-gsm"]["score"] == result["score"]  # fmt: skip
    assert proxy.prompts("third") == [], "all of it is on record"


def test_ctrl_c_does_not_wait_for_a_server_that_stalls(proxy: Proxy, tmp_path: Path) -> None:
    proxy.stalls_after = 6
    command = [sys.executable, "-P", "-m", "leap_serve.cli", "eval", proxy.url, "--task", "toy-gsm", "--limit", "20"]
    # A shell that runs these tests in the background has them, and what they start, ignore SIGINT.
    heed = partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=heed
    ) as running:
        try:
            deadline = time.monotonic() + 120
            while not (kept := list(tmp_path.rglob("*.answers.jsonl"))) or kept[0].read_bytes().count(b"\n") < 6:
                assert running.poll() is None and time.monotonic() < deadline
                time.sleep(0.01)
            running.send_signal(signal.SIGINT)
            said, _ = running.communicate(timeout=WAIT_S)
        finally:
            running.kill()
    assert running.returncode == 130 and said.decode().strip() == "leap eval: interrupted"
    assert kept[0].read_bytes().count(b"\n") == 6, "without --out it waits in runs/eval for the same command"


def test_passing_faults_are_tried_again(proxy: Proxy) -> None:
    endpoint = Endpoint(proxy.url, "leap-tiny", first_wait_s=0.01)
    expected = endpoint.generate([ITEMS[0].prompt], 32)
    for faults in ([429, 503], ["hang up", 500, 502, 504]):
        proxy.faults[:] = faults
        assert endpoint.generate([ITEMS[0].prompt], 32) == expected
    proxy.faults[:] = [500] * 5
    with pytest.raises(LeapError, match=r"/v1/completions: answers 500 \(as the test wants it\), 5 times; see that"):
        endpoint.generate([ITEMS[0].prompt], 4)
    proxy.tries, proxy.faults[:] = 0, [400]
    with pytest.raises(LeapError, match=r"answers 400 \(as the test wants it\); correct"):
        endpoint.generate([ITEMS[0].prompt], 4)
    assert proxy.tries == 1, "what cannot pass is not tried again"
    proxy.faults[:] = ["html"]
    with pytest.raises(LeapError, match="something else than a JSON object"):
        endpoint.generate([ITEMS[0].prompt], 4)
    with pytest.raises(LeapError, match=r"answers 400 .*2048"):
        endpoint.generate(["word " * 3000], 4)
    endpoint.close()


def test_a_server_without_tokenize_gives_no_loss(proxy: Proxy) -> None:
    endpoint = Endpoint(proxy.url, "leap-tiny", first_wait_s=0.01)
    proxy.faults[:] = [404]
    with pytest.raises(NoLogprobsError, match="the server has no /tokenize"):
        endpoint.score(ITEMS)
    asked = proxy.tries
    with pytest.raises(NoLogprobsError, match="no /tokenize"):
        endpoint.score(ITEMS)
    assert proxy.tries == asked, "it is not asked again"
    endpoint.close()


def test_the_key_comes_from_the_environment(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.key = "sk-right"
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with pytest.raises(LeapError, match="answers 401: OPENAI_API_KEY is not set"):
        Endpoint(proxy.url)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-wrong")
    with pytest.raises(LeapError, match="OPENAI_API_KEY was refused") as error:
        Endpoint(proxy.url)
    assert "sk-" not in str(error.value)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-right")
    endpoint = Endpoint(proxy.url)
    assert endpoint.generate(["1"], 2)[0].finish_reason
    endpoint.close()


def test_wrong_addresses_and_names(server: Server) -> None:
    with pytest.raises(LeapError, match=r"v1/models: cannot be reached .*5 times"):
        Endpoint("http://127.0.0.1:9", first_wait_s=0.01)
    with pytest.raises(LeapError, match=r"answers 404 .*check the address and --model"):
        Endpoint(server.url, "other").generate(["1"], 1)
    with pytest.raises(LeapError, match="answers 404"):
        Endpoint(f"{server.url}/nowhere")
    with pytest.raises(UsageError, match="is no address"):
        Endpoint("http://127.0.0.1:port")


LM_EVAL_TASK = """\
task: leap_toy_gsm
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{gold}}}}"
generation_kwargs: {{until: ["\\n\\n", "Question:"], max_gen_toks: 48, do_sample: false}}
filter_list:
  - {{name: strict, filter: [{{function: regex, regex_pattern: "#### (\\\\-?[0-9\\\\.\\\\,]+)"}}, {{function: take_first}}]}}
metric_list: [{{metric: exact_match, aggregation: mean, higher_is_better: true}}]
metadata: {{version: 1}}
"""


def test_lm_eval_runs_against_leap_serve(server: Server, tmp_path: Path) -> None:
    """A local task file, the server as local-completions: the score is that of leap eval."""
    command = shutil.which("lm_eval")
    if command is None:
        pytest.skip("lm_eval is not installed (pip install 'lm-eval[api]')")
    items = load_task("toy-gsm").items("test", 24)
    data = tmp_path / "items.jsonl"
    data.write_text("".join(f"{json.dumps({'prompt': i.prompt, 'gold': i.reference['answer']})}\n" for i in items))
    (tmp_path / "leap_toy_gsm.yaml").write_text(LM_EVAL_TASK.format(data=data))
    arguments = f"model=leap-tiny,base_url={server.url}/v1/completions,num_concurrent=4,tokenizer_backend=None"
    done = subprocess.run(
        [command, "--model", "local-completions", "--model_args", arguments, "--tasks", "leap_toy_gsm",
         "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")],
        capture_output=True, text=True, timeout=600, env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (path,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(path.read_text())["results"]["leap_toy_gsm"]["exact_match,strict"]
    endpoint = Endpoint(server.url)
    task = load_task("toy-gsm")
    answers = endpoint.generate([item.prompt for item in items], task.max_tokens, task.stop)
    endpoint.close()
    assert found == pytest.approx(sum(task.score(items, [answer.text for answer in answers])) / 24, abs=1.5 / 24)
    assert found > 0.8
