"""``leap serve CKPT [-- vLLM flags]``: vLLM's OpenAI-compatible server with GET /leap beside its routes."""

from __future__ import annotations

import argparse
import os
from typing import Any

from leap_serve.checkpoint import Checkpoint, check_cut, check_experts, resolve_model
from leap_serve.overlays import check_overlays
from leap_serve.server import ServeOptions, describe, serve

EPILOG = """\
Flags after a lone `--` go to vLLM untouched and win over ours, for instance
  leap serve ckpt/ --port 8001 -- --max-model-len 4096 --tensor-parallel-size 2
On a CPU the defaults are --enforce-eager, --max-model-len auto and, unless the variable is set,
VLLM_CPU_KVCACHE_SPACE=1 (GiB). A key in VLLM_API_KEY does not show in the process list."""


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
        help="MoE kernel on a GPU: ours where `leap tune-kernels` measured it as faster (auto), always, or never",
    )  # fmt: skip
    parser.add_argument("--name", help="model name that clients use (default: the folder's name)")


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
    options = ServeOptions(args.host, args.port, args.api_key, name, args.dtype, tuple(args.rest))
    return serve(folder, describe(checkpoint, name), options)
