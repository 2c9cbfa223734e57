"""Runs the kernel tests in Triton's interpreter: it must be chosen before Triton is imported, hence the processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ENV = {
    **os.environ, "TRITON_INTERPRET": "1", "TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1",
    "PYTHONSAFEPATH": "1", "CUDA_VISIBLE_DEVICES": "", "VLLM_PLUGINS": "", "TRITON_DEFAULT_BACKEND": "cpu",
    # vLLM disables its kernels unless Triton has a backend for the CPU. Another Triton may come first on the path.
    "PYTHONPATH": os.pathsep.join(
        [*filter(None, [os.environ.get("PYTHONPATH")]), str(HERE.parent / "fixtures" / "triton_cpu")]
    ),
}  # fmt: skip


def interpreted(file: str, marks: str) -> None:
    """Run a test file in a process whose Triton interprets; nothing in it may be skipped for want of that."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", marks, "-p", "no:cacheprovider", str(HERE / file)]
    done = subprocess.run(command, env=ENV, cwd=HERE.parents[1], capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout


@pytest.mark.e2e
def test_kernels() -> None:
    interpreted("test_fused_moe.py", "not slow and not gpu")


@pytest.mark.e2e
def test_vllms_kernel_as_oracle() -> None:
    interpreted("test_vllm_oracle.py", "not slow and not gpu")


@pytest.mark.slow
def test_wide_sweep() -> None:
    interpreted("test_fused_moe.py", "slow and not gpu")
