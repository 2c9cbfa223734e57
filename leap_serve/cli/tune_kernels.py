"""``leap tune-kernels CKPT``: measure which launch of the MoE kernels is fastest on this GPU, for each |I| of a checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.architectures import text_config
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import noted_bar, say, table
from leap_serve.errors import UnsupportedError, UsageError
from leap_serve.files import write_json
from leap_serve.provenance import made_by, versions

if TYPE_CHECKING:
    from leap_kernels.tuning import Shape, Table
    from leap_kernels.workbench import Workbench

EPILOG = """\
Two files a shape are written: ours, and one in vLLM's own format, from which stock vLLM profits too. Serve with
  LEAP_KERNEL_CONFIGS=DIR VLLM_TUNED_CONFIG_FOLDER=DIR leap serve CKPT
Interrupted, the same command goes on where it stopped. Nothing else may use the GPU meanwhile."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a checkpoint folder, leap-tiny, or a model id")
    parser.add_argument("-o", "--out", type=Path, help="folder of the tables (default: kernels/ in the checkpoint)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights"
    )
    parser.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks: each holds 1/N of I")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 1 … 4096)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tune every distinct shape and show what was found."""
    checkpoint = Checkpoint.open(resolve_model(args.checkpoint))
    shapes = shapes_of(checkpoint, args.dtype, args.tp)
    if args.tokens and min(args.tokens) < 1:
        raise UsageError("--tokens", f"{min(args.tokens)} is not positive", "give numbers of at least 1")
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "GPU", "kernels are measured on a CUDA GPU, and there is none here",
            "run it on the machine that serves",
        )  # fmt: skip
    from leap_kernels.tuning import TOKENS, device_name

    device = torch.device("cuda")
    folder = args.out or checkpoint.folder / "kernels"
    name, tokens = device_name(device), sorted(set(args.tokens or TOKENS))
    found = []
    with noted_bar("tuning") as bar:
        for number, shape in enumerate(shapes):

            def done(finished: int, of: int, before: int = number * len(tokens), experts: int = shape.experts) -> None:
                bar(before + finished, len(shapes) * of, f"|I| = {experts}")

            found.append(_tune(shape, device, name, folder, tokens, done))
    _show(found, name)
    say(f"serve with LEAP_KERNEL_CONFIGS={folder} VLLM_TUNED_CONFIG_FOLDER={folder}")
    return {"out": str(folder), "device": name, "files": [one.shape.file_name(name) for one in found]}


def shapes_of(checkpoint: Checkpoint, dtype: str, tp: int) -> list[Shape]:
    """Return the distinct shapes of a checkpoint's MoE layers, small |I| first. Raises UnsupportedError, UsageError."""
    from leap_kernels.tuning import Shape

    config = text_config(checkpoint.config)
    width = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    if tp < 1 or width % tp:
        raise UsageError("--tp", f"{tp} ranks do not share {width} intermediate channels", "give a divisor")
    if config.get("hidden_act", "silu") not in ("silu", "swish") or checkpoint.family.model_type == "gpt_oss":
        raise UnsupportedError(
            checkpoint.folder, "its experts are not plain SiLU·mul: vLLM's kernel serves them", "nothing is to be tuned"
        )
    plan, layers = checkpoint.plan, checkpoint.moe_layers
    sizes = (
        {(len(layer.retained), layer.top_k) for layer in plan.layers.values()}
        if plan else {(checkpoint.num_experts, checkpoint.top_k)} if layers else set()
    )  # fmt: skip
    return [Shape(experts, int(config["hidden_size"]), width // tp, top_k, dtype) for experts, top_k in sorted(sizes)]


def _tune(
    shape: Shape, device: Any, name: str, folder: Path, tokens: list[int], done: Callable[[int, int], None]
) -> Table:
    """Tune one shape, ours and vLLM's, and write both files."""
    import torch
    import triton

    from leap_kernels.tuning import missing, tune_shape, vllm_file
    from leap_kernels.workbench import Workbench
    from leap_vllm import compat_experts

    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    bench = Workbench(shape, device)

    def measure_at(number: int) -> Any:
        return bench.measure(bench.batch(number))

    found = tune_shape(
        shape, name, folder, tokens, limit, made_by(versions=versions()), measure_at,
        lambda number: tune_vllm(bench, number), done,
    )  # fmt: skip
    if missing(found, tokens):
        raise AssertionError(f"tuning left out {missing(found, tokens)}")
    path = folder / compat_experts.vllm_file_name(shape.experts, shape.width)
    write_json(path, vllm_file(found, triton.__version__))
    return found


def tune_vllm(bench: Workbench, tokens: int) -> tuple[float, dict[str, int]]:
    """Return the fastest launch of vLLM's kernel found by descent over its own tuner's space, and its µs."""
    from leap_kernels.workbench import guarded_us
    from leap_vllm import compat_experts

    shape, batch = bench.shape, bench.batch(tokens)

    def measure(config: dict[str, int]) -> float:
        layer = compat_experts.vllm_layer(batch.x, bench.w13, bench.w2, batch.ids, batch.weights, config)
        return guarded_us(lambda: layer, len(bench.w13), 5, bench.device)

    best = {
        "num_warps": 4, "num_stages": 3,
        **compat_experts.vllm_default(tokens, shape.experts, shape.hidden, shape.width, shape.top_k),
    }  # fmt: skip
    best_us = measure(best)
    for group in compat_experts.vllm_changes():
        for trial in [{**best, **change} for change in group]:
            if trial != best and (us := measure(trial)) < best_us:
                best, best_us = trial, us
    return best_us, best


def _show(found: list[Table], device: str) -> None:
    rows = [
        [one.shape.experts, one.shape.top_k, tokens, f"{entry.us:.1f}", f"{entry.vllm_us:.1f}", f"{entry.vllm_us / entry.us:.2f}"]
        for one in found
        for tokens, entry in sorted(one.entries.items())
        if entry.vllm_us
    ]  # fmt: skip
    table(f"µs a layer on {device}, both tuned", ["|I|", "top_k", "tokens", "ours", "vLLM", "speed-up"], rows)
