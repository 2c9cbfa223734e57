"""What several of the file side's tests start from."""

from __future__ import annotations

from pathlib import Path

import pytest

from synthetic import make, qwen_config, qwen_tensors


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A synthetic Qwen3-MoE of two layers, eight experts each, top-2 (see cutting.UNEVEN, cutting.EVEN)."""
    return make(tmp_path / "src" / "m", qwen_tensors(), qwen_config())
