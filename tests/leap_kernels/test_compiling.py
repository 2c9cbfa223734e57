"""Ahead-of-time compilation for chips that are not here: nothing spills, shared memory suffices."""

from __future__ import annotations

import pytest
import torch

from leap_kernels import compiling
from leap_kernels.compiling import Resources, Variant, layer_variants, resources, route_variants, shipped_variants
from leap_kernels.config import KernelConfig, Tile, default_config

pytestmark = pytest.mark.skipif(
    hasattr(compiling._kernels.gate_up, "rewriter"), reason="Triton interprets in this process: nothing is compiled"
)
ARCHITECTURES = [80, 90, 100]


def assert_fits(variants: list[Variant], arch: int) -> None:
    found = [resources(variant, arch) for variant in variants]
    assert all(one.registers > 0 for one in found)
    assert [one for one in found if not one.fits] == []


@pytest.mark.e2e
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_decode_and_prefill_in_bf16_fit(arch: int) -> None:
    """The launches that serve: few rows, many rows, and the routing of 16 experts."""
    variants = [
        v for m in (1, 4096) for v in layer_variants(default_config(m, 16, 8, 2), torch.bfloat16, 16, 8, even=True)
    ]
    assert_fits([*variants, *route_variants(16, 8, 16)], arch)


def test_what_ships_covers_every_kernel_and_every_way_to_sum() -> None:
    """A kernel that nobody compiles could spill unseen."""
    shipped = list(shipped_variants())
    modules = (compiling._kernels, compiling._route)
    ours = {
        name for module in modules for name, f in vars(module).items() if hasattr(f, "arg_names") and name[0] != "_"
    }
    assert {variant.kernel.__name__ for variant in shipped} == ours
    assert {v.constants["TO"] for v in shipped if v.kernel.__name__ == "down"} == {"rows", "token", "atomic"}
    routed = {(v.constants["HAS_LOGITS"], v.constants["HAS_MAP"]) for v in shipped if "HAS_LOGITS" in v.constants}
    assert routed == {(True, False), (False, True)}
    assert {v.dtype for v in shipped} == {torch.float32, torch.float16, torch.bfloat16}


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_everything_that_ships_fits(arch: int) -> None:
    assert_fits(list(shipped_variants()), arch)


@pytest.mark.e2e
def test_the_check_can_fail() -> None:
    """Two fp32 tiles of 64 × 64 on four warps do not stay in an A100's registers; they were our default once."""
    greedy = KernelConfig(64, 8, Tile(64, 32, 4, 3), Tile(64, 32, 4, 3))
    found = resources(next(layer_variants(greedy, torch.float32, 16, 8, even=True)), 80)
    assert not found.fits and found.stack > 0


def test_limits() -> None:
    sound = Resources("down", "", 90, 128, 0, 0, 227 * 1024, 4, 3)
    assert sound.fits
    for change in ({"stack": 8}, {"local": 8}, {"shared": 227 * 1024 + 1}):
        assert not Resources(
            **{**{name: getattr(sound, name) for name in Resources.__dataclass_fields__}, **change}
        ).fits
