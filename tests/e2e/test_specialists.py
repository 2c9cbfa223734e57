"""Many specialists from one engine, over real HTTP: each answers as its own cut does, whatever else runs beside it."""

from __future__ import annotations

import hashlib
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch

from leap_serve.cli import main
from leap_serve.errors import LeapError
from leap_serve.evaluation.endpoint import Endpoint
from leap_serve.plan import Plan
from leap_serve.server.admin import ADMIN_HEADER
from leap_serve.server.launch import Server
from parity import TOLERANCE, uneven_plan
from processes import SERVER_ENV
from serving import Job, serve
from sharing import ADMIN, BASE, LONG, SHORT, TOKENS, Shared, ask, made, manage, sharing
from storm import rage, resident_mib

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shared]:
    with sharing(tmp_path_factory.mktemp("specialists")) as running:
        yield running


Answer = tuple[list[int], list[dict[int, float]]]
"""Token ids of prompt and answer, and the likeliest tokens' log-probabilities at each of the answer's."""


def answer(shared: Shared, model: str, prompt: str) -> Answer:
    """Ask greedily, with log-probabilities."""
    found = ask(shared, model, prompt, logprobs=20, return_token_ids=True, return_tokens_as_token_ids=True).json()
    assert found["model"] == model
    (choice,) = found["choices"]
    top = [
        {int(key.removeprefix("token_id:")): value for key, value in row.items()}
        for row in choice["logprobs"]["top_logprobs"]
    ]
    assert found["usage"] == {**found["usage"], "prompt_tokens": len(prompt), "completion_tokens": TOKENS}
    return [*choice["prompt_token_ids"], *choice["token_ids"]], top


def furthest(answers: Sequence[Answer], rows: Sequence[torch.Tensor]) -> float:
    """Largest difference of a log-probability; infinite where a token is not the reference's likeliest."""
    worst = 0.0
    for (ids, top), row in zip(answers, rows, strict=True):
        for place, found in enumerate(top, len(ids) - len(top)):
            if int(row[place - 1].argmax()) != ids[place]:
                return float("inf")
            worst = max(worst, *(abs(value - float(row[place - 1][token])) for token, value in found.items()))
    return worst


def test_each_answers_as_its_own_cut_while_all_run_mixed(shared: Shared) -> None:
    names, prompts = [BASE, *shared.cuts], [SHORT, LONG, LONG + "Q", "2 + 2 ="]
    asked = [(name, prompt) for _ in range(2) for prompt in prompts for name in names]
    with ThreadPoolExecutor(32) as pool:
        found = list(pool.map(lambda one: answer(shared, *one), asked))
    by_name = {name: [one for one, (other, _) in zip(found, asked, strict=True) if other == name] for name in names}
    folders = {BASE: shared.model, **shared.cuts}
    # What came out is scored, token by token, by vLLM serving each cut alone.
    unique = {
        name: list({tuple(ids): (ids, top) for ids, top in answers}.values()) for name, answers in by_name.items()
    }
    jobs = [Job(str(folders[name]), [ids for ids, _ in unique[name]], {"max_model_len": 256}) for name in names]
    references = dict(zip(names, serve(jobs), strict=True))
    for name in names:
        assert not references[name].error, references[name].message
        assert len(unique[name]) == len(prompts), f"{name} gave two answers to one prompt"
        assert furthest(unique[name], references[name].logprobs) <= TOLERANCE, name
    # And the plans differ: nobody else's answers fit.
    for name in names:
        texts = {tuple(ids) for ids, _ in unique[name]}
        assert all(texts.isdisjoint({tuple(ids) for ids, _ in unique[other]}) for other in names if other != name)


def test_preempted_requests_answer_as_if_alone(shared: Shared) -> None:
    def preempted() -> float:
        text = httpx.get(f"{shared.server.url}/metrics", timeout=30).text
        return sum(float(x.split()[-1]) for x in text.splitlines() if x.startswith("vllm:num_preemptions_total"))

    # 120 tokens of a block of 128, and 24 more: 35 sequences soon want 70 of the 47 blocks that there are.
    names, before = [BASE, *shared.cuts], preempted()
    prompts = [f"{letter} is for " + LONG[: 120 - 9] for letter in "ABCDEFG"]
    asked = [(name, prompt) for name in names for prompt in prompts]
    alone = [ask(shared, name, prompt, max_tokens=24).json()["choices"][0]["text"] for name, prompt in asked]
    assert preempted() == before
    with ThreadPoolExecutor(len(names)) as pool:
        answers = list(pool.map(lambda name: ask(shared, name, prompts, max_tokens=24).json()["choices"], names))
    assert preempted() > before, "nothing was preempted, so nothing was tried"
    assert [choice["text"] for choices in answers for choice in choices] == alone
    assert len(set(alone)) > len(prompts)


def test_every_way_of_asking_reaches_the_specialist(shared: Shared) -> None:
    expected = {name: ask(shared, name, SHORT).json()["choices"][0]["text"] for name in (BASE, *shared.cuts)}
    assert len(set(expected.values())) == len(expected)
    client = openai.OpenAI(base_url=f"{shared.server.url}/v1", api_key="none", timeout=120, max_retries=0)
    listed = {model.id: model.model_dump() for model in client.models.list().data}
    assert list(listed) == [BASE, *shared.cuts]
    for name, path in shared.cuts.items():
        assert (listed[name]["parent"], listed[name]["root"]) == (
            BASE,
            f"leap:{Plan.load(path / 'leap.json').fingerprint}",
        )
    for name, text in expected.items():
        said: dict[str, Any] = dict(model=name, max_tokens=TOKENS, temperature=0, extra_body={"ignore_eos": True})
        messages: Any = [{"role": "user", "content": SHORT}]
        chat = client.chat.completions.create(messages=messages, **said)
        assert (chat.model, chat.choices[0].message.content) == (name, text)
        parts: Any = [{"role": "user", "content": [{"type": "text", "text": SHORT}]}]
        assert client.chat.completions.create(messages=parts, **said).choices[0].message.content == text
        options: Any = {"include_usage": True}
        chunks = list(client.completions.create(prompt=SHORT, stream=True, stream_options=options, **said))
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == text
        assert {chunk.model for chunk in chunks} == {name}
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == TOKENS
        several = ask(shared, name, [SHORT, SHORT]).json()["choices"]
        assert [choice["text"] for choice in several] == [text] * 2
    beams = [
        ask(shared, name, SHORT, use_beam_search=True, n=2).json()["choices"][0]["text"] for name in (BASE, "code")
    ]
    assert beams[0] != beams[1]


def test_nobody_forges_what_only_the_server_sets(shared: Shared) -> None:
    for model in (BASE, "math"):
        for key in ("leap_plan", "leap_esp"):
            for stream in (False, True):
                refused = ask(shared, model, SHORT, vllm_xargs={key: 2}, stream=stream)
                assert refused.status_code == 400
                assert f"vllm_xargs: {key} is not for clients to set" in refused.json()["error"]["message"]
    right = ask(shared, "code", LONG).json()["choices"][0]["text"]
    for salt in ("mine", Plan.load(shared.cuts["code"] / "leap.json").fingerprint):
        # A client's own salt keeps its part of a specialist's cache apart, and opens nobody else's.
        assert ask(shared, BASE, LONG, cache_salt=salt).status_code == 200
        assert ask(shared, "code", LONG, cache_salt=salt).json()["choices"][0]["text"] == right
    assert ask(shared, "codes", SHORT).status_code == 404
    assert ask(shared, "math", "x" * 300).status_code == 400


def test_metrics_count_each_specialist(shared: Shared) -> None:
    def counted(name: str) -> dict[str, float]:
        text = httpx.get(f"{shared.server.url}/metrics", timeout=30).text
        wanted = [line for line in text.splitlines() if line.startswith("leap:") and f'model_name="{name}"' in line]
        return {line.partition("{")[0]: float(line.rpartition(" ")[2]) for line in wanted}

    for name in (BASE, "law"):
        ask(shared, name, SHORT)
        before = counted(name)
        ask(shared, name, SHORT)
        ask(shared, name, SHORT, stream=True)
        more = {key: value - before[key] for key, value in counted(name).items() if not key.endswith("_created")}
        assert more == {
            "leap:specialist_requests_total": 2, "leap:specialist_prompt_tokens_total": 2 * len(SHORT),
            "leap:specialist_generation_tokens_total": 2 * TOKENS, "leap:specialist_requests_running": 0,
        }  # fmt: skip


def test_specialists_come_and_go_while_others_answer(shared: Shared) -> None:
    right = {name: ask(shared, name, SHORT).json()["choices"][0]["text"] for name in ("math", "law", "tuned")}
    stop, wrong = threading.Event(), list[str]()

    def keep_asking(name: str) -> None:
        while not stop.is_set():
            found = ask(shared, name, SHORT)
            if found.status_code != 200 or found.json()["choices"][0]["text"] != right[name]:
                wrong.append(found.text)

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(keep_asking, name) for name in right]
        try:
            for _ in range(3):
                for body in (
                    {"path": str(shared.cuts["tuned"])},
                    {"plan": json.loads((shared.cuts["law"] / "leap.json").read_text())},
                ):
                    loaded = manage(shared, "POST", json={"name": "guest", **body})
                    assert loaded.status_code == 201, loaded.text
                    assert loaded.json()["kept"] is True
                    same = "tuned" if "path" in body else "law"
                    assert ask(shared, "guest", SHORT).json()["choices"][0]["text"] == right[same]
                    assert manage(shared, "POST", json={"name": "guest", **body}).status_code == 409
                    assert [one["name"] for one in json.loads(shared.state.read_text())["specialists"]] == ["guest"]
                    assert manage(shared, "DELETE", "/guest").json() == {"name": "guest", "state": "unloaded"}
                    assert ask(shared, "guest", SHORT).status_code == 404
                    assert json.loads(shared.state.read_text())["specialists"] == []
        finally:
            stop.set()
        for one in running:
            one.result()
    assert not wrong, wrong[0]
    listed = {one["name"]: one for one in manage(shared, "GET").json()["data"]}
    assert list(listed) == list(shared.cuts)
    assert [one["router_head"] for one in listed.values()] == [False, False, False, True]
    masks, heads = (
        4 * (8 * 4 + 12),
        64 * 4 * sum(Plan.load(shared.cuts["tuned"] / "leap.json").counts[i] for i in (0, 2, 3)),
    )
    assert [one["bytes"] for one in listed.values()] == [masks, masks, masks, masks + heads]
    assert [one["name"] for one in httpx.get(f"{shared.server.url}/leap").json()["specialists"]] == list(shared.cuts)


def test_unloading_waits_for_what_runs(shared: Shared) -> None:
    body = {"path": str(shared.cuts["law"] / "leap.json")}
    right = ask(shared, "law", SHORT, max_tokens=200).json()["choices"][0]["text"]
    assert manage(shared, "POST", json={"name": "guest", **body}).status_code == 201
    asked = {"model": "guest", "prompt": SHORT, "max_tokens": 200, "temperature": 0, "ignore_eos": True, "stream": True}
    with httpx.stream("POST", f"{shared.server.url}/v1/completions", json=asked, timeout=120) as stream:
        lines = stream.iter_lines()
        first = next(lines)
        leaving = manage(shared, "DELETE", "/guest?wait_s=0")
        assert (leaving.status_code, leaving.json()["state"]) == (202, "leaving")
        assert ask(shared, "guest", SHORT).status_code == 404
        (card,) = [one for one in manage(shared, "GET").json()["data"] if one["name"] == "guest"]
        assert (card["state"], card["running"]) == ("leaving", 1)
        assert manage(shared, "POST", json={"name": "guest", **body}).status_code == 409
        rest = [first, *(line for line in lines if line)]
    chunks = [json.loads(line.removeprefix("data: ")) for line in rest if line.startswith("data: {")]
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == right
    gone = manage(shared, "DELETE", "/guest")
    assert gone.status_code in (200, 404), gone.text
    assert manage(shared, "POST", json={"name": "guest", **body}).status_code == 201
    # A client that hangs up in the middle of its answer holds nothing up.
    with httpx.stream("POST", f"{shared.server.url}/v1/completions", json=asked, timeout=120) as stream:
        next(stream.iter_lines())
    assert manage(shared, "DELETE", "/guest").json()["state"] == "unloaded"


def test_what_does_not_fit_is_refused_with_the_reason(shared: Shared, family_checkpoint: Callable[[str], Path]) -> None:
    before = manage(shared, "GET").json()
    good = json.loads((shared.cuts["law"] / "leap.json").read_text())
    foreign = uneven_plan(family_checkpoint("mixtral")).to_json()
    for body, reason in (
        ({"name": "a", "plan": foreign}, "was made for"),
        ({"name": "a", "plan": {**good, "top_k": {key: 3 for key in good["top_k"]}}}, "top_k"),
        ({"name": "a", "plan": {**good, "fingerprint": "0"}}, "fingerprint"),
        ({"name": "a", "path": "/nowhere"}, "is no plan"),
        ({"name": "a/b", "plan": good}, "name"),
        ({"name": "text", "plan": good}, "chat content"),
        ({"name": "a"}, "either path or plan"),
    ):
        refused = manage(shared, "POST", json=body)
        assert refused.status_code == 400, refused.text
        assert reason in refused.json()["error"]["message"], refused.text
    assert manage(shared, "POST", json={"name": BASE, "plan": good}).status_code == 409
    assert manage(shared, "DELETE", "/nobody").status_code == 404
    assert manage(shared, "DELETE", f"/{BASE}").status_code == 404
    assert manage(shared, "POST", content=b"{" * 5_000_000).status_code == 413
    for headers in ({}, {ADMIN_HEADER: "sk-other"}, {"Authorization": "Bearer sk-admin"}):
        for method in ("GET", "POST"):
            assert manage(shared, method, headers=headers).status_code == 401
    after = manage(shared, "GET").json()
    assert [{**one, "running": 0} for one in after["data"]] == [{**one, "running": 0} for one in before["data"]]


def test_what_no_file_can_hold_is_refused_and_leaves_nothing(shared: Shared) -> None:
    good = json.loads((shared.cuts["law"] / "leap.json").read_text())
    json_type = {**ADMIN, "Content-Type": "application/json"}

    def names() -> set[str]:
        return {one["name"] for one in manage(shared, "GET").json()["data"]}

    before = names()
    for broken in ({"made_by": {"by": "\ud800"}}, {"base_model": {**good["base_model"], "id": "\ud800"}}):
        content = json.dumps({"name": "kept", "plan": {**good, **broken}}).encode()
        assert manage(shared, "POST", content=content, headers=json_type).status_code == 400
    # A folder in the file's place: it cannot be written.
    shared.state.unlink(missing_ok=True)
    shared.state.mkdir()
    body = {"name": "kept", "plan": {**good, "made_by": {}}}
    assert manage(shared, "POST", json=body).status_code == 507
    assert names() == before
    shared.state.rmdir()
    assert manage(shared, "POST", json=body).status_code == 201
    assert "kept" in [one["name"] for one in json.loads(shared.state.read_text())["specialists"]]
    shared.state.unlink()
    shared.state.mkdir()
    assert manage(shared, "DELETE", "/kept").status_code == 507
    assert names() == {*before, "kept"} and ask(shared, "kept", SHORT).status_code == 200
    shared.state.rmdir()
    assert manage(shared, "DELETE", "/kept").json() == {"name": "kept", "state": "unloaded"}
    assert names() == before


def test_answers_and_speed_side_by_side(shared: Shared, capsys: pytest.CaptureFixture[str]) -> None:
    ask_for = ["--models", "base,math,code", "--prompt", SHORT, "--max-tokens", "6", "--rounds", "2", "--completion"]
    assert main(["compare", shared.server.url, *ask_for, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    for row, name in zip(rows, (BASE, "math", "code"), strict=True):
        said = ask(shared, name, SHORT, max_tokens=6, ignore_eos=False).json()
        assert (row["model"], row["text"]) == (name, said["choices"][0]["text"])
        assert (row["prompt_tokens"], row["completion_tokens"]) == (len(SHORT), said["usage"]["completion_tokens"])
        assert 0 < row["ttft_ms"] <= row["e2el_ms"]
    assert main(["compare", f"{shared.server.url}/v1", "--models", "maths", "--prompt", "a"]) == 1
    assert "serves no 'maths', but base, math, code, law, tuned" in capsys.readouterr().err
    assert main(["compare", "http://127.0.0.1:1", "--models", "a", "--prompt", "a"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_eval_asks_the_specialist(shared: Shared, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"text": text, "label": "a"} for text in (SHORT, "2 + 2 =", "Z")]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "mine.yaml").write_text(
        "prompt: '{text}'\nanswer: label\nmetric: exact match\nsplits: {test: rows.jsonl}\nstop: []\nmax_tokens: 10\n"
    )
    command = ["eval", shared.server.url, "--task", str(tmp_path / "mine.yaml"), "-o", str(tmp_path / "out.json")]

    def evaluated(name: str) -> list[Any]:
        assert main([*command, "--model", name, "--json"]) == 0, capsys.readouterr().err
        capsys.readouterr()
        (task,) = json.loads((tmp_path / "out.json").read_text())["tasks"].values()
        return list(task["per_item"])

    found = {name: evaluated(name) for name in (BASE, "math")}
    for name, items in found.items():
        right = [ask(shared, name, row["text"], ignore_eos=False).json()["choices"][0]["text"] for row in rows]
        assert [item["text"] for item in items] == right
    assert [item["logprob"] for item in found["math"]] != [item["logprob"] for item in found[BASE]]
    assert main(command) == 2
    assert "name one with --model" in capsys.readouterr().err


def test_answers_of_another_plan_of_the_same_name_are_not_taken(shared: Shared) -> None:
    told = list[dict[str, Any]]()
    for like in ("law", "tuned"):
        body = {"name": "guest", "path": str(shared.cuts[like])}
        assert manage(shared, "POST", json=body).status_code == 201
        endpoint = Endpoint(shared.server.url, "guest")
        told += endpoint.identity["specialist"]
        endpoint.close()
        assert manage(shared, "DELETE", "/guest").status_code == 200
    assert [one["fingerprint"] for one in told] == [
        Plan.load(shared.cuts[like] / "leap.json").fingerprint for like in ("law", "tuned")
    ]
    head = (shared.cuts["tuned"] / "router_head.safetensors").read_bytes()
    assert [one["router_head"] for one in told] == [None, hashlib.sha256(head).hexdigest()]


def check_quiet(shared: Shared) -> None:
    """Nothing runs, nothing is left behind."""
    deadline = time.monotonic() + 60
    running = "vllm:num_requests_running{"
    while time.monotonic() < deadline:
        lines = httpx.get(f"{shared.server.url}/metrics", timeout=30).text.splitlines()
        if all(
            line.endswith(" 0.0") for line in lines if line.startswith((running, "leap:specialist_requests_running"))
        ):
            break
        time.sleep(0.2)
    else:
        pytest.fail("requests are still counted as running")
    assert not [line for line in lines if "guest" in line]
    assert [one["name"] for one in manage(shared, "GET").json()["data"]] == list(shared.cuts)
    assert json.loads(shared.state.read_text())["specialists"] == []


def test_a_little_of_everything_at_once(shared: Shared) -> None:
    storm = rage(shared, requests=60, concurrency=16)
    assert not storm.wrong, storm.wrong[:5]
    assert len(storm.done) == 8, "every kind should have been drawn"
    check_quiet(shared)


@pytest.mark.slow
def test_two_thousand_of_everything_at_once(shared: Shared) -> None:
    rage(shared, requests=600, concurrency=32, seed=1)
    warm = resident_mib(shared.server.pid)
    storm = rage(shared, requests=2000, concurrency=32, seed=2)
    assert storm.done.total() == 2000 and not storm.wrong, storm.wrong[:5]
    check_quiet(shared)
    # With all of oneDNN's cache, 1,024 primitives, it grew by 130 MiB.
    grown = resident_mib(shared.server.pid) - warm
    assert grown < 40, f"{grown:.0f} MiB more than after 600 requests"


@pytest.mark.slow
def test_what_was_loaded_is_there_after_a_kill_and_a_restart(tmp_path: Path) -> None:
    model, cuts = made(tmp_path)
    state = tmp_path / "state.json"
    flags = ["--name", BASE, "--dtype", "float32", "--api-key", "sk-client", "--state", str(state)]
    env, keys = {**SERVER_ENV, "LEAP_ADMIN_KEY": "sk-admin"}, {"Authorization": "Bearer sk-client"}

    def said(server: Server, name: str) -> str:
        body = {"model": name, "prompt": LONG, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True}
        answered = httpx.post(f"{server.url}/v1/completions", json=body, headers=keys, timeout=300)
        return str(answered.raise_for_status().json()["choices"][0]["text"])

    with Server(model, [*flags, f"--specialist=given={cuts['law']}"], env) as first:
        url = f"{first.url}/v1/leap/specialists"
        for name, like in (("math", "math"), ("tuned", "tuned"), ("given-2", "law")):
            body = {"name": name, "path": str(cuts[like])}
            # The admin key opens nothing without the API key, which vLLM asks for on all of /v1.
            assert httpx.post(url, json=body, headers=ADMIN, timeout=60).status_code == 401
            assert httpx.post(url, json=body, headers=keys, timeout=60).status_code == 401
            assert httpx.post(url, json=body, headers={**keys, **ADMIN}, timeout=60).status_code == 201
        assert httpx.delete(f"{url}/given-2", headers={**keys, **ADMIN}, timeout=60).status_code == 200
        right = {name: said(first, name) for name in (BASE, "given", "math", "tuned")}
        assert len(set(right.values())) == len(right)
        first.stop(signal.SIGKILL)
    with Server(model, flags, env) as second:
        listed = httpx.get(f"{second.url}/v1/models", headers=keys, timeout=60).json()["data"]
        assert [model["id"] for model in listed] == [BASE, "math", "tuned"]
        assert {name: said(second, name) for name in (BASE, "math", "tuned")} == {
            name: text for name, text in right.items() if name != "given"
        }
    # The command line's math comes before the file's, which stays there.
    with Server(model, [*flags, f"--specialist=math={cuts['law']}"], env) as third:
        assert said(third, "math") == right["given"]
        url = f"{third.url}/v1/leap/specialists/tuned"
        assert httpx.delete(url, headers={**keys, **ADMIN}, timeout=60).status_code == 200
    assert [one["name"] for one in json.loads(state.read_text())["specialists"]] == ["math"]
    with pytest.raises(LeapError, match="--admin-key: is the API key"):
        Server(model, flags, {**env, "LEAP_ADMIN_KEY": "sk-client"})
    with pytest.raises(LeapError, match="--enable-lora: goes with no specialists"):
        Server(model, [*flags, "--", "--enable-lora"], env)
