"""Triton kernels sized to the retained experts. Imports torch and triton only."""

from leap_kernels.fused_moe import fused_moe
from leap_kernels.reference import reference_moe

__all__ = ["fused_moe", "reference_moe"]
