"""What it costs that one server answers for many specialists, and what each takes in memory.

    python bench/bench_specialists.py                      # leap-tiny and a random 150M-parameter model
    python bench/bench_specialists.py --model leap-tiny --rounds 2 --requests 8

Two servers of the same model, on all the machine's cores but never asked at the same time: `stock` is vLLM
without our plugin, `shared` has four specialists of a quarter of the experts each, one of them with a router
head. Every round puts requests of the same lengths over HTTP to both, by turns, 32 at a time: to `stock` all for the model,
to `shared` dealt over the model and its specialists (`mixed`), and again all for the model (`base`), which
tells what the specialists' being there costs those who do not use them. Requests choose equally many experts
per token everywhere, so that the work is the same. Pairs are compared as ratios of throughput per round.
Memory is what the server says of each specialist, and what its processes grew by as 32 more were loaded.
Rows go to bench/results/specialists.jsonl.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx

from leap_serve.adapter import RouterHead, write_overlays
from leap_serve.bench.contenders import stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import table
from leap_serve.cut.write import cut
from leap_serve.files import append_jsonl
from leap_serve.measure import ratio, summary
from leap_serve.plan import LayerPlan, Plan
from leap_serve.server.admin import ADMIN_HEADER
from leap_serve.server.launch import Server
from leap_serve.workload import vocabulary_of

RESULTS = Path(__file__).parent / "results" / "specialists.jsonl"
SETTINGS = ("stock", "mixed", "base")
NAMES = ("math", "code", "law", "tuned")
LOADS = {"leap-tiny": (20, 96), "random-150m": (10, 64)}
"""Model: pairs of rounds and requests of each; ten minutes for both on two quiet cores."""
PROMPT, OUTPUT, CONCURRENT, MORE = 64, 32, 32, 32
ADMIN = {ADMIN_HEADER: "sk-admin"}


def synthetic(folder: Path) -> Path:
    """A random Qwen3-MoE of about 150M parameters (hidden 512, 8 layers, 32 experts of 512) with leap-tiny's tokenizer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    tiny = resolve_model("leap-tiny")
    vocabulary = Checkpoint.open(tiny).config["vocab_size"]
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "qwen3_moe", vocab_size=vocabulary, hidden_size=512, intermediate_size=1024, moe_intermediate_size=384,
        num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=4, head_dim=64, num_experts=32,
        num_experts_per_tok=4, norm_topk_prob=True, max_position_embeddings=512, eos_token_id=2,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, folder / name)
    return folder


def plans_of(model: Path, number: int, seed: int = 0) -> list[Plan]:
    """Plans of a quarter of the experts each, drawn per layer, with the model's own top_k."""
    source, draw = Checkpoint.open(model), random.Random(seed)
    experts, top_k, identity = source.num_experts, source.top_k, source.identity()
    kept = max(top_k, experts // 4)
    return [
        Plan(
            identity, experts,
            {i: LayerPlan(tuple(sorted(draw.sample(range(experts), kept))), top_k) for i in source.moe_layers},
        )
        for _ in range(number)
    ]  # fmt: skip


def specialists_of(model: Path, folder: Path) -> dict[str, Path]:
    """Three plans, and a cut whose router is another."""
    import torch

    plans = dict(zip(NAMES, plans_of(model, len(NAMES)), strict=True))
    cut(model, plans["tuned"], folder / "tuned")
    hidden = Checkpoint.open(model).config["hidden_size"]
    torch.manual_seed(1)
    head = {i: RouterHead(torch.randn(len(p.retained), hidden) * 0.05) for i, p in plans["tuned"].layers.items()}
    write_overlays(folder / "tuned", router_head=head, adapter=None, made_by={})
    for name in NAMES[:-1]:
        plans[name].save(folder / f"{name}.json")
    return {name: folder / (f"{name}.json" if name != "tuned" else "tuned") for name in NAMES}


class Rounds:
    """The same requests to either server."""

    def __init__(self, servers: dict[str, Server], vocabulary: list[int], requests: int) -> None:
        self.servers, self.vocabulary, self.requests = servers, vocabulary, requests

    def run(self, setting: str, number: int) -> float:
        """Return the output tokens per second of one round; another number asks other prompts."""
        draw = random.Random(number)
        names = ["base"] if setting != "mixed" else ["base", *NAMES]
        bodies = [
            {
                "model": names[place % len(names)], "prompt": draw.choices(self.vocabulary, k=PROMPT), "temperature": 0,
                "max_tokens": OUTPUT, "ignore_eos": True,
            }
            for place in range(self.requests)
        ]  # fmt: skip
        return asyncio.run(self._ask(self.servers["stock" if setting == "stock" else "shared"].url, bodies))

    async def _ask(self, url: str, bodies: list[dict[str, Any]]) -> float:
        async with httpx.AsyncClient(
            base_url=url, timeout=600, limits=httpx.Limits(max_connections=CONCURRENT)
        ) as client:
            left, tokens = iter(bodies), 0

            async def work() -> None:
                nonlocal tokens
                for body in left:
                    answer = (await client.post("/v1/completions", json=body)).raise_for_status().json()
                    tokens += answer["usage"]["completion_tokens"]

            began = time.perf_counter()
            await asyncio.gather(*(work() for _ in range(CONCURRENT)))
            return tokens / (time.perf_counter() - began)


def throughput(rounds: Rounds, pairs: int) -> dict[str, Any]:
    """Tokens per second of each setting, and the ratios to stock, pair by pair."""
    found: dict[str, list[float]] = {setting: [] for setting in SETTINGS}
    for number in range(-1, pairs):
        for setting in SETTINGS if number % 2 == 0 else SETTINGS[::-1]:
            value = rounds.run(setting, number * len(SETTINGS) + SETTINGS.index(setting))
            if number >= 0:  # the first round warms up
                found[setting].append(value)
    return {
        "output_tok_s": {setting: summary(values).to_json() for setting, values in found.items()},
        "over_stock": {name: ratio(found[name], found["stock"]).to_json() for name in SETTINGS[1:]},
    }


def private_mib(pid: int) -> float:
    """Memory that a process and its descendants share with nobody, in MiB."""
    children = [int(path.parent.name) for path in Path("/proc").glob("[0-9]*/stat") if _parent(path) == pid]
    own = 0
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        own += int(line.split()[1]) if line.startswith("Private") else 0
    return own / 1024 + sum(map(private_mib, children))


def _parent(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[1])
    except OSError:
        return -1


def memory(server: Server, model: Path) -> dict[str, Any]:
    """Bytes of each specialist as the server counts them, and MiB by which its processes grew for each of 32 more."""
    with httpx.Client(base_url=f"{server.url}/v1/leap", headers=ADMIN, timeout=120) as client:
        stated = {card["name"]: card["bytes"] for card in client.get("/specialists").json()["data"]}
        before = private_mib(server.pid)
        for number, plan in enumerate(plans_of(model, MORE, seed=1)):
            body = {"name": f"more-{number}", "plan": plan.to_json()}
            client.post("/specialists", json=body).raise_for_status()
        grown = private_mib(server.pid) - before
        for number in range(MORE):
            client.delete(f"/specialists/more-{number}").raise_for_status()
    return {"bytes": stated, "grown_mib_each": grown / MORE, "model_bytes": Checkpoint.open(model).weight_bytes}


def measure(name: str, model: Path, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """One model's row."""
    pairs, requests = LOADS.get(name, LOADS["leap-tiny"])
    pairs, requests = args.rounds or pairs, args.requests or requests
    common = ["--name", "base", "--dtype", args.dtype]
    vllm = ["--", "--max-num-seqs", str(CONCURRENT), "--max-model-len", "256", "--disable-uvicorn-access-log"]
    named = [f"--specialist={one}={path}" for one, path in specialists_of(model, folder).items()]
    env = {"VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    with ExitStack() as stack:
        stock = stack.enter_context(Server(model, [*common, *vllm], {**env, "VLLM_PLUGINS": ""}))
        shared = stack.enter_context(Server(model, [*common, *named, "--admin-key", "sk-admin", *vllm], env))
        rounds = Rounds({"stock": stock, "shared": shared}, vocabulary_of(model), requests)
        return {
            "bench": "specialists", "model": name, "dtype": args.dtype, "requests": requests,
            "concurrent": CONCURRENT, "prompt_tokens": PROMPT, "output_tokens": OUTPUT, "specialists": list(NAMES),
            "pairs": pairs, "threads": os.environ.get("OMP_NUM_THREADS"), **throughput(rounds, pairs),
            "memory": memory(shared, model),
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="default: leap-tiny and a random 150M-parameter model")
    parser.add_argument("--rounds", type=int, help="pairs (default: 20, 10 for the 150M model)")
    parser.add_argument("--requests", type=int, help="per round (default: 96, 64 for the 150M model)")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--dry-run", action="store_true", help="measure, print and write no row")
    args = parser.parse_args()
    rows = []
    for name in args.model or ["leap-tiny", "random-150m"]:
        with tempfile.TemporaryDirectory() as folder:
            model = synthetic(Path(folder, name)) if name == "random-150m" else resolve_model(name)
            row = stamped(measure(name, model, Path(folder), args))
        rows.append(row)
        if not args.dry_run:
            append_jsonl(RESULTS, row)
    table(
        f"requests of {PROMPT}+{OUTPUT} tokens, {CONCURRENT} at a time",
        ["model", "pairs", "stock tok/s", "mixed / stock", "base / stock", "KiB per specialist", "with a head", "model MiB"],
        [
            [
                row["model"], f"{row['pairs']} of {row['requests']}", f"{row['output_tok_s']['stock']['median']:.1f}",
                *(
                    f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]"
                    for r in (row["over_stock"][setting] for setting in SETTINGS[1:])
                ),
                f"{row['memory']['bytes']['math'] / 1024:.1f}", f"{row['memory']['bytes']['tuned'] / 1024:.1f}",
                f"{row['memory']['model_bytes'] / 2**20:.1f}",
            ]
            for row in rows
        ],
    )  # fmt: skip
    print(json.dumps([row["over_stock"] for row in rows]))


if __name__ == "__main__":
    main()
