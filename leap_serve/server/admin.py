"""Routes that load, list and unload specialists while the server runs. They exist only where an admin key was given."""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from leap_serve.errors import LeapError
from leap_serve.server.slots import Loaded, NotKeptError, NotLoadedError, Specialists, TakenError
from leap_serve.server.specialists import MAX_PLAN_BYTES, NAME, Specialist, check_name, plan_from, read_specialist

ADMIN_HEADER = "X-Leap-Admin-Key"
"""Not Authorization, which holds the API key that vLLM asks for on all of /v1."""
_STATUS: tuple[tuple[type[LeapError], int], ...] = ((TakenError, 409), (NotLoadedError, 404), (NotKeptError, 507))


class LoadRequest(BaseModel):
    """Body of POST /v1/leap/specialists: a name, and either a path on the server or a plan as it stands in plan.json."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=f"^{NAME}$", description="what clients give as `model`")
    path: str | None = Field(
        None, min_length=1, max_length=4096, pattern=r"^[^\x00-\x1f]+$",
        description="a plan.json, a leap.json with the router head beside it, or a folder that holds one",
    )  # fmt: skip
    plan: dict[str, Any] | None = Field(None, description="the content of a plan.json")

    @model_validator(mode="after")
    def one_of_both(self) -> LoadRequest:
        """Refuse neither and both."""
        if (self.path is None) == (self.plan is None):
            raise ValueError("give either path or plan")
        return self


class Card(BaseModel):
    """A specialist as the routes show it."""

    name: str
    fingerprint: str
    retained: dict[int, int] = Field(description="experts per MoE layer")
    top_k: dict[int, int]
    router_head: bool
    state: Literal["ready", "leaving"]
    running: int = Field(description="requests that the engine has")
    bytes: int = Field(description="what it takes in the engine, per worker")
    kept: bool = Field(description="it comes back after a restart with the same --state")
    source: str | None
    loaded_at: str

    @classmethod
    def of(cls, loaded: Loaded) -> Card:
        """Describe one that is loaded."""
        one = loaded.specialist
        return cls(
            name=one.name, fingerprint=one.plan.fingerprint, router_head=one.head is not None,
            retained={index: len(layer.retained) for index, layer in one.plan.layers.items()},
            top_k={index: layer.top_k for index, layer in one.plan.layers.items()},
            state="ready" if loaded.leaving is None else "leaving", running=loaded.running, bytes=loaded.nbytes,
            kept=loaded.kept, source=str(one.source) if one.source else None, loaded_at=loaded.loaded_at,
        )  # fmt: skip


class Cards(BaseModel):
    """Answer of GET /v1/leap/specialists."""

    data: list[Card]


class Unloaded(BaseModel):
    """Answer of DELETE: ``leaving`` while requests still run; the slot is freed when the last of them ends."""

    name: str
    state: Literal["unloaded", "leaving"]


class ErrorInfo(BaseModel):
    """What went wrong, as OpenAI's clients expect it."""

    message: str
    type: str
    param: str | None = None
    code: int


class Refusal(BaseModel):
    """Body of every answer that is no success."""

    error: ErrorInfo


def refusal(status: int, message: str, kind: str = "BadRequestError") -> JSONResponse:
    """Answer with an error that OpenAI's clients understand."""
    # JSON can name characters that UTF-8 cannot hold, and messages quote what was sent.
    message = message.encode(errors="replace").decode()
    body = Refusal(error=ErrorInfo(message=message, type=kind, code=status))
    headers = {"WWW-Authenticate": "Bearer"} if status == 401 else None
    return JSONResponse(body.model_dump(), status, headers)


def guarded(key: str) -> type[APIRoute]:
    """Return a kind of route that reads nothing without the admin key, and no more than a plan's size with it."""
    digest = hashlib.sha256(key.encode()).digest()

    class Guarded(APIRoute):
        def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
            answer = super().get_route_handler()

            async def handle(request: Request) -> Response:
                # Bytes of a header come as Latin-1: so they are what was sent, and a key may be any UTF-8.
                given = hashlib.sha256(request.headers.get(ADMIN_HEADER, "").encode("latin-1")).digest()
                if not secrets.compare_digest(given, digest):
                    return refusal(401, f"send the admin key in {ADMIN_HEADER}", "UnauthorizedError")
                try:
                    return await answer(_limited(request))
                except RequestValidationError as error:
                    wrong = (f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
                    return refusal(400, "; ".join(wrong))
                except HTTPException as error:
                    return refusal(error.status_code, str(error.detail))
                except LeapError as error:
                    status = next((code for kind, code in _STATUS if isinstance(error, kind)), 400)
                    return refusal(status, str(error), type(error).__name__)

            return handle

    return Guarded


def _limited(request: Request) -> Request:
    """The same request, whose body is read up to the limit."""
    left = MAX_PLAN_BYTES

    async def receive() -> Any:
        nonlocal left
        message = await request.receive()
        left -= len(message.get("body", b""))
        if left < 0:
            raise HTTPException(413, f"the body is larger than {MAX_PLAN_BYTES >> 20} MiB")
        return message

    return Request(request.scope, receive)


def admin_router(specialists: Specialists, key: str) -> APIRouter:
    """Return the routes under /v1/leap/specialists."""
    router = APIRouter(prefix="/v1/leap", route_class=guarded(key), tags=["leap"])

    def refusals(*codes: int) -> dict[int | str, dict[str, Any]]:
        # FastAPI would promise 422 for what is answered with 400.
        return {code: {"model": Refusal} for code in (400, 401, 422, *codes)}

    @router.get("/specialists", responses=refusals())
    async def list_specialists() -> Cards:
        """List what has a slot."""
        return Cards(data=[Card.of(one) for one in specialists.all()])

    @router.post("/specialists", status_code=201, responses=refusals(409, 413, 507))
    async def load_specialist(body: LoadRequest) -> Card:
        """Load a specialist; requests may name it as soon as this answers. What is running is untouched."""
        return Card.of(await specialists.load(await asyncio.to_thread(_read, body, specialists)))

    @router.delete("/specialists/{name}", responses={202: {"model": Unloaded}, **refusals(404, 507)})
    async def unload_specialist(
        name: str, response: Response, wait_s: Annotated[float, Query(ge=0, le=600)] = 60.0
    ) -> Unloaded:
        """Unload a specialist: no new requests at once, the slot free when the running ones have ended."""
        done = await specialists.unload(name, wait_s)
        response.status_code = 200 if done else 202
        return Unloaded(name=name, state="unloaded" if done else "leaving")

    return router


def _read(body: LoadRequest, specialists: Specialists) -> Specialist:
    if body.path is not None:
        return read_specialist(body.name, Path(body.path), specialists.base)
    check_name(body.name)
    return Specialist(body.name, plan_from(body.plan, "plan", specialists.base))


def names(specialists: Sequence[Loaded]) -> list[dict[str, Any]]:
    """What GET /leap says of the specialists, which is for every client."""
    return [
        {"name": one.specialist.name, "fingerprint": one.specialist.plan.fingerprint,
         "retained": one.specialist.plan.counts,
         "router_head": one.specialist.head.sha256 if one.specialist.head else None}
        for one in specialists if one.leaving is None
    ]  # fmt: skip
