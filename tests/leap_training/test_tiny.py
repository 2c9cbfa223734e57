"""The trainer of leap-tiny: a miniature learns, and a killed run continues to the same weights."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file

MINIATURE = (
    "from pathlib import Path; from leap_training.tiny import TinyConfig, train; import sys;"
    "train(TinyConfig(hidden=64, layers=2, experts=8, top_k=2, vocab=640, batch=16, steps=int(sys.argv[2]),"
    " warmup=10, lr=3e-3), Path(sys.argv[1]), save_every=10, log_every=5)"
)


def run_miniature(out: Path, steps: int, **kwargs: object) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", MINIATURE, str(out), str(steps)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL)


@pytest.mark.e2e
def test_a_miniature_learns_loads_and_survives_sigkill(tmp_path: Path) -> None:
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert run_miniature(straight, 60).wait(timeout=240) == 0
    losses = [json.loads(line)["loss"] for line in (straight / "train.jsonl").read_text().splitlines()]
    assert losses[-1] < 0.6 * losses[0]

    process = run_miniature(killed, 60)
    deadline = time.time() + 240
    while not (killed / "state.safetensors").exists() and time.time() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "model").exists()
    assert run_miniature(killed, 60).wait(timeout=240) == 0
    ours, theirs = load_file(killed / "model/model.safetensors"), load_file(straight / "model/model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(straight / "model")
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    assert model.config.model_type == "qwen3_moe"
    text = "Question: Anna has 12 apples and buys 30 more.\nAnswer: é 漢字"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False) == "Question: hi\nAnswer:"


@pytest.mark.parametrize("adapted", [False, True])
def test_grouped_experts_equal_what_transformers_computes(adapted: bool) -> None:
    import torch

    from leap_training.adapters import wrap
    from leap_training.tiny import FORMS, batch_of, build_model, build_tokenizer, loss_of

    config = replace(FORMS["llama4_text"], hidden=32, layers=2, experts=8, vocab=512, batch=4)
    tokenizer = build_tokenizer(config)
    model = build_model(config, tokenizer)
    batch = batch_of(config, tokenizer, 0)
    if adapted:
        model = wrap(model, 2, 2)
        for name, parameter in model.named_parameters():
            if ".lora_B." in name:
                torch.nn.init.normal_(parameter)

    def losses() -> list[torch.Tensor]:
        model.zero_grad()
        loss, balance = loss_of(model, batch)
        (loss + balance).backward()
        return [loss.detach(), balance.detach(), *(p.grad for p in model.parameters() if p.requires_grad)]

    ours = losses()
    replaced = [vars(module).pop("forward", None) for module in model.modules()]
    assert sum(one is not None for one in replaced) == 2  # the block and its experts
    for fast, slow in zip(ours, losses(), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-6)


def test_the_second_form_is_llama_4s(tmp_path: Path) -> None:
    from leap_serve.checkpoint import Checkpoint
    from leap_training.tiny import FORMS, build_model, build_tokenizer, export

    config = replace(FORMS["llama4_text"], hidden=32, experts=8, vocab=512)
    tokenizer = build_tokenizer(config)
    export(build_model(config, tokenizer), tokenizer, config, tmp_path / "model")
    made = Checkpoint.open(tmp_path / "model")
    assert (made.family.router_kind, made.family.weight_on_input, made.top_k) == ("sigmoid", True, 1)
    # Of four layers every other one is dense, and a shared expert stands beside the routed ones.
    assert list(made.moe_layers) == [1, 3]
    assert {name.split(".")[-3] for name in made.tensors if "shared_expert" in name} == {"shared_expert"}
