"""``leap tune-kernels CKPT``: measure which launch of the MoE kernels is fastest on this GPU, for each |I| of a checkpoint."""

from __future__ import annotations

import argparse
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leap_serve.architectures import text_config
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import noted_bar, say, table
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.files import write_json
from leap_serve.plan import Plan
from leap_serve.provenance import made_by, versions

if TYPE_CHECKING:
    import torch

    from leap_kernels.tuning import Shape, Table
    from leap_kernels.workbench import Workbench

EPILOG = """\
Two files a shape are written: ours, and one in vLLM's own format, from which stock vLLM profits too. In CKPT/kernels,
where they go by themselves, the engine finds both; from another folder they are taken with
  LEAP_KERNEL_CONFIGS=DIR VLLM_TUNED_CONFIG_FOLDER=DIR leap serve CKPT
An engine chooses its kernel for the layers that it loads: one that is shrunk at run time (--plan) follows tables of the
smaller layers where tables of the whole ones made it take ours, or with LEAP_KERNEL=ours.
Interrupted, the same command goes on where it stopped. Nothing else may use the GPU meanwhile."""

SHARED_MEMORY = 227 * 1024
"""Bytes that a block may take on an H200: what limits the configurations where there is no GPU to ask."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.epilog, parser.formatter_class = EPILOG, argparse.RawDescriptionHelpFormatter
    parser.add_argument("checkpoint", help="a checkpoint folder, leap-tiny, or a model id")
    parser.add_argument("-o", "--out", type=Path, help="folder of the tables (default: kernels/ in the checkpoint)")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16", help="of the weights"
    )
    ranks = parser.add_mutually_exclusive_group()
    ranks.add_argument("--tp", type=int, default=1, metavar="N", help="tensor-parallel ranks: each holds 1/N of I")
    ranks.add_argument(
        "--expert-parallel", type=int, default=1, metavar="N",
        help="ranks of an engine with --enable-expert-parallel, tensor- times data-parallel: each holds 1/N of the experts",
    )  # fmt: skip
    parser.add_argument("--plan", type=Path, help="tune for the checkpoint shrunk by this plan.json at run time")
    parser.add_argument("--tokens", type=int, nargs="+", metavar="M", help="numbers of tokens (default: 1 … 4096)")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tune every distinct shape and show what was found."""
    checkpoint = Checkpoint.open(resolve_model(args.checkpoint))
    plan = Plan.load(args.plan) if args.plan else None
    if plan and (set(plan.layers), plan.num_experts) != (set(checkpoint.moe_layers), checkpoint.num_experts):
        raise UsageError(
            args.plan, f"plans {len(plan.layers)} layers of {plan.num_experts} experts, {checkpoint.folder} has "
            f"{len(checkpoint.moe_layers)} of {checkpoint.num_experts}", "give a plan made for this model",
        )  # fmt: skip
    shapes = shapes_of(checkpoint, args.dtype, args.tp, args.expert_parallel, plan)
    if args.tokens and min(args.tokens) < 1:
        raise UsageError("--tokens", f"{min(args.tokens)} is not positive", "give numbers of at least 1")
    device = _device()
    from leap_kernels.tuning import BESIDE_WEIGHTS, TOKENS, device_name

    folder = args.out or checkpoint.folder / BESIDE_WEIGHTS
    _check_writable(folder)
    name, tokens = device_name(device), sorted(set(args.tokens or TOKENS))
    files = vllm_files(shapes, folder, name)
    for file, (kept, *others) in files.items():
        if others:
            say(f"vLLM's file {file} is one for several shapes: it will hold the launches of {_described(kept, shapes)}, "
                f"which {' and '.join(_described(other, shapes) for other in others)} must follow as well")  # fmt: skip
    found = []
    with noted_bar("tuning") as bar:
        for number, shape in enumerate(shapes):

            def done(finished: int, of: int, before: int = number * len(tokens), experts: int = shape.experts) -> None:
                bar(before + finished, len(shapes) * of, f"|I| = {experts}")

            (file,) = (one for one, sharing in files.items() if shape in sharing)
            found.append(_tune(shape, device, name, folder, tokens, done, file, files[file][0]))
    _show(found, name)
    with_folder = "" if args.out is None else f"LEAP_KERNEL_CONFIGS={folder} VLLM_TUNED_CONFIG_FOLDER={folder} "
    say(f"serve with {with_folder}leap serve {args.checkpoint}")
    return {"out": str(folder), "device": name, "files": [one.shape.file_name(name) for one in found]}


def _device() -> torch.device:
    """The GPU, or the CPU where Triton interprets: that tries the way, and its times mean nothing."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if os.environ.get("TRITON_INTERPRET") == "1":
        return torch.device("cpu")
    raise UnsupportedError(
        "GPU", "kernels are measured on a CUDA GPU, and there is none here", "run it on the machine that serves"
    )


def _check_writable(folder: Path) -> None:
    """Raise UsageError now rather than after the first measurement."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UsageError(folder, f"cannot be written ({error.strerror})", "name another folder with -o") from None


def shapes_of(
    checkpoint: Checkpoint, dtype: str, tp: int = 1, ranks: int = 1, plan: Plan | None = None
) -> dict[Shape, int]:
    """Return each shape among a checkpoint's MoE layers and how many have it, small |I| first.

    ``tp`` ranks share each expert's I, or ``ranks`` the experts: where those do not divide, two shapes come of a layer.
    ``plan``: instead of the checkpoint's own. Raises UnsupportedError, UsageError.
    """
    from leap_kernels.tuning import Shape

    config = text_config(checkpoint.config)
    full = int(config.get("moe_intermediate_size") or config["intermediate_size"])
    if config.get("hidden_act", "silu") not in ("silu", "swish") or checkpoint.family.model_type == "gpt_oss":
        raise UnsupportedError(
            checkpoint.folder, "its experts are not plain SiLU·mul: vLLM's kernel serves them", "nothing is to be tuned"
        )
    plan, layers = plan or checkpoint.plan, checkpoint.moe_layers
    # A plan may narrow a layer's experts as well (its width).
    sizes = Counter(
        [(len(layer.retained), layer.top_k, layer.width or full) for layer in plan.layers.values()]
        if plan else [(checkpoint.num_experts, checkpoint.top_k, full)] * len(layers)
    )  # fmt: skip
    for experts, _, width in sorted(sizes):
        if not 1 <= ranks <= experts:
            raise UsageError("--expert-parallel", f"{ranks} ranks do not share {experts} experts", "give fewer ranks")
        if tp < 1 or width % tp:
            raise UsageError("--tp", f"{tp} ranks do not share {width} intermediate channels", "give a divisor")
    hidden = int(config["hidden_size"])
    found: Counter[Shape] = Counter()
    for (experts, top_k, width), number in sorted(sizes.items()):
        # As vLLM gives them out: the first ranks take what the division leaves over.
        for held in {experts // ranks, -(-experts // ranks)}:
            found[Shape(held, hidden, width // tp, top_k, dtype, ranks)] += number
    return dict(sorted(found.items(), key=lambda item: astuple(item[0])))


def vllm_files(shapes: Mapping[Shape, int], folder: Path, device: str) -> dict[str, list[Shape]]:
    """Return the names of vLLM's files and the shapes that read each, first the one of most layers: its launches go in.

    vLLM names them by |I|, I and a part of the dtype alone. Raises UsageError where ``folder`` holds a table of another
    shape that would share one: its launches would be lost. LeapError: a damaged table.
    """
    from leap_kernels.tuning import Table
    from leap_vllm.compat_experts import vllm_file_name

    found: dict[str, list[Shape]] = {}
    for shape in sorted(shapes, key=lambda one: (shapes[one], one.top_k), reverse=True):
        found.setdefault(vllm_file_name(shape.experts, shape.width, shape.dtype), []).append(shape)
    for path in sorted(folder.glob(f"E=*,H=*,device_name={device.replace(' ', '_')}.json")):
        try:
            other = Table.load(path).shape
        except ValueError as error:
            raise _damaged(folder, error) from None
        name = vllm_file_name(other.experts, other.width, other.dtype)
        if other not in shapes and name in found:
            raise UsageError(
                path, f"vLLM has one file, {name}, for this shape and that of {found[name][0].file_name(device)}",
                "name another folder with -o",
            )  # fmt: skip
    return found


def _damaged(folder: Path, error: ValueError) -> LeapError:
    return LeapError(folder, str(error), "remove that file, or name another folder with -o")


def _described(shape: Shape, shapes: Mapping[Shape, int]) -> str:
    return f"top-{shape.top_k} ({shapes[shape]} layer{'' if shapes[shape] == 1 else 's'})"


def _tune(
    shape: Shape, device: torch.device, name: str, folder: Path, tokens: list[int], done: Callable[[int, int], None],
    file: str, held: Shape,
) -> Table:  # fmt: skip
    """Tune one shape, ours and vLLM's; write our table and, if it is the shape ``held`` in vLLM's ``file``, that one."""
    import torch
    import triton

    from leap_kernels.tuning import tune_shape, vllm_file
    from leap_kernels.workbench import ROTATED_BYTES, Workbench

    on_gpu = device.type == "cuda"
    limit = torch.cuda.get_device_properties(device).shared_memory_per_block_optin if on_gpu else SHARED_MEMORY
    bench = Workbench(shape, device, ROTATED_BYTES if on_gpu else 1)

    def measure_at(number: int) -> Any:
        return bench.measure(bench.batch(number), 5 if on_gpu else 1)

    def prepare_at(number: int) -> Any:
        return bench.prepare(bench.batch(number))

    def vllm_at(number: int) -> tuple[float, dict[str, int]]:
        return tune_vllm(bench, number)

    about = made_by(versions=versions(), vllm_file={"name": file, "holds": held.file_name(name)})
    try:
        found = tune_shape(
            shape, name, folder, tokens, limit, about, measure_at,
            vllm_at if on_gpu else None, done, prepare_at if on_gpu else None,
        )  # fmt: skip
    except ValueError as error:
        raise _damaged(folder, error) from None
    if on_gpu and shape == held:
        write_json(folder / file, vllm_file(found, triton.__version__))
    return found


def tune_vllm(bench: Workbench, tokens: int) -> tuple[float, dict[str, int]]:
    """Return the fastest launch of vLLM's kernel found by descent over its own tuner's space, and its µs.

    Our file hides the one that vLLM may ship for the shape: its launch is a start as well as vLLM's default.
    """
    from leap_kernels.workbench import guarded_us
    from leap_vllm import compat_contenders, compat_experts

    shape, batch = bench.shape, bench.batch(tokens)

    def measure(config: Mapping[str, int]) -> float:
        layer = compat_contenders.vllm_layer(
            batch.x, bench.w13, bench.w2, batch.ids, batch.weights, dict(config), batch.expert_map
        )
        return guarded_us(lambda: layer, len(bench.w13), 5, bench.device)

    file_name = compat_experts.vllm_file_name(shape.experts, shape.width, shape.dtype)
    starts = compat_contenders.vllm_launches(
        tokens, shape.experts, shape.hidden, shape.width, shape.top_k, file_name
    )  # fmt: skip
    return descend(starts, compat_contenders.vllm_changes(), measure)


def descend(
    starts: Sequence[Mapping[str, int]], groups: Sequence[Sequence[Mapping[str, int]]],
    measure: Callable[[Mapping[str, int]], float],
) -> tuple[float, dict[str, int]]:  # fmt: skip
    """Return the lowest µs and its launch: the fastest start, then each group of changes on the best so far."""
    best_us, best = min(((measure(start), dict(start)) for start in starts), key=lambda found: found[0])
    for group in groups:
        for trial in [{**best, **change} for change in group]:
            if trial != best and (us := measure(trial)) < best_us:
                best_us, best = us, trial
    return best_us, best


def _show(found: list[Table], device: str) -> None:
    rows = [
        [one.shape.experts, one.shape.width, one.shape.top_k, tokens, f"{entry.us:.1f}",
         f"{entry.vllm_us:.1f}" if entry.vllm_us else "–", f"{entry.vllm_us / entry.us:.2f}" if entry.vllm_us else "–"]
        for one in found
        for tokens, entry in sorted(one.entries.items())
    ]  # fmt: skip
    table(f"µs a layer on {device}, both tuned", ["|I|", "I", "top_k", "tokens", "ours", "vLLM", "speed-up"], rows)
