"""vLLM's OpenAI-compatible server with our routes on its app, for one checkpoint on disk.

The app, its middleware and its shutdown are vLLM's; we add the router behind GET /leap, take the port
before anything slow happens, and turn what a user can cause into a LeapError.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import importlib
import json
import os
import secrets
import shlex
import signal
import socket
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from fastapi import APIRouter, Depends, HTTPException, Request

from leap_serve.adapter import describe_overlays
from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.provenance import hardware, versions

OURS = ("--model", "--host", "--port", "--uds", "--headless", "--grpc", "--api-server-count", "-asc")
"""vLLM flags that contradict ``leap serve``: it names the model, binds the port and runs one API process."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to serve: where, for whom, and vLLM's own flags.

    Args:
        host, port: the address; port 0 takes a free one, which the ready line names.
        api_key: required from clients as a bearer token; vLLM's VLLM_API_KEY counts too.
        name: the model name clients use.
        rest: flags passed to vLLM untouched; they win over our defaults.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    name: str = "model"
    dtype: str | None = None
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


def leap_router(description: dict[str, Any], api_keys: Sequence[str]) -> APIRouter:
    """Return our routes. vLLM's own check of the API key covers only its own paths, so ours is here."""
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
        """What is served: plan, counts per layer, fingerprint, provenance."""
        return description

    return router


def serve(folder: Path, description: dict[str, Any], options: ServeOptions) -> dict[str, Any]:
    """Serve until SIGINT or SIGTERM; returns {url, model} after a clean stop.

    Args:
        folder: a checkpoint that has been checked.
        description: the JSON that GET /leap answers.
        options: see ServeOptions.

    Raises LeapError when the port is taken, vLLM refuses the settings, or the engine dies, and
    KeyboardInterrupt when a signal comes before it is ready.
    """
    with contextlib.closing(bind(options.host, options.port)) as sock:
        port = sock.getsockname()[1]
        host = f"[{options.host}]" if ":" in options.host else options.host
        url = f"http://{host}:{port}"
        # From here to vLLM's own handlers, signals must unwind, or engine processes stay behind.
        before = {number: signal.signal(number, _interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            api = _vllm_server()
            args = _vllm_arguments(api, folder, port, options)
            keys = [key for key in (args.api_key or [os.environ.get("VLLM_API_KEY")]) if key]
            router = leap_router(description, keys)
            import uvloop

            uvloop.run(_run(api, args, sock, router, lambda: _announce(url, options.name, bool(keys))))
        except _Interrupted:
            raise KeyboardInterrupt from None
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return {"url": url, "model": options.name}


async def _run(
    api: Namespace, args: Namespace, sock: socket.socket, router: APIRouter, announce: Callable[[], None]
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        try:
            engine = await stack.enter_async_context(api.build_async_engine_client(args))
        except LeapError:
            raise
        except Exception as error:
            raise LeapError(
                args.model, f"vLLM did not start: {type(error).__name__}: {_one_line(error)}",
                "the cause is in vLLM's log above; flags for vLLM follow a lone `--`",
            ) from None  # fmt: skip
        tasks = await engine.get_supported_tasks()
        app = api.build_app(args, tasks, engine.model_config)
        app.include_router(router)
        await api.init_app_state(engine, app.state, args, tasks)
        ready = asyncio.create_task(_when_started(app, announce))
        stopping = await api.serve_http(app, sock=sock, **_uvicorn_settings(api, args))
        ready.cancel()
    # After a signal vLLM hands back the HTTP server's own shutdown(), which closes what is still open;
    # anything else means that the server left by itself because the engine died.
    died = stopping.__name__ != "shutdown"
    await stopping
    if died:
        raise LeapError(args.model, "the engine died while serving", "the cause is in vLLM's log above")


async def _when_started(app: Any, announce: Callable[[], None]) -> None:
    while not (hasattr(app.state, "server") and app.state.server.started):
        await asyncio.sleep(0.02)
    announce()


def _announce(url: str, name: str, with_key: bool) -> None:
    body = shlex.quote(json.dumps({"model": name, "prompt": "1 + 1 =", "max_tokens": 16}))
    key = ' -H "Authorization: Bearer $KEY"' if with_key else ""
    print(f"leap serve: {name} is ready at {url}/v1; stop it with Ctrl-C. Try:", flush=True)
    print(f"  curl {url}/v1/completions{key} -H 'Content-Type: application/json' -d {body}", flush=True)


class _Interrupted(SystemExit):
    """A signal while loading. Not KeyboardInterrupt: vLLM's zmq_socket_ctx swallows that one and loads on."""


def _interrupt(signum: int, frame: FrameType | None) -> None:
    raise _Interrupted


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:600]


_LAUNCHERS = "vllm.entrypoints.launchers"
_PLACES: dict[str, tuple[str, ...]] = {
    # Since 0.32 under launchers/, before that in entrypoints/openai/: the first that imports is taken.
    "build_async_engine_client": (f"{_LAUNCHERS}.api_server.entry", "vllm.entrypoints.openai.api_server"),
    "init_app_state": (f"{_LAUNCHERS}.api_server.app_state", "vllm.entrypoints.openai.api_server"),
    "build_app": (f"{_LAUNCHERS}.app", "vllm.entrypoints.openai.api_server"),
    "serve_http": (f"{_LAUNCHERS}.launcher", "vllm.entrypoints.launcher"),
    "validate_api_server_args": (f"{_LAUNCHERS}.launcher", "vllm.entrypoints.openai.api_server"),
    "make_arg_parser": (f"{_LAUNCHERS}.cli_args", "vllm.entrypoints.openai.cli_args"),
    "validate_parsed_serve_args": (f"{_LAUNCHERS}.cli_args", "vllm.entrypoints.openai.cli_args"),
    "get_uvicorn_log_config": (
        f"{_LAUNCHERS}.utils.server_utils",
        "vllm.entrypoints.serve.utils.server_utils",
        "vllm.entrypoints.openai.server_utils",
    ),
    "cli_env_setup": ("vllm.entrypoints.serve.utils.api_utils", "vllm.entrypoints.utils"),
    "FlexibleArgumentParser": ("vllm.utils.argparse_utils",),
    "ToolParserManager": ("vllm.tool_parsers",),
    "ReasoningParserManager": ("vllm.reasoning",),
    "set_ulimit": ("vllm.utils.system_utils",),
    "current_platform": ("vllm.platforms",),
    "envs": ("vllm",),
}


def _vllm_server() -> Namespace:
    """Import the parts of vLLM's server that we assemble, from wherever this release keeps them."""
    found = Namespace()
    for name, modules in _PLACES.items():
        for module in modules:
            try:
                setattr(found, name, getattr(importlib.import_module(module), name))
                break
            except ModuleNotFoundError as error:
                if error.name == "vllm":
                    raise UnsupportedError(
                        "vllm", "is not installed",
                        "pip install 'leap-serve[cpu]', or 'leap-serve[cuda]' with an NVIDIA GPU",
                    ) from None  # fmt: skip
            except AttributeError:
                continue
        if not hasattr(found, name):
            raise UnsupportedError("vllm", f"this release has no {name} where we know it", "run leap env")
    return found


def _vllm_arguments(api: Namespace, folder: Path, port: int, options: ServeOptions) -> Namespace:
    """Parse our settings and the user's flags with vLLM's own parser; the user's come last and win."""
    flags = [f"--model={folder}", f"--host={options.host}", f"--port={port}", f"--served-model-name={options.name}"]
    flags += [f"--api-key={options.api_key}"] if options.api_key else []
    flags += [f"--dtype={options.dtype}"] if options.dtype else []
    flags += ["--load-format=leap"] if (folder / "leap.json").exists() else []
    if api.current_platform.is_cpu():
        # Compiling on a CPU takes minutes, and vLLM would reserve most of the memory for its cache.
        flags += ["--enforce-eager", "--max-model-len=auto"]
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")

    class Parser(api.FlexibleArgumentParser):  # type: ignore[name-defined, unused-ignore]
        def error(self, message: str) -> None:
            raise UsageError("--", f"vLLM says: {message}", "see vLLM's serve arguments")

    api.cli_env_setup()
    try:
        args: Namespace = api.make_arg_parser(Parser(prog="leap serve")).parse_args([*flags, *options.rest])
        api.validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            api.ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            api.ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        api.validate_api_server_args(args)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UsageError("--", f"vLLM says: {_one_line(error)}", "correct the flags after `--`") from None
    api.set_ulimit()
    return args


def _uvicorn_settings(api: Namespace, args: Namespace) -> dict[str, Any]:
    """The settings of vLLM's own server, from its flags."""
    copied = (
        "host", "port", "enable_ssl_refresh", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs",
        "ssl_ciphers", "h11_max_incomplete_event_size", "h11_max_header_count",
    )  # fmt: skip
    log_config = api.get_uvicorn_log_config(args)
    return {
        **{name: getattr(args, name) for name in copied},
        **({} if log_config is None else {"log_config": log_config}),
        "log_level": args.uvicorn_log_level,
        "access_log": not args.disable_uvicorn_access_log,
        "timeout_keep_alive": api.envs.VLLM_HTTP_TIMEOUT_KEEP_ALIVE,
        # By then the engine is gone (it drains first, if --shutdown-timeout says so), and a stream whose
        # abort got lost would keep uvicorn waiting for ever.
        "timeout_graceful_shutdown": 3,
    }
