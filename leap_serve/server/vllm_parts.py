"""The parts of vLLM's server that we assemble, from wherever a release keeps them, and its flags."""

from __future__ import annotations

import importlib
import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leap_serve.errors import UnsupportedError, UsageError


def one_line(error: BaseException) -> str:
    """Return an exception's text without line breaks, 600 characters at most."""
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
    "LoRARequest": ("vllm.lora.request",),
    "envs": ("vllm",),
}


def vllm_server() -> Namespace:
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


def parse_flags(api: Namespace, folder: Path, flags: Sequence[str], rest: Sequence[str]) -> Namespace:
    """Parse our flags and the user's with vLLM's own parser; the user's come last and win. Raises UsageError."""
    flags = [f"--model={folder}", *flags]
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
        args: Namespace = api.make_arg_parser(Parser(prog="leap serve")).parse_args([*flags, *rest])
        api.validate_parsed_serve_args(args)
        if args.tool_parser_plugin:
            api.ToolParserManager.import_tool_parser(args.tool_parser_plugin)
        if args.reasoning_parser_plugin:
            api.ReasoningParserManager.import_reasoning_parser(args.reasoning_parser_plugin)
        api.validate_api_server_args(args)
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise UsageError("--", f"vLLM says: {one_line(error)}", "correct the flags after `--`") from None
    api.set_ulimit()
    return args


def lora_flags(folder: Path, name: str, rank: int) -> tuple[str, ...]:
    """vLLM's flags for PEFT's adapter of 3-D expert parameters in ``folder``, served as the model ``name``.

    The mixed format has vLLM hold gate and up apart, as it holds two-dimensional adapters of experts.
    """
    module = {"name": name, "path": str(folder), "is_3d_lora_weight": True}
    return (
        "--enable-lora", "--enable-mixed-moe-lora-format", f"--max-lora-rank={rank}",
        "--lora-modules", json.dumps(module),
    )  # fmt: skip


def uvicorn_settings(api: Namespace, args: Namespace) -> dict[str, Any]:
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
