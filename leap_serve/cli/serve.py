"""``leap serve CKPT [--specialist NAME=PLAN …] [-- vLLM flags]``: vLLM's server with GET /leap beside its routes."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from leap_serve.checkpoint import Checkpoint, check_cut, check_experts, resolve_model
from leap_serve.errors import UsageError
from leap_serve.server.app import ServeOptions, SharedModel, describe, serve
from leap_serve.server.specialists import MAX_SPECIALISTS, Base, parse_flag, read_specialist, read_state
from leap_serve.server.vllm_parts import lora_flags
from leap_serve.weights import unmerged
from leap_serve.weights.overlays import ADAPTER_FOLDER, check_overlays

EPILOG = """\
Flags after a lone `--` go to vLLM untouched and win over ours, for instance
  leap serve ckpt/ --port 8001 -- --max-model-len 4096 --tensor-parallel-size 2
Specialists share the model: a request whose `model` is `math` is routed to the experts of math's plan,
  leap serve MODEL --specialist math=math/plan.json --specialist code=code_ckpt/leap.json
and with --admin-key they come and go at run time (POST, GET, DELETE /v1/leap/specialists).
On a CPU the defaults are --enforce-eager, --max-model-len auto and, unless the variable is set,
VLLM_CPU_KVCACHE_SPACE=1 (GiB). Keys in VLLM_API_KEY and LEAP_ADMIN_KEY do not show in the process list."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("model", help="a checkpoint folder, leap-tiny, or a model id")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default 127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, help="port (default 8000; 0 takes a free one)")
    parser.add_argument("--api-key", help="clients must send it as a bearer token; /leap is protected too")
    parser.add_argument("--dtype", help="auto, bfloat16, float16 or float32 (default: vLLM's auto)")
    parser.add_argument(
        "--leap-kernel", choices=["auto", "ours", "vllm"],
        help="MoE kernel on a GPU: ours where `leap tune-kernels` measured it as faster (auto), always, or never; "
        "GET /leap says which one each layer runs",
    )  # fmt: skip
    parser.add_argument(
        "--unmerged", action="store_true",
        help="leave a tuned cut's adapter to vLLM's own LoRA path (GPU only) instead of merging it at load: --name is "
        "then the tuned model, NAME-cut the same experts without the adapter",
    )  # fmt: skip
    parser.add_argument("--name", help="model name that clients use (default: the folder's name)")
    parser.add_argument(
        "--specialist", action="append", default=[], metavar="NAME=PLAN",
        help=f"a plan.json or leap.json served beside the model under NAME; up to {MAX_SPECIALISTS} of them",
    )  # fmt: skip
    parser.add_argument("--admin-key", help="lets its holder load and unload specialists at run time")
    parser.add_argument("--state", type=Path, help="file in which what was loaded at run time survives a restart")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Check the checkpoint, then serve it until Ctrl-C or SIGTERM."""
    folder = resolve_model(args.model).resolve()
    checkpoint = Checkpoint.open(folder)
    # The engine would find the same damage half a minute later, deep in a traceback of another process.
    if checkpoint.plan is None:
        check_experts(checkpoint)
        check_overlays(checkpoint)
    else:
        check_cut(checkpoint)
    if args.leap_kernel:
        os.environ["LEAP_KERNEL"] = args.leap_kernel  # read by the plugin in each of the engine's processes
    name = args.name or folder.name
    lora: tuple[str, ...] = ()
    if args.unmerged:
        lora = lora_flags(folder / ADAPTER_FOLDER, name, unmerged.rank_for_vllm(checkpoint))
        os.environ[unmerged.VARIABLE] = "1"  # read by the plugin, too
    options = ServeOptions(args.host, args.port, args.api_key, name, args.dtype, lora, tuple(args.rest))
    return serve(folder, describe(checkpoint, name), options, shared_model(args, checkpoint))


def shared_model(args: argparse.Namespace, checkpoint: Checkpoint) -> SharedModel | None:
    """Read the specialists that the command line and the state file ask for; None where nobody wants any."""
    admin_key = args.admin_key or os.environ.get("LEAP_ADMIN_KEY") or None
    if not args.specialist and admin_key is None and args.state is None:
        return None
    asked = [parse_flag(flag) for flag in args.specialist]
    names = [name for name, _ in asked]
    if len(set(names)) < len(names) or len(names) > MAX_SPECIALISTS:
        raise UsageError(
            "--specialist", f"is given {len(names)} times for {len(set(names))} names",
            f"give each of at most {MAX_SPECIALISTS} specialists a name of its own",
        )  # fmt: skip
    base = Base.of(checkpoint)
    given = tuple(read_specialist(name, path, base) for name, path in asked)
    kept = tuple(read_state(args.state, base)) if args.state is not None else ()
    return SharedModel(base, given, kept, args.state, admin_key)
