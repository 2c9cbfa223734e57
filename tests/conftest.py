"""Fixtures that several files share. One process, one set of tiny checkpoints."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # The workers share the cores: their engines neither spin on all of them nor bind to the same ones.
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

from families import make_checkpoint

# tests/ is on sys.path for `families` and its like, and so Python would take the folder tests/leap_serve for a
# namespace package of that name before it asks the editable install: the real packages are imported without it.
_TESTS = [entry for entry in sys.path if entry == str(Path(__file__).parent)]
sys.path[:] = [entry for entry in sys.path if entry not in _TESTS]
for _package in ("leap_serve", "leap_vllm", "leap_kernels", "leap_training"):
    importlib.import_module(_package)
sys.path[:0] = _TESTS

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def family_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that gives the fp32 random checkpoint of a family, made once per session."""
    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = make_checkpoint(family, tmp_path_factory.mktemp(family) / family)
        return made[family]

    return get


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of public evaluation data beside the checkout; tests that need it are skipped without it."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the public data samples are not beside this checkout")
    return SHARED / "data"
