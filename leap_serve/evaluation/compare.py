"""The same prompts put to several models of one server, by turns: what each answers, and how fast."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import httpx

from leap_serve.errors import LeapError, UsageError

ROOT = "base"
"""Means the served model itself, where nothing bears that name."""


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer and its times, as the client saw them.

    Args:
        ttft_ms: until the first text.
        tpot_ms: per token after the first; None for a single token.
        e2el_ms: until the end.
    """

    text: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    tpot_ms: float | None
    e2el_ms: float


@dataclass(frozen=True, slots=True)
class Compared:
    """A model's answer to a prompt, the first of ``rounds``, with the medians of their times."""

    prompt: str
    model: str
    rounds: int
    answer: Answer

    def to_json(self) -> dict[str, Any]:
        """Return a flat JSON object."""
        return {"prompt": self.prompt, "model": self.model, "rounds": self.rounds, **asdict(self.answer)}


@dataclass(frozen=True, slots=True)
class Asking:
    """How to ask: as a chat or as a plain completion, how much, and with what key."""

    max_tokens: int = 64
    temperature: float = 0.0
    chat: bool = True
    api_key: str | None = None
    timeout_s: float = 300.0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise UsageError("--max-tokens", f"is {self.max_tokens}", "give 1 or more")
        if not 0.0 <= self.temperature <= 2.0:
            raise UsageError("--temperature", f"is {self.temperature}", "give a number between 0 and 2")


def compare(url: str, models: Sequence[str], prompts: Sequence[str], asking: Asking, rounds: int = 3) -> list[Compared]:
    """Put every prompt to every model, one at a time, the order turned round by round.

    Args:
        url: of an OpenAI-compatible server, with or without /v1.
        models: served names; ``base`` is the one without a parent.
        prompts: texts.
        asking: see Asking.
        rounds: how often; a warm-up of one token per model is not counted.

    Raises LeapError where the server cannot be reached, refuses, or serves no such model.
    """
    if rounds < 1 or not models or not prompts:
        raise UsageError(
            "--rounds", f"{rounds} of {len(models)} models, {len(prompts)} prompts", "give 1 or more of each"
        )
    if not (asking.api_key or "").isascii():
        raise UsageError("--api-key", "holds letters that no header can", "give the server's key")
    headers = {"Authorization": f"Bearer {asking.api_key}"} if asking.api_key else {}
    root = url.rstrip("/").removesuffix("/v1")
    with _as_leap_errors(root):
        connection = httpx.Client(base_url=root, headers=headers, timeout=asking.timeout_s)
    with connection as client:
        served = {name: _served(client, name) for name in models}
        for name in served.values():
            _ask(client, name, prompts[0], Asking(1, 0.0, asking.chat))
        rows = []
        for prompt in prompts:
            answers: dict[str, list[Answer]] = {name: [] for name in models}
            for number in range(rounds):
                for name in models if number % 2 == 0 else models[::-1]:
                    answers[name].append(_ask(client, served[name], prompt, asking))
            rows += [Compared(prompt, name, rounds, _typical(found)) for name, found in answers.items()]
    return rows


def _typical(answers: Sequence[Answer]) -> Answer:
    first = answers[0]
    tpot = [one.tpot_ms for one in answers if one.tpot_ms is not None]
    return Answer(
        first.text, first.finish_reason, first.prompt_tokens, first.completion_tokens,
        median(one.ttft_ms for one in answers), median(tpot) if tpot else None,
        median(one.e2el_ms for one in answers),
    )  # fmt: skip


def _served(client: httpx.Client, name: str) -> str:
    """Return the name to ask for; raises LeapError with the names there are."""
    with _as_leap_errors(str(client.base_url)):
        cards = _checked(client.get("/v1/models")).json()["data"]
        names = [str(card["id"]) for card in cards]
        roots = [str(card["id"]) for card in cards if not card.get("parent")]
    if name in names:
        return name
    if name == ROOT and roots:
        return roots[0]
    raise LeapError(str(client.base_url), f"serves no {name!r}, but {', '.join(names)}", "choose among these")


def _ask(client: httpx.Client, model: str, prompt: str, asking: Asking) -> Answer:
    """Stream one answer and time it."""
    ask: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}]} if asking.chat else {"prompt": prompt}
    body = {
        "model": model, "max_tokens": asking.max_tokens, "temperature": asking.temperature, "stream": True,
        "stream_options": {"include_usage": True}, **ask,
    }  # fmt: skip
    text, reason, usage, first = "", "", {"prompt_tokens": 0, "completion_tokens": 0}, None
    began = time.perf_counter()
    path = "/v1/chat/completions" if asking.chat else "/v1/completions"
    with _as_leap_errors(str(client.base_url)), client.stream("POST", path, json=body) as answer:
        if answer.is_error:
            answer.read()
        for event in _events(_checked(answer)):
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                piece = (choice["delta"].get("content") if asking.chat else choice["text"]) or ""
                if piece and first is None:
                    first = time.perf_counter()
                text, reason = text + piece, choice.get("finish_reason") or reason
    ended, tokens = time.perf_counter(), int(usage["completion_tokens"])
    first = ended if first is None else first
    tpot = 1000 * (ended - first) / (tokens - 1) if tokens > 1 else None
    return Answer(
        text, reason, int(usage["prompt_tokens"]), tokens, 1000 * (first - began), tpot, 1000 * (ended - began)
    )


def _events(answer: httpx.Response) -> Iterator[Mapping[str, Any]]:
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise LeapError(str(answer.url), f"broke off: {event['error']['message']}", "see the server's log")
            yield event


def _checked(answer: httpx.Response) -> httpx.Response:
    if answer.is_error:
        raise LeapError(str(answer.url), f"answers {answer.status_code}: {_reason(answer)}", "correct what it names")
    return answer


def _reason(answer: httpx.Response) -> str:
    try:
        stated = answer.json()
        return str(stated["error"]["message"] if isinstance(stated["error"], dict) else stated["error"])
    except (ValueError, KeyError, TypeError):
        return answer.text[:200].strip() or answer.reason_phrase


@contextlib.contextmanager
def _as_leap_errors(where: str) -> Iterator[None]:
    """Turn what a network does into a sentence, and URLs that are none, and answers that are no OpenAI server's."""
    try:
        yield
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        what = f"cannot be reached ({type(error).__name__}: {error})"
        raise LeapError(where, what, "check the URL, and that the server runs") from None
    except (ValueError, KeyError, TypeError):
        what = "does not answer like an OpenAI-compatible server"
        raise LeapError(where, what, "give the URL that leap serve printed") from None
