"""A full model and four specialists behind one server, and how tests ask it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from families import make_checkpoint
from leap_serve.adapter import RouterHead, write_overlays
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.plan import Plan
from leap_serve.server.admin import ADMIN_HEADER
from leap_serve.server.launch import Server
from parity import uneven_plan
from processes import SERVER_ENV
from tiny_tokenizer import add_tokenizer

BASE, ADMIN = "base", {ADMIN_HEADER: "sk-admin"}
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
SHORT, LONG = "Once upon a time", "The quick brown fox jumps over the lazy dog. " * 4
"""LONG is more than a block of the KV cache (128 tokens), so that there is something to find in the prefix cache."""
TOKENS = 10
PATIENT = {"VLLM_HTTP_TIMEOUT_KEEP_ALIVE": "600"}
"""An idle connection that the server closes while a slow client writes to it looks like a fault: here it never does."""


@dataclass(frozen=True)
class Shared:
    """A served model and its specialists: server, folder of the model, folder of each specialist's cut."""

    server: Server
    model: Path
    cuts: dict[str, Path]
    state: Path


def plans_of(model: Path) -> dict[str, Plan]:
    """Three uneven plans: with τ, of one expert per token, and one whose router is tuned below."""
    lone = uneven_plan(model, 3)
    return {
        "math": uneven_plan(model, 1),
        "code": replace(lone, layers={index: replace(layer, top_k=1) for index, layer in lone.layers.items()}),
        "law": uneven_plan(model, 2, (1.0,) * 4),
        "tuned": uneven_plan(model, 4),
    }


def tune(folder: Path) -> None:
    """Lay a router head beside a cut that changes what its layers choose, all but the second's."""
    checkpoint, draw = Checkpoint.open(folder), torch.Generator().manual_seed(0)
    assert checkpoint.plan is not None
    head = {
        index: RouterHead(torch.randn(len(layer.retained), 64, generator=draw) * 0.2)
        for index, layer in checkpoint.plan.layers.items()
        if index != 1
    }
    write_overlays(folder, router_head=head, adapter=None, made_by={"version": "test", "argv": ["pytest"]})


def made(folder: Path) -> tuple[Path, dict[str, Path]]:
    """Make a random fp32 model and the cuts of its specialists, one of them with a router head; returns their folders."""
    model = add_tokenizer(make_checkpoint("qwen3_moe", folder / "model"))
    plans = plans_of(model)
    for name, plan in plans.items():
        cut(model, plan, folder / name)
    tune(folder / "tuned")
    return model, {name: folder / name for name in plans}


@contextmanager
def sharing(folder: Path) -> Iterator[Shared]:
    """Serve a random fp32 model and its specialists from files in ``folder``."""
    model, cuts = made(folder)
    named = [f"--specialist={name}={path / 'leap.json'}" for name, path in cuts.items()]
    flags = [*named, "--name", BASE, "--dtype", "float32", "--admin-key", "sk-admin", "--state", str(folder / "state")]
    # So few blocks that requests are preempted and begun again, and that memory soon stops growing.
    vllm = ["--", "--chat-template", TEMPLATE, "--max-model-len", "256", "--num-gpu-blocks-override", "48"]
    env = {**SERVER_ENV, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", **PATIENT}
    with Server(model, [*flags, *vllm], env) as server:
        yield Shared(server, model, cuts, folder / "state")


def ask(shared: Shared, model: str, prompt: str | list[str], **more: Any) -> httpx.Response:
    body = {"model": model, "prompt": prompt, "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, **more}
    return httpx.post(f"{shared.server.url}/v1/completions", json=body, timeout=120)


def manage(shared: Shared, method: str, path: str = "", **more: Any) -> httpx.Response:
    url = f"{shared.server.url}/v1/leap/specialists{path}"
    return httpx.request(method, url, **{"headers": ADMIN, "timeout": 120, **more})
