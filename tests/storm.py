"""Everything at once to a server with specialists: right questions and wrong ones, hang-ups, loads and unloads.

Each answer is checked against what its specialist says when it is asked alone. Nothing here is timed.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from processes import children_of
from sharing import ADMIN, BASE, LONG, SHORT, TOKENS, Shared, ask

PROMPTS = (SHORT, LONG, LONG + "Q", "2 + 2 =", "Z")
MALFORMED = (
    b"",
    b"{",
    b"[]",
    b'{"model": 7, "prompt": []}',
    b'{"model": "math", "prompt": "a", "max_tokens": -1}',
    b"\xff",
)
DEAL = {"whole": 30, "stream": 30, "hang up": 15, "guest": 10, "unknown": 4, "malformed": 4, "oversize": 4, "forged": 3}
"""How often of a hundred each kind is drawn."""


@dataclass
class Storm:
    """One run: ``done`` counts what was asked, ``wrong`` holds what should not have come back.

    ``rude`` is the client that hangs up: what cancelling does to its own connections is no fault of the server's.
    """

    shared: Shared
    client: httpx.AsyncClient
    rude: httpx.AsyncClient
    draw: random.Random
    right: dict[tuple[str, str], str]
    done: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    guests: int = 0

    async def one(self, kind: str) -> None:
        """Ask one thing of a kind."""
        kinds: dict[str, Callable[[], Awaitable[None]]] = {
            "whole": self._whole, "stream": self._stream, "hang up": self._hang_up, "guest": self._guest,
            "unknown": self._unknown, "malformed": self._malformed, "oversize": self._oversize, "forged": self._forged,
        }  # fmt: skip
        try:
            await kinds[kind]()
        except httpx.HTTPError as error:
            self.wrong.append(f"{kind}: {type(error).__name__}: {error}")
        self.done[kind] += 1

    def _expect(self, what: str, found: object, expected: object) -> None:
        if found != expected:
            self.wrong.append(f"{what}: {found!r}, not {expected!r}")

    def _question(self, **more: Any) -> tuple[str, str, dict[str, Any]]:
        name, prompt = self.draw.choice([BASE, *self.shared.cuts]), self.draw.choice(PROMPTS)
        return name, prompt, _body(name, prompt, **more)

    async def _whole(self) -> None:
        name, prompt, body = self._question()
        await self._check_answer(name, name, prompt, body)

    async def _check_answer(self, name: str, like: str, prompt: str, body: dict[str, Any]) -> None:
        found = await self.client.post("/v1/completions", json=body)
        self._expect(f"{name} status", found.status_code, 200)
        if found.status_code == 200:
            self._expect(f"{name} to {prompt[:20]!r}", found.json()["choices"][0]["text"], self.right[like, prompt])
            self._expect("usage", found.json()["usage"]["completion_tokens"], TOKENS)

    async def _stream(self) -> None:
        name, prompt, body = self._question(stream=True)
        text = ""
        async with self.client.stream("POST", "/v1/completions", json=body) as answer:
            self._expect(f"{name} status", answer.status_code, 200)
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
        self._expect(f"{name} streams to {prompt[:20]!r}", text, self.right[name, prompt])

    async def _hang_up(self) -> None:
        _, _, body = self._question(stream=self.draw.random() < 0.5, max_tokens=100)
        try:
            async with asyncio.timeout(self.draw.random() * 0.5):
                async with self.rude.stream("POST", "/v1/completions", json=body) as answer:
                    async for _ in answer.aiter_lines():
                        if self.draw.random() < 0.3:
                            return
        except TimeoutError:
            pass

    async def _guest(self) -> None:
        """Load one of the cuts under a new name, ask it, and unload it while a stranger may still be asking."""
        self.guests += 1
        name, like, prompt = f"guest-{self.guests}", self.draw.choice(list(self.shared.cuts)), self.draw.choice(PROMPTS)
        body = {"name": name, "path": str(self.shared.cuts[like])}
        loaded = await self.client.post("/v1/leap/specialists", json=body, headers=ADMIN)
        self._expect(f"{name} loads", loaded.status_code, 201)
        await self._check_answer(name, like, prompt, _body(name, prompt))
        url = f"/v1/leap/specialists/{name}"
        asking = asyncio.create_task(self.client.post("/v1/completions", json=_body(name, prompt)))
        gone = await self.client.delete(url, headers=ADMIN)
        self._expect(f"{name} unloads", (gone.status_code, gone.json().get("state")), (200, "unloaded"))
        last = await asking
        if last.status_code == 200:
            self._expect(f"{name}'s last answer", last.json()["choices"][0]["text"], self.right[like, prompt])
        else:
            self._expect(f"{name}'s last status", last.status_code in (400, 404), True)
        after = await self.client.post("/v1/completions", json=_body(name, prompt))
        self._expect(f"{name} afterwards", after.status_code, 404)

    async def _unknown(self) -> None:
        found = await self.client.post("/v1/completions", json=_body("maths", SHORT))
        self._expect("unknown model", found.status_code, 404)

    async def _malformed(self) -> None:
        content, headers = self.draw.choice(MALFORMED), {"Content-Type": "application/json"}
        found = await self.client.post("/v1/completions", content=content, headers=headers)
        self._expect(f"malformed {content!r}", found.status_code, 400)
        refused = await self.client.post("/v1/leap/specialists", content=content, headers={**headers, **ADMIN})
        self._expect(f"malformed load {content!r}", refused.status_code, 400)

    async def _oversize(self) -> None:
        name, _, body = self._question()
        found = await self.client.post("/v1/completions", json={**body, "prompt": "x" * self.draw.choice((256, 5000))})
        self._expect(f"oversize for {name}", found.status_code, 400)

    async def _forged(self) -> None:
        name, _, body = self._question(vllm_xargs={"leap_plan": self.draw.randrange(70)})
        found = await self.client.post("/v1/completions", json=body)
        self._expect(f"forged for {name}", found.status_code, 400)


def _body(name: str, prompt: str, **more: Any) -> dict[str, Any]:
    return {"model": name, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}


def rage(shared: Shared, requests: int, concurrency: int, seed: int = 0) -> Storm:
    """Ask ``requests`` things, ``concurrency`` at a time."""
    right = {
        (name, prompt): ask(shared, name, prompt).json()["choices"][0]["text"]
        for name in (BASE, *shared.cuts)
        for prompt in PROMPTS
    }

    async def run() -> Storm:
        how: dict[str, Any] = dict(
            base_url=shared.server.url, timeout=300, limits=httpx.Limits(max_connections=2 * concurrency)
        )
        async with httpx.AsyncClient(**how) as client, httpx.AsyncClient(**how) as rude:
            storm = Storm(shared, client, rude, random.Random(seed), right)
            # Dealt beforehand, each kind at least once: what is drawn later depends on who is answered first.
            deal = [*DEAL, *storm.draw.choices(list(DEAL), list(DEAL.values()), k=requests - len(DEAL))]
            storm.draw.shuffle(deal)
            left = iter(deal)

            async def work() -> None:
                for kind in left:
                    await storm.one(kind)

            await asyncio.gather(*(work() for _ in range(concurrency)))
            return storm

    return asyncio.run(run())


def resident_mib(pid: int) -> float:
    """Memory of a server and its engine that is theirs alone, in MiB."""
    total = 0
    for one in {pid, *children_of(pid)}:
        for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
            if line.startswith(("Private_Clean:", "Private_Dirty:")):
                total += int(line.split()[1])
    return total / 1024
