"""A model behind any OpenAI-compatible endpoint: completions or chat, and likelihoods where the server tells them."""

from __future__ import annotations

import os
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from queue import SimpleQueue
from typing import Any, TypeVar

import httpx

from leap_serve.encoding import Encoded
from leap_serve.engine import Completion, NoLogprobsError, Progress, Score
from leap_serve.errors import LeapError, UsageError
from leap_serve.tasks.base import Item

KEY = "OPENAI_API_KEY"
TRIES = 5
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 30.0
PASSING = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same question is asked again."""
STOPS = 4
"""Stop strings that OpenAI's API takes; further ones are applied here."""
Outcome = TypeVar("Outcome")


def is_url(model: str) -> bool:
    """Whether a model argument names an endpoint."""
    return re.match(r"https?://", model) is not None


class Endpoint:
    """The Model protocol over HTTP; ``concurrency`` requests are under way at a time, close() ends the connections.

    Args:
        url: the server's address, with or without ``/v1``.
        model: name of the model; None takes the only one that the server lists.
        chat: ask through /chat/completions, the prompt as the user's message; such an endpoint tells no likelihoods.
        concurrency: requests at a time.
        timeout_s: for one answer.
        first_wait_s: pause before a question is asked the second time; it doubles from try to try (five in all, or
            what the server's Retry-After says, up to 30 s).

    The key comes from the environment variable OPENAI_API_KEY. Raises LeapError where the server cannot be reached,
    refuses the key, or does not have the model.
    """

    name = "endpoint"

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        chat: bool = False,
        concurrency: int = 16,
        timeout_s: float = 600,
        first_wait_s: float = FIRST_WAIT_S,
    ) -> None:
        if concurrency < 1 or not timeout_s > 0:
            what = f"are {concurrency} and {timeout_s:g}"
            raise UsageError("--concurrency, --timeout", what, "give 1 request or more, and more than 0 seconds")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.chat, self._concurrency, self._first_wait_s = chat, concurrency, first_wait_s
        key = os.environ.get(KEY)
        try:
            self._client = httpx.Client(
                base_url=self.url, timeout=httpx.Timeout(timeout_s, connect=10),
                headers={"Authorization": f"Bearer {key}"} if key else {},
                limits=httpx.Limits(max_connections=concurrency),
            )  # fmt: skip
        except (httpx.InvalidURL, ValueError) as error:
            raise UsageError(url, f"is no address ({error})", "give one such as http://127.0.0.1:8000") from None
        try:
            self.model = model or self._only_model()
        except BaseException:
            self.close()
            raise

    @property
    def identity(self) -> dict[str, Any]:
        """Who answers: address, model name, and of ``leap serve`` fingerprint and tuning of the cut or specialist."""
        told: dict[str, Any] = {"url": self.url, "model": self.model, "chat": self.chat}
        if found := self._leap():
            fields = ("fingerprint", "tuned", "provenance", "served_by", "end_of_text")
            told["leap"] = [found.get(field) for field in fields]
            # Another plan may take a specialist's name while the server runs.
            told["specialist"] = [one for one in found.get("specialists", ()) if one["name"] == self.model]
        return told

    @cached_property
    def end_of_text(self) -> list[int] | None:
        """The token that ends a text, or none of them, as ``leap serve`` tells it; None where the server does not."""
        found = self._leap().get("end_of_text")
        return found if isinstance(found, list) and all(isinstance(token, int) for token in found) else None

    def tokenize(self, texts: Sequence[str], *, prefix: bool = False) -> list[list[int]]:
        """Encode texts by the server's /tokenize. Raises NoLogprobsError where it has none."""
        before = self._prefix if prefix else []
        return [before + ids for ids in self._each(texts, self._tokens)]

    def generate(
        self,
        prompts: Sequence[str],
        max_tokens: int,
        stop: Sequence[str] = (),
        temperature: float = 0.0,
        seed: int | None = None,
        progress: Progress | None = None,
        each: Callable[[int, Completion], None] | None = None,
    ) -> list[Completion]:
        """Complete each prompt; token ids are not told."""
        how: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
        how |= {"stop": list(stop[:STOPS])} if stop else {}
        how |= {} if seed is None else {"seed": seed}

        def ask(prompt: str) -> Completion:
            if self.chat:
                asked = {"messages": [{"role": "user", "content": prompt}]}
                choice = self._choice("/v1/chat/completions", {**asked, **how})
                text = (choice.get("message") or {}).get("content") or ""
            else:
                choice = self._choice("/v1/completions", {"prompt": prompt, **how})
                text = choice.get("text")
            if not isinstance(text, str):
                raise LeapError(self.url, "answered without a text", "give the address of an OpenAI-compatible server")
            ends = [place for place in map(text.find, stop) if place >= 0]
            # A lone surrogate could not be written down.
            text = text[: min(ends, default=len(text))].encode("utf-8", "replace").decode()
            return Completion(text, (), "stop" if ends else str(choice.get("finish_reason")))

        return self._each(prompts, ask, progress, each)

    def score(
        self,
        items: Sequence[Item],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each item's answer after its prompt, with its end where ``end_of_text`` is known. Raises NoLogprobsError."""
        self._check_logprobs()
        end = self.end_of_text or []
        prompts = self.tokenize([item.prompt for item in items], prefix=True)
        answers = self.tokenize([item.answer for item in items])
        pairs = [Encoded(prompt, answer + end) for prompt, answer in zip(prompts, answers, strict=True)]
        return self.score_ids(pairs, progress, each)

    def score_ids(
        self,
        sequences: Sequence[Encoded],
        progress: Progress | None = None,
        each: Callable[[int, Score], None] | None = None,
    ) -> list[Score]:
        """Score each answer's token ids after the prompt's. Raises NoLogprobsError."""
        self._check_logprobs()
        return self._each(sequences, self._score, progress, each)

    def close(self) -> None:
        """End the connections."""
        self._client.close()

    def _only_model(self) -> str:
        told = self._request("GET", "/v1/models")
        names = [str(entry.get("id")) for entry in told.get("data") or [] if isinstance(entry, dict)]
        if len(names) != 1:
            listed = ", ".join(names[:8]) or "none"
            raise UsageError(self.url, f"lists {len(names)} models ({listed})", "name one with --model")
        return names[0]

    def _leap(self) -> dict[str, Any]:
        """What ``leap serve`` says of its model; of another server nothing is known."""
        try:
            found = self._client.get("/leap").json()
        except (httpx.HTTPError, ValueError):
            return {}
        return found if isinstance(found, dict) and "served_by" in found else {}

    @cached_property
    def _prefix(self) -> list[int]:
        """What the server's tokenizer puts before a text: its first special tokens."""
        plain, whole = self._tokens("a"), self._tokens("a", special=True)
        return next((whole[:at] for at in range(len(whole)) if whole[at : at + len(plain)] == plain), [])

    def _tokens(self, text: str, special: bool = False) -> list[int]:
        # Nothing is nothing, and some servers refuse it.
        if not text and not special:
            return []
        body = {"model": self.model, "prompt": text, "add_special_tokens": special}
        told = self._request("POST", "/tokenize", body, {404, 405}).get("tokens")
        if not isinstance(told, list) or not all(isinstance(token, int) for token in told):
            raise NoLogprobsError(self.url, "the server has no /tokenize", "use vLLM or leap serve, or no loss")
        return told

    @cached_property
    def _no_logprobs(self) -> str:
        """Why this server cannot score a text, or nothing; asked once, with two tokens."""
        if self.chat:
            return "chat endpoints do not tell how likely a text is"
        try:
            ids = (self._tokens("a a") * 2)[:2]
            self._score(Encoded(ids[:1], ids[1:]))
        except LeapError as error:
            return error.what
        return ""

    def _check_logprobs(self) -> None:
        if self._no_logprobs:
            raise NoLogprobsError(
                self.url,
                self._no_logprobs,
                "ask a server that echoes prompts with logprobs, such as vLLM's /v1/completions",
            )

    def _score(self, one: Encoded) -> Score:
        """Let the server echo a sequence with the logprobs of its tokens, and sum those of the answer."""
        ids, first = one.prompt + one.answer, max(1, len(one.prompt))
        if len(ids) <= first:
            return Score(0.0, 0)
        body = {"prompt": ids, "max_tokens": 1, "echo": True, "logprobs": 1, "temperature": 0}
        choice = self._choice("/v1/completions", body)
        told = (choice.get("logprobs") or {}).get("token_logprobs") or []
        wanted = told[first : len(ids)]
        if len(told) < len(ids) or not all(isinstance(value, (int, float)) for value in wanted):
            raise NoLogprobsError(self.url, "the server does not echo a prompt's logprobs", "use vLLM, or no loss")
        return Score(float(sum(wanted)), len(wanted))

    def _choice(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        choices = self._request("POST", path, {"model": self.model, **body}).get("choices")
        if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
            raise LeapError(f"{self.url}{path}", "answered without choices", "is it an OpenAI-compatible server?")
        return choices[0]

    def _request(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        absent: frozenset[int] | set[int] = frozenset(),
    ) -> dict[str, Any]:
        """Ask, a bounded number of times; a status in ``absent`` gives {}. Raises LeapError with the server's words."""
        where = f"{self.url}{path}"
        what = ""
        for number in range(TRIES):
            wait_s = min(self._first_wait_s * 2**number, LONGEST_WAIT_S)
            try:
                response = self._client.request(method, path, json=body)
            except httpx.TransportError as error:
                what = f"cannot be reached ({str(error) or type(error).__name__})"
            else:
                if response.status_code in absent:
                    return {}
                if response.status_code not in PASSING:
                    return self._parsed(response, where)
                what = f"answers {response.status_code} ({_said(response)})"
                wait_s = _retry_after(response, wait_s)
            if number < TRIES - 1:
                time.sleep(wait_s)
        raise LeapError(where, f"{what}, {TRIES} times", "see that the server runs, or lower --concurrency")

    def _parsed(self, response: httpx.Response, where: str) -> dict[str, Any]:
        status = response.status_code
        if status in (401, 403):
            given = "was refused" if os.environ.get(KEY) else "is not set"
            raise LeapError(where, f"answers {status}: {KEY} {given}", f"set {KEY} to a key that the server takes")
        if status == 404:
            raise LeapError(where, f"answers 404 ({_said(response)})", "check the address and --model")
        if status != 200:
            raise LeapError(where, f"answers {status} ({_said(response)})", "correct what it names")
        try:
            told = response.json()
        except ValueError:
            told = None
        if not isinstance(told, dict):
            raise LeapError(where, "answered something else than a JSON object", "is it an OpenAI-compatible server?")
        return told

    def _each(
        self,
        inputs: Sequence[Any],
        ask: Callable[[Any], Outcome],
        progress: Progress | None = None,
        each: Callable[[int, Outcome], None] | None = None,
    ) -> list[Outcome]:
        """Ask for all inputs, ``concurrency`` at a time; after an error or an interrupt nothing more is sent.

        The threads end with the process, so that nobody waits for an answer that is no longer wanted.
        """
        questions, taking, stopped = iter(enumerate(inputs)), threading.Lock(), threading.Event()
        answers: SimpleQueue[tuple[int, Outcome | BaseException]] = SimpleQueue()

        def work() -> None:
            while not stopped.is_set():
                with taking:
                    place, one = next(questions, (-1, None))
                if place < 0:
                    return
                try:
                    answers.put((place, ask(one)))
                except BaseException as error:
                    answers.put((place, error))

        found: dict[int, Outcome] = {}
        for _ in range(min(self._concurrency, len(inputs))):
            threading.Thread(target=work, daemon=True).start()
        try:
            for _ in inputs:
                place, answer = answers.get()
                if isinstance(answer, BaseException):
                    raise answer
                found[place] = answer
                if each is not None:
                    each(place, answer)
                if progress is not None:
                    progress(len(found), len(inputs))
        finally:
            stopped.set()
        return [found[place] for place in range(len(inputs))]


def _said(response: httpx.Response) -> str:
    """The server's own words about an error, in one line."""
    try:
        told = response.json()
        error = told.get("error", told)
        text = error.get("message", error) if isinstance(error, dict) else error
    except (ValueError, AttributeError):
        text = response.text
    return " ".join(str(text).split())[:300]


def _retry_after(response: httpx.Response, otherwise_s: float) -> float:
    """Seconds that the server asks to wait, at most 30."""
    try:
        return min(max(0.0, float(response.headers["retry-after"])), LONGEST_WAIT_S)
    except (KeyError, ValueError):
        return otherwise_s
