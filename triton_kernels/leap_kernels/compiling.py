"""Compile the kernels for GPUs that are not there, and read what they will take: registers, stack, shared memory.

python -m leap_kernels.compiling --arch 80 90 100        one JSON line a kernel; status 1 if one does not fit
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from leap_kernels import _kernels, _route
from leap_kernels.config import KernelConfig, default_config
from leap_kernels.fused_moe import ADD_UP_COLUMNS, CHOOSE_WARPS, ROUTE_ELEMENTS, ROUTE_WARPS, precision_of

SHARED_LIMIT = {80: 163 * 1024, 86: 99 * 1024, 89: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes of shared memory that one block may take, by compute capability."""
_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}


@dataclass(frozen=True, slots=True)
class Resources:
    """What one compiled kernel takes. ``local`` (spills) and ``stack`` in bytes a thread, ``shared`` in bytes a block."""

    kernel: str
    variant: str
    arch: int
    registers: int
    stack: int
    local: int
    shared: int
    num_warps: int
    num_stages: int

    @property
    def fits(self) -> bool:
        """Nothing spilled, and shared memory within the chip's limit."""
        return not self.stack and not self.local and self.shared <= SHARED_LIMIT[self.arch]


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with everything that is fixed at compile time."""

    name: str
    kernel: Any
    constants: dict[str, Any]
    dtype: torch.dtype
    num_warps: int
    num_stages: int = 3


def resources(variant: Variant, arch: int) -> Resources:
    """Compile for sm_{arch} and read the binary; needs no GPU."""
    names = variant.kernel.arg_names
    signature = {name: "constexpr" if name in variant.constants else _type(name, variant.dtype) for name in names}
    # What Triton itself would find: aligned pointers, sizes and strides that 16 divides.
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name].startswith("*") or name in ("H", "I", "stride_x", "stride_e", "stride_n")
    }
    source = ASTSource(variant.kernel, signature, variant.constants, attributes)
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    usage = _usage(compiled.asm["cubin"])
    # Shared memory is asked for at launch, so the binary itself does not name it.
    shared = max(int(compiled.metadata.shared), usage["SHARED"])
    return Resources(
        variant.kernel.__name__, variant.name, arch, usage["REG"], usage["STACK"], usage["LOCAL"], shared,
        variant.num_warps, variant.num_stages,
    )  # fmt: skip


def layer_variants(config: KernelConfig, dtype: torch.dtype, experts: int, top_k: int, even: bool) -> Iterator[Variant]:
    """The kernels that one layer launches. ``even``: the block sizes divide H and I."""
    label = f"{_TYPES[dtype]} E={experts} block_m={config.block_m}{'' if even else ' odd'}"
    upcast = {**precision_of(dtype), "UPCAST": False}
    up, low = config.gate_up, config.down
    yield Variant(
        label, _kernels.gate_up,
        {"WEIGHT_ON_INPUT": not even, "EVEN_H": even, **upcast, "BLOCK_M": config.block_m, "BLOCK_N": up.block_n,
         "BLOCK_K": up.block_k, "GROUP_M": config.group_m}, dtype, up.num_warps, up.num_stages,
    )  # fmt: skip
    blocks = {"BLOCK_M": config.block_m, "BLOCK_N": low.block_n, "BLOCK_K": low.block_k}
    common = {"APPLY_WEIGHT": True, "EVEN_I": even, **upcast, **blocks}
    to = {"rows": "rows", "atomic": "atomic", "by_expert": ""}[config.reduction]
    if top_k == 1 and to:
        to = "token"  # one row per token: nothing is left to add up
    if to:
        constants = {**common, "TO": to, "GROUP_M": config.group_m}
        yield Variant(f"{label} {to}", _kernels.down, constants, dtype, low.num_warps, low.num_stages)
    else:
        constants = {**common, "BK": triton.next_power_of_2(top_k)}
        yield Variant(label, _kernels.down_by_expert, constants, dtype, low.num_warps, low.num_stages)
    if to == "rows":
        yield Variant(label, _kernels.add_up, {"BLOCK": ADD_UP_COLUMNS}, dtype, 4)


def route_variants(experts: int, top_k: int, block_m: int, given: bool = False) -> Iterator[Variant]:
    """The routing kernels at the largest block of tokens that they are given.

    ``given``: ids come from outside, of all ranks, as in vLLM; else the kernels choose from logits.
    """
    block_e = max(16, triton.next_power_of_2(experts))
    block_k = triton.next_power_of_2(top_k)
    most = max(1, ROUTE_ELEMENTS // max(block_e, block_k))
    sizes = {"HAS_MAP": given, "BT": most, "BE": block_e, "BK": block_k}
    flags = {"HAS_LOGITS": not given, "SIGMOID": False, "HAS_BIAS": False, "RENORMALISE": True}
    label = f"E={experts} K={top_k}{' given' if given else ''}"
    for kernel, constants, num_warps in (
        (_route.route_once, {**flags, **sizes, "BLOCK_M": block_m}, ROUTE_WARPS),
        (_route.route_choose, {**flags, **sizes}, CHOOSE_WARPS),
        (_route.route_place, {**sizes, "BLOCK_M": block_m}, ROUTE_WARPS),
    ):
        yield Variant(label, kernel, constants, torch.bfloat16, num_warps)


def shipped_variants() -> Iterator[Variant]:
    """Every kernel at the sizes that default_config chooses, bf16 and fp32; each way to sum; both ways to route."""
    for dtype in (torch.bfloat16, torch.float32):
        for tokens in (1, 64, 256, 4096):
            config = default_config(tokens, 16, 8, dtype.itemsize)
            yield from layer_variants(config, dtype, 16, 8, even=True)
    for dtype, even in ((torch.bfloat16, True), (torch.float16, False)):
        small, large = (default_config(tokens, 16, 8, dtype.itemsize) for tokens in (8, 4096))
        yield from layer_variants(replace(small, reduction="by_expert"), dtype, 16, 8, even)
        yield from layer_variants(replace(small, reduction="atomic"), dtype, 16, 8, even)
        yield from layer_variants(large, dtype, 16, 1, even)
    for experts, top_k in ((8, 8), (13, 2), (32, 8), (64, 8), (128, 1), (512, 10)):
        yield from route_variants(experts, top_k, 64)
    for experts, top_k in ((8, 8), (16, 1), (128, 8)):
        yield from route_variants(experts, top_k, 64, given=True)


def _type(name: str, dtype: torch.dtype) -> str:
    """Triton's type of a kernel's argument, by its name; sizes and strides are i32."""
    if name in ("x", "w13", "w2", "h", "y", "out"):
        return f"*{_TYPES[dtype]}"
    if name in ("logits", "bias", "weights", "topk_weights"):
        return "*fp32"
    if name in ("order", "rows", "offsets", "blocks", "ids", "topk_ids", "expert_map", "counts_of_chunks"):
        return "*i32"
    return "fp32" if name in ("inverse_temperature", "scale") else "i32"


def _usage(cubin: bytes) -> dict[str, int]:
    """Return {REG, STACK, SHARED, LOCAL} of a binary, as the cuobjdump in Triton's wheel reads it."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", said.stdout)}
    return found


def main() -> int:
    """Compile what ships for each architecture; print one JSON line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90, 100], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--only", default="", help="kernels or variants whose label contains this")
    args = parser.parse_args()
    bad = 0
    for variant in shipped_variants():
        if args.only not in f"{variant.kernel.__name__} {variant.name}":
            continue
        for arch in args.arch:
            found = resources(variant, arch)
            bad += not found.fits
            print(json.dumps({**asdict(found), "fits": found.fits, "triton": triton.__version__}), flush=True)
    return int(bad > 0)


if __name__ == "__main__":
    raise SystemExit(main())
