"""``leap serve --unmerged``: adapters that vLLM applies by its own LoRA path instead of finding them merged."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

from families import make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.errors import LeapError
from leap_serve.server.launch import Server
from leap_serve.weights.overlays import ADAPTER, ADAPTER_CONFIG, ADAPTER_FOLDER
from leap_serve.weights.unmerged import VARIABLE, rank_for_vllm
from parity import CONTROL, TOLERANCE, largest_difference, uneven_plan
from processes import SERVER_ENV
from serving import ENVIRONMENT, Job, serve
from tiny_tokenizer import add_tokenizer
from tuning import cut_in_memory, logprobs_of, random_head, tune_at_random

pytestmark = pytest.mark.e2e
SCRIPT = Path(__file__).parents[1] / "lora_script.py"
PROMPTS = [[*range(5, 5 + length)] for length in (1, 2, 3, 6)] + [[11, 3, 4], [40, 2, 17, 30]]
FAMILIES = ("qwen3_moe", "glm4_moe")
GPU_TOLERANCE = 0.3
"""Of a log-probability in float32: Triton multiplies in TF32."""


def tuned_cut(full: Path, folder: Path) -> Path:
    """A cut of the full model, every layer with a count of its own, with a random router head and adapter."""
    cut(full, uneven_plan(full), folder / "cut")
    tune_at_random(full, uneven_plan(full), folder / "cut", folder / "adapter")
    return folder / "cut"


@pytest.fixture(scope="module")
def refusing(family_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tuned cuts of families that vLLM cannot take, and of one that it can."""
    work = tmp_path_factory.mktemp("unmerged")
    return {
        name: tuned_cut(family_checkpoint(name), work / name)
        for name in ("qwen3_moe", "mixtral", "llama4_text", "gpt_oss")
    }


def test_vllm_applies_what_peft_applies(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """And answers as the cut with its router head alone where a request does not name the adapter."""
    expected = {}
    for name in FAMILIES:
        full = family_checkpoint(name)
        plan, folder = uneven_plan(full), tmp_path / name / "cut"
        cut(full, plan, folder)
        head_alone = cut_in_memory(full, plan)
        random_head(head_alone, plan, (1, 2))
        tuned = tune_at_random(full, plan, folder, tmp_path / name / "adapter")
        expected[str(folder)] = {"cut": logprobs_of(head_alone, PROMPTS), "tuned": logprobs_of(tuned, PROMPTS)}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(PROMPTS), *expected], env={**os.environ, **ENVIRONMENT},
        capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    for folder, found in json.loads(done.stdout.splitlines()[-1]).items():
        last = {name: [rows[-1] for rows in expected[folder][name]] for name in ("cut", "tuned")}
        got = {name: [torch.tensor(row) for row in found[name]] for name in ("cut", "tuned")}
        assert largest_difference(got["tuned"], last["tuned"]) <= TOLERANCE
        assert largest_difference(got["cut"], last["cut"]) <= TOLERANCE
        assert largest_difference(got["cut"], last["tuned"]) > CONTROL


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("llama4_text", "weighs an adapter's output by the router, but llama4_text weighs the experts' input"),
        ("gpt_oss", "orders gate and up of gpt_oss's adapters otherwise"),
        ("mixtral", "which mixtral names otherwise: vLLM would skip it"),
    ],
)
def test_families_that_vllm_would_get_wrong_are_refused(refusing: dict[str, Path], family: str, said: str) -> None:
    with pytest.raises(LeapError, match=said):
        rank_for_vllm(Checkpoint.open(refusing[family]))


def test_the_rank_is_one_that_vllm_takes(refusing: dict[str, Path]) -> None:
    checkpoint = Checkpoint.open(refusing["qwen3_moe"])
    assert json.loads((checkpoint.folder / ADAPTER_CONFIG).read_text())["r"] == 3
    assert rank_for_vllm(checkpoint) == 8


def test_half_an_adapter_and_none_are_refused(refusing: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(refusing["qwen3_moe"], tmp_path / "cut"))
    tensors = load_file(folder / ADAPTER)
    kept = {name: value for name, value in tensors.items() if "layers.1." not in name or "base_layer" in name}
    fingerprint = {"leap_fingerprint": Checkpoint.open(folder).plan.fingerprint}  # type: ignore[union-attr]
    save_file(kept, folder / ADAPTER, metadata=fingerprint)
    with pytest.raises(LeapError, match="adapts no down_proj in layer 1, and vLLM takes both"):
        rank_for_vllm(Checkpoint.open(folder))
    shutil.rmtree(folder / ADAPTER_FOLDER)
    with pytest.raises(LeapError, match=f"status 2: --unmerged: is given, but .* has no {ADAPTER}"):
        Server(folder, ["--unmerged"], SERVER_ENV)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU serves it")
def test_refused_on_a_cpu_before_anything_is_loaded(refusing: dict[str, Path]) -> None:
    with pytest.raises(LeapError, match="status 1: --unmerged: vLLM applies adapters to experts on a GPU only"):
        Server(refusing["qwen3_moe"], ["--unmerged"], SERVER_ENV)


def test_the_variable_alone_serves_nothing_else_by_mistake(refusing: dict[str, Path]) -> None:
    (got,) = serve([Job(str(refusing["qwen3_moe"]), [[5, 6]])], {VARIABLE: "1"})
    assert got.error == "UsageError"
    assert f"{VARIABLE}: leaves {ADAPTER} to vLLM, which needs --enable-lora and --max-lora-rank 8" in got.message


@pytest.mark.gpu
def test_unmerged_equals_merged_on_a_gpu(tmp_path: Path) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    sizes = dict(hidden_size=128, head_dim=64, intermediate_size=128, moe_intermediate_size=64)
    folder = tuned_cut(add_tokenizer(make_checkpoint("qwen3_moe", tmp_path / "model", **sizes)), tmp_path)

    def answers(model: str, *flags: str) -> dict[str, torch.Tensor]:
        """Log-probabilities of the same continuation, for each of the server's models."""
        env = {"VLLM_LOGGING_LEVEL": "ERROR", "HF_HUB_OFFLINE": "1"}
        with Server(folder, ["--name", model, "--dtype", "float32", *flags], env) as server:
            names = [one["id"] for one in httpx.get(f"{server.url}/v1/models").json()["data"]]
            asked = {"prompt": PROMPTS[3], "max_tokens": 1, "echo": True, "logprobs": 0, "temperature": 0}
            found = {}
            for name in names:
                told = httpx.post(f"{server.url}/v1/completions", json={"model": name, **asked}, timeout=120).json()
                found[name] = torch.tensor(told["choices"][0]["logprobs"]["token_logprobs"][1 : len(PROMPTS[3])])
            return found

    merged, unmerged = answers("tuned")["tuned"], answers("tuned", "--unmerged")
    assert set(unmerged) == {"tuned", "tuned-cut"}
    assert float((unmerged["tuned"] - merged).abs().max()) <= GPU_TOLERANCE
    assert float((unmerged["tuned-cut"] - merged).abs().max()) > GPU_TOLERANCE
