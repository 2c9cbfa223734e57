"""What end-to-end tests share: leap-tiny, a cut of it, and ONE server, since a start takes half a minute."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cut.write import cut
from leap_serve.plan import LayerPlan, Plan
from leap_serve.server.launch import Server
from processes import SERVER_ENV


@pytest.fixture(scope="session")
def leap_tiny() -> Path:
    """The bundled model."""
    return resolve_model("leap-tiny")


@pytest.fixture(scope="session")
def uneven_cut(leap_tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """leap-tiny cut to 16, 24, 32, 40, … experts, with top_k 4, 3, 4, 3, … and τ 1, 1, …, 0.5 in its last layer."""
    source = Checkpoint.open(leap_tiny)
    layers = {
        layer: LayerPlan(
            tuple(range(place, source.num_experts))[: 16 + 8 * place],
            source.top_k - place % 2,
            0.5 if layer == source.moe_layers[-1] else 1.0,
        )
        for place, layer in enumerate(source.moe_layers)
    }
    plan = Plan(source.identity(), source.num_experts, layers, made_by={"version": "test", "argv": ["pytest"]})
    out = tmp_path_factory.mktemp("cut") / "leap-tiny-uneven"
    cut(leap_tiny, plan, out)
    return out


@pytest.fixture(scope="session")
def server(leap_tiny: Path) -> Iterator[Server]:
    """leap-tiny served without a key, for all tests that only ask questions."""
    # One process fewer to start: the engine computes where it schedules.
    with Server(leap_tiny, ["--name", "leap-tiny"], {**SERVER_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}) as running:
        yield running
