"""vLLM's OpenAI-compatible server with our routes on its app, for one checkpoint on disk.

The app, its middleware and its shutdown are vLLM's; we add the router behind GET /leap, take the port
before anything slow happens, and turn what a user can cause into a LeapError.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import json
import os
import secrets
import shlex
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request

from leap_serve.adapter import describe_overlays
from leap_serve.checkpoint import Checkpoint
from leap_serve.encoding import end_ids
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.provenance import hardware, versions
from leap_serve.server.admin import admin_router, names
from leap_serve.server.metrics import Counters
from leap_serve.server.slots import Specialists
from leap_serve.server.specialists import Base, Specialist
from leap_serve.server.vllm_parts import one_line, parse_flags, uvicorn_settings, vllm_server
from leap_serve.weights.unmerged import FLAG

OURS = ("--model", "--host", "--port", "--uds", "--headless", "--grpc", "--api-server-count", "-asc")
"""vLLM flags that contradict ``leap serve``: it names the model, binds the port and runs one API process."""

WORKER = "leap_vllm.worker.LeapWorker"
"""What answers for the model in vLLM's workers: specialists go through it, and GET /leap asks it for the kernels."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve: where, for whom, and vLLM's own flags.

    Args:
        host, port: the address; port 0 takes a free one, which the ready line names.
        api_key: required from clients as a bearer token; vLLM's VLLM_API_KEY counts too.
        name: the model name clients use.
        dtype: vLLM's --dtype.
        lora: vLLM's flags for an adapter that it applies itself, on a GPU, under ``name``; the model without it
            is then ``name-cut``. Empty where nothing is left to vLLM.
        rest: flags passed to vLLM untouched; they win over our defaults.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str = "model"
    dtype: str | None = None
    lora: tuple[str, ...] = ()
    rest: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise UsageError("--port", f"is {self.port}", "give a port between 0 (any free one) and 65535")
        for flag in self.rest:
            if flag.partition("=")[0] in OURS:
                raise UsageError(
                    flag, "stands after `--`, but leap serve sets it itself",
                    "give it before `--`, or start vLLM's own server",
                )  # fmt: skip


@dataclass(frozen=True, slots=True)
class SharedModel:
    """Specialists on the model that is served, and who may change them while it runs.

    Args:
        base: the model.
        given: specialists of the command line.
        kept: those of the state file; one of the command line comes before one of the same name.
        state: the file in which run-time loads survive a restart, or None.
        admin_key: opens the routes that load and unload; None: there are none.
    """

    base: Base
    given: tuple[Specialist, ...] = ()
    kept: tuple[Specialist, ...] = ()
    state: Path | None = None
    admin_key: str | None = None


def bind(host: str, port: int) -> socket.socket:
    """Take the address now, so that a taken port is known before the model loads. Raises LeapError."""
    where = f"{host}:{port}"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except socket.gaierror as error:
        raise LeapError(where, f"the host cannot be resolved ({error.strerror})", "give --host an address") from None
    sock = socket.socket(family, kind, protocol)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind(address)
        # SO_REUSEADDR lets two sockets bind while neither listens; listening settles who owns the port.
        sock.listen()
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            what, remedy = (
                "the port is taken",
                "stop the server that holds it, or give another --port (0: any free one)",
            )
        elif error.errno == errno.EACCES:
            what, remedy = "this user may not open that port", "give a --port above 1023"
        else:
            what, remedy = f"cannot be bound ({error.strerror})", "give --host an address of this machine"
        raise LeapError(where, what, remedy) from None
    return sock


def describe(checkpoint: Checkpoint, name: str) -> dict[str, Any]:
    """Return what GET /leap answers: plan, counts per MoE layer, fingerprint, provenance of a checked checkpoint."""
    plan = checkpoint.plan
    layers = [
        {"layer": index, "retained": len(plan.layers[index].retained), "of": plan.num_experts,
         "top_k": plan.layers[index].top_k, "temperature": plan.layers[index].temperature}
        if plan and index in plan.layers
        else {"layer": index, "retained": checkpoint.num_experts, "of": checkpoint.num_experts,
              "top_k": checkpoint.top_k, "temperature": 1.0}
        for index in checkpoint.moe_layers
    ]  # fmt: skip
    stated = plan.to_json() if plan else None
    if stated:
        # Scores are E floats per layer; they explain the plan, but leap.json is the place to read them.
        stated.pop("scores")
    return {
        "model": name,
        "family": checkpoint.family.model_type,
        "architecture": (checkpoint.config.get("architectures") or [None])[0],
        "cut": plan is not None,
        "what": "cut by leap-serve" if plan else "a full model: no expert was dropped, so there is no plan",
        "fingerprint": plan.fingerprint if plan else None,
        "layers": layers,
        "plan": stated,
        "overlays": [path.relative_to(checkpoint.folder).as_posix() for path in checkpoint.overlays],
        "tuned": describe_overlays(checkpoint),
        "weights_gib": round(checkpoint.weight_bytes / 2**30, 6),
        "provenance": dict(plan.made_by) if plan else None,
        "served_by": {"versions": versions(), "hardware": hardware()},
    }


def leap_router(
    description: dict[str, Any], api_keys: Sequence[str], live: Callable[[], dict[str, Any]] = dict
) -> APIRouter:
    """Return our routes. vLLM's own check of the API key covers only its own paths, so ours is here.

    ``live`` is asked each time for what may change.
    """
    digests = [hashlib.sha256(key.encode()).digest() for key in api_keys]

    async def authorised(request: Request) -> None:
        scheme, _, token = request.headers.get("Authorization", "").partition(" ")
        given = hashlib.sha256(token.encode()).digest()
        # No early exit: the time taken must not tell which key was close.
        known = sum(secrets.compare_digest(given, digest) for digest in digests)
        if digests and (scheme.lower() != "bearer" or not known):
            raise HTTPException(401, "Unauthorized", headers={"WWW-Authenticate": "Bearer"})

    router = APIRouter(dependencies=[Depends(authorised)], tags=["leap"])

    @router.get("/leap")
    async def leap() -> dict[str, Any]:
        """What is served: plan, counts per layer, fingerprint, provenance, specialists."""
        return {**description, **live()}

    return router


def serve(
    folder: Path, description: dict[str, Any], options: ServeOptions, shared: SharedModel | None = None
) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; returns {url, model} after a clean stop.

    Args:
        folder: a checkpoint that has been checked.
        description: the JSON that GET /leap answers.
        options: see ServeOptions.
        shared: specialists on this model; None where there are none and none may come.

    Raises LeapError when the port is taken, vLLM refuses the settings, or the engine dies, and
    KeyboardInterrupt when a signal comes before it is ready.
    """
    with contextlib.closing(bind(options.host, options.port)) as sock:
        port = sock.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{port}"
        # From here to vLLM's own handlers, signals must unwind, or engine processes stay behind.
        before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        # oneDNN keeps a primitive for each batch size of each linear shape, 1,024 of them: on a CPU memory would grow for hours.
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
        try:
            api = vllm_server()
            if options.lora and not api.current_platform.is_cuda_alike():
                raise UnsupportedError(FLAG, "vLLM applies adapters to experts on a GPU only", "serve without it")
            args = parse_flags(api, folder, _flags(port, options), options.rest)
            keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
            if shared is not None:
                _check_shared(api, args, keys, shared)
            import uvloop

            announce = partial(_announce, url, options.name, bool(keys), shared)
            uvloop.run(_run(api, args, sock, description, keys, shared, announce))
        except _Interrupted:
            raise KeyboardInterrupt from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return {"url": url, "model": options.name}


def _flags(port: int, options: ServeOptions) -> list[str]:
    model = f"{options.name}-cut" if options.lora else options.name
    flags = [f"--host={options.host}", f"--port={port}", f"--served-model-name={model}", *options.lora]
    flags += [f"--api-key={options.api_key}"] if options.api_key else []
    flags += [f"--dtype={options.dtype}"] if options.dtype else []
    return [*flags, f"--worker-extension-cls={WORKER}"]


def _check_shared(api: Namespace, args: Namespace, keys: Sequence[str], shared: SharedModel) -> None:
    """Raise UsageError where vLLM's settings and specialists contradict each other."""
    if shared.admin_key in keys:
        raise UsageError("--admin-key", "is the API key", "give clients another key than whoever loads specialists")
    if args.enable_lora or api.envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING:
        raise UsageError(
            "--enable-lora", "goes with no specialists, which take the adapters' way", "serve one or the other"
        )
    if shared.state is not None and shared.admin_key is None:
        raise UsageError("--state", "has nothing to hold without --admin-key", "give both, or neither")
    served = args.served_model_name or []
    for one in (*shared.given, *shared.kept):
        if one.name in served:
            raise UsageError("--specialist", f"{one.name} is the name of the model itself", "choose another name")


async def _run(
    api: Namespace,
    args: Namespace,
    sock: socket.socket,
    description: dict[str, Any],
    keys: Sequence[str],
    shared: SharedModel | None,
    announce: Callable[[], None],
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        try:
            engine = await stack.enter_async_context(api.build_async_engine_client(args))
        except LeapError:
            raise
        except Exception as error:
            raise LeapError(
                args.model, f"vLLM did not start: {type(error).__name__}: {one_line(error)}",
                "the cause is in vLLM's log above; flags for vLLM follow a lone `--`",
            ) from None  # fmt: skip
        description = {**description, "kernels": await _kernels(engine, args)}
        tasks = await engine.get_supported_tasks()
        # Clients that score texts as we do need the token that ends one; vLLM's own routes do not tell it.
        ends = [] if args.skip_tokenizer_init else end_ids(engine.get_tokenizer())
        description = {**description, "end_of_text": ends}
        app = api.build_app(args, tasks, engine.model_config)
        if shared is None:
            app.include_router(leap_router(description, keys))
            await api.init_app_state(engine, app.state, args, tasks)
        else:
            await _share(api, args, tasks, app, engine, description, keys, shared)
        ready = asyncio.create_task(_when_started(app, announce))
        stopping = await api.serve_http(app, sock=sock, **uvicorn_settings(api, args))
        ready.cancel()
    # After a signal vLLM hands back the HTTP server's own shutdown(), which closes what is still open;
    # anything else means that the server left by itself because the engine died.
    died = stopping.__name__ != "shutdown"
    await stopping
    if died:
        raise LeapError(args.model, "the engine died while serving", "the cause is in vLLM's log above")


async def _kernels(engine: Any, args: Namespace) -> list[dict[str, Any]] | None:
    """Which kernel each MoE layer runs, and why; None where the user's own worker extension took our place."""
    if args.worker_extension_cls != WORKER:
        return None
    found: list[dict[str, Any]] = (await engine.collective_rpc("leap_kernels"))[0]
    return found


async def _share(
    api: Namespace,
    args: Namespace,
    tasks: Any,
    app: Any,
    engine: Any,
    description: dict[str, Any],
    keys: Sequence[str],
    shared: SharedModel,
) -> None:
    """Load the specialists and lay their routes and their way to the engine into the app."""
    specialists = Specialists(engine, shared.base, args.served_model_name, api.LoRARequest, Counters(), shared.state)
    await specialists.open(shared.given, shared.kept)
    app.include_router(leap_router(description, keys, lambda: {"specialists": names(specialists.all())}))
    if shared.admin_key is not None:
        app.include_router(admin_router(specialists, shared.admin_key))
    await api.init_app_state(specialists.client, app.state, args, tasks)
    specialists.publish(app.state.openai_serving_models)


async def _when_started(app: Any, announce: Callable[[], None]) -> None:
    while not (hasattr(app.state, "server") and app.state.server.started):
        await asyncio.sleep(0.02)
    announce()


def _announce(url: str, name: str, with_key: bool, shared: SharedModel | None) -> None:
    body = shlex.quote(json.dumps({"model": name, "prompt": "1 + 1 =", "max_tokens": 16}))
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    print(f"leap serve: {name} is ready at {url}/v1; stop it with Ctrl-C. Try:", flush=True)
    print(f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}", flush=True)
    if shared is not None:
        names = dict.fromkeys(one.name for one in (*shared.given, *shared.kept))
        print(f"  or give as model: {', '.join(names) or 'what POST /v1/leap/specialists loads'}", flush=True)


class _Interrupted(SystemExit):
    """A signal while loading. Not KeyboardInterrupt: vLLM's zmq_socket_ctx swallows that one and loads on."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Interrupted
