"""Specialists in a running server: each has a slot of the engine, and its requests come in under its name.

vLLM lets a request choose a LoRA adapter by its ``model``; a specialist takes that way up to the engine's client.
There :class:`Client` sends the request on as one for the full model that names its specialist's slot, and a
cache salt that nobody else knows, so that no request finds keys and values which another's experts made.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import secrets
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leap_serve.errors import LeapError
from leap_serve.server.metrics import Counters
from leap_serve.server.specialists import MAX_SPECIALISTS, Base, Specialist, write_state
from leap_serve.server.vllm_parts import one_line

OURS = "leap_"
"""Prefix of our keys in a request's extra_args (over HTTP: vllm_xargs), which no client may set."""
REQUEST_KEY = "leap_plan"
"""Key of the slot (leap_vllm.subsets)."""


class TakenError(LeapError):
    """A name or every slot is in use."""


class NotLoadedError(LeapError):
    """No specialist of that name is loaded."""


class NotKeptError(LeapError):
    """The state file cannot be written; nothing was changed."""


@dataclass(slots=True)
class Loaded:
    """A specialist in its slot.

    Args:
        specialist: without the bytes of its head.
        slot: of the engine, from 1.
        nbytes: what it takes there: masks, and router head if there is one.
        kept: the state file holds it.
        salt: of its part of the prefix cache; new at every load, so that nothing of an earlier one is found.
        running: requests that the engine has.
        idle: set while there are none.
        leaving: the task that frees the slot once there are none; no request is let in any more.
    """

    specialist: Specialist
    slot: int
    nbytes: int
    kept: bool
    salt: str = field(default_factory=lambda: secrets.token_hex(16))
    loaded_at: str = field(default_factory=lambda: datetime.now(UTC).isoformat(timespec="seconds"))
    running: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    leaving: asyncio.Task[None] | None = None


class Specialists:
    """What is loaded, and how it gets in and out while requests run.

    Args:
        engine: vLLM's engine client, whose workers are LeapWorkers.
        base: the model that is served.
        names: under which the model itself is served.
        adapter: vLLM's LoRARequest.
        counters: of requests and tokens.
        state: file that holds what was loaded at run time, or None.
    """

    def __init__(
        self,
        engine: Any,
        base: Base,
        names: Sequence[str],
        adapter: Any,
        counters: Counters,
        state: Path | None = None,
    ) -> None:
        self._engine, self.base, self._names, self._adapter, self._state = engine, base, names, adapter, state
        self._loaded: dict[str, Loaded] = {}
        self._published: dict[str, Any] = {}
        self._hidden: list[Specialist] = []
        self._lock = asyncio.Lock()
        self.counters = counters
        self.client = Client(engine, self)

    async def open(self, given: Sequence[Specialist], kept: Sequence[Specialist]) -> None:
        """Hook the routers and load the specialists of the command line and of the state file; before any request.

        One of the state file whose name the command line gives to another stays in the file for a start without that.
        """
        await self._rpc(str(self.base.checkpoint.folder), "leap_load_plans", [])
        for specialist in given:
            await self._load(specialist, kept=False)
        for specialist in kept:
            if specialist.name in self._loaded:
                self._hidden.append(specialist)
            else:
                await self._load(specialist, kept=True, write=False)

    def publish(self, models: Any) -> None:
        """Let requests choose: ``models`` is vLLM's list of served models, whose adapters the specialists become."""
        models.lora_requests.update(self._published)
        self._published = models.lora_requests

    def get(self, name: str) -> Loaded | None:
        """Return a specialist that takes requests."""
        loaded = self._loaded.get(name)
        return loaded if loaded is not None and loaded.leaving is None else None

    def all(self) -> list[Loaded]:
        """Return every specialist that has a slot, those that are leaving included."""
        return list(self._loaded.values())

    def name_of(self, adapter: Any) -> str:
        """Return the name under which a request is counted: its specialist's or the model's."""
        return str(adapter.lora_name) if adapter is not None else self._names[0]

    async def load(self, specialist: Specialist) -> Loaded:
        """Put a specialist into a free slot and the state file. Raises LeapError, and then nothing has changed."""
        # A client that hangs up does not leave half of it undone.
        return await asyncio.shield(asyncio.create_task(self._load(specialist, kept=True)))

    async def unload(self, name: str, wait_s: float) -> bool:
        """Let no new request in, wait for the running ones, free the slot; whether that was done within ``wait_s``.

        What is not done by then goes on by itself. Raises NotLoadedError and NotKeptError.
        """
        leaving = await asyncio.shield(asyncio.create_task(self._leave(name)))
        done, _ = await asyncio.wait([leaving], timeout=wait_s)
        for task in done:
            task.result()
        return bool(done)

    async def _load(self, specialist: Specialist, *, kept: bool, write: bool = True) -> Loaded:
        name, head = specialist.name, specialist.head
        async with self._lock:
            if name in self._names or name in self._loaded:
                leaving = "; its last requests are being answered" if self.get(name) is None else ""
                raise TakenError(
                    name, f"is the name of a model that is served{leaving}", "choose another, or unload it"
                )
            free = set(range(1, MAX_SPECIALISTS + 1)) - {one.slot for one in self._loaded.values()}
            if not free:
                raise TakenError(name, f"finds all {MAX_SPECIALISTS} slots in use", "unload another specialist")
            slot = min(free)
            plan = {
                index: (list(layer.retained), layer.top_k, layer.temperature)
                for index, layer in specialist.plan.layers.items()
            }
            sizes = await self._rpc(name, "leap_put_plan", slot, plan, head.content if head else None)
            light = replace(specialist, head=replace(head, content=b"") if head else None)
            loaded = Loaded(light, slot, max(sizes), kept)
            loaded.idle.set()
            if kept and write:
                try:
                    await self._keep([*self._loaded.values(), loaded])
                except NotKeptError:
                    await self._rpc(name, "leap_clear_plan", slot)
                    raise
            self._loaded[name] = loaded
            self._published[name] = self._adapter(
                lora_name=name, lora_int_id=slot, lora_path=f"leap:{specialist.plan.fingerprint}",
                base_model_name=self._names[0],
            )  # fmt: skip
            return loaded

    async def _leave(self, name: str) -> asyncio.Task[None]:
        async with self._lock:
            loaded = self._loaded.get(name)
            if loaded is None:
                raise NotLoadedError(name, "is no specialist that is loaded", "see GET /v1/leap/specialists")
            if loaded.leaving is None:
                if loaded.kept:
                    await self._keep([one for one in self._loaded.values() if one is not loaded])
                self._published.pop(name, None)
                loaded.leaving = asyncio.create_task(self._free(loaded))
            return loaded.leaving

    async def _free(self, loaded: Loaded) -> None:
        await loaded.idle.wait()
        name = loaded.specialist.name
        await self._rpc(name, "leap_clear_plan", loaded.slot)
        del self._loaded[name]
        self.counters.forget(name)

    async def _keep(self, loaded: Sequence[Loaded]) -> None:
        """Write the state file; specialists of the command line are not in it, nor those that are leaving."""
        if self._state is None:
            return
        kept = [*self._hidden, *(one.specialist for one in loaded if one.kept and one.leaving is None)]
        try:
            await asyncio.to_thread(write_state, self._state, self.base, kept)
        except LeapError as error:
            raise NotKeptError(error.where, error.what, error.remedy) from None

    async def _rpc(self, where: str, method: str, *args: Any) -> list[Any]:
        try:
            return list(await self._engine.collective_rpc(method, args=args))
        except Exception as error:
            # vLLM sends the text of a worker's exception, not the exception.
            raise LeapError(where, f"the engine refuses it: {one_line(error)}", "see the server's log") from None


class Client:
    """vLLM's engine client, to which an adapter is a specialist. All but ``generate`` is the engine's own."""

    def __init__(self, engine: Any, specialists: Specialists) -> None:
        self._engine, self._specialists = engine, specialists

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def generate(
        self, prompt: Any, sampling_params: Any, request_id: str, *, lora_request: Any = None, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """Answer as the engine's does. Raises ValueError, which clients see as status 400, for what only we may set."""
        extra = sampling_params.extra_args or {}
        forged = [key for key in extra if key.startswith(OURS)]
        if forged:
            raise ValueError(f"vllm_xargs: {forged[0]} is not for clients to set; choose a specialist by `model`")
        loaded = None
        if lora_request is not None:
            loaded = self._specialists.get(lora_request.lora_name)
            if loaded is None or not isinstance(prompt, dict):
                raise ValueError(f"The model `{lora_request.lora_name}` is not served any more, or not this way")
            sampling_params = copy.copy(sampling_params)  # beam search asks with the same ones again
            sampling_params.extra_args = {**extra, REQUEST_KEY: loaded.slot}
            prompt = {**prompt, "cache_salt": loaded.salt + (prompt.get("cache_salt") or "")}
        name = self._specialists.name_of(lora_request)
        return self._answer(name, loaded, self._engine.generate(prompt, sampling_params, request_id, **more))

    async def _answer(
        self, name: str, loaded: Loaded | None, answer: AsyncGenerator[Any, None]
    ) -> AsyncGenerator[Any, None]:
        if loaded is not None:
            if loaded.leaving is not None:
                raise ValueError(f"The model `{name}` is not served any more")
            loaded.running += 1
            loaded.idle.clear()
        counted = self._specialists.counters.begin(name)
        try:
            # Closing aborts what is unfinished, before a slot can be taken away.
            async with contextlib.aclosing(answer):
                async for output in answer:
                    counted.see(output)
                    yield output
        finally:
            counted.end()
            if loaded is not None:
                loaded.running -= 1
                if not loaded.running:
                    loaded.idle.set()
