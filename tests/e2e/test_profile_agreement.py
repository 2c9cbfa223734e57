"""The serving engine and transformers see the same experts do the same things, in every family."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from families import SPECIFIC, make_checkpoint
from leap_serve.engines.torch_engine import TorchEngine
from leap_serve.engines.vllm_engine import VllmEngine
from leap_serve.profile import CHANNEL_SUMS, STATISTICS, Profile
from leap_serve.tasks.base import Item
from tiny_tokenizer import add_tokenizer, talking_copy

pytestmark = pytest.mark.e2e
# Shared prefixes (a prefix cache would hide tokens), an empty prompt, and lengths that fill no block evenly.
ITEMS = [
    Item("0", "The quick brown fox", " jumps over the lazy dog."),
    Item("1", "The quick brown fox", " sleeps."),
    Item("2", "", "def f(x):\n    return x + 1\n"),
    Item("3", "0123456789 " * 5, "ABC"),
]
TOKENS = sum(len(item.prompt) + len(item.answer) for item in ITEMS)


@pytest.mark.parametrize("family", SPECIFIC)
def test_vllm_and_transformers_agree(family: str, family_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    model = talking_copy(family_checkpoint(family), tmp_path / family)
    reference = TorchEngine(model, dtype="float32", device="cpu")
    # Channel sums need one gate, up and down matrix per expert.
    channels = family != "gpt_oss"
    expected, expected_scores = reference.profile(ITEMS, channels=channels), reference.score(ITEMS)
    reference.close()
    # 48 tokens per step: prompts are prefilled in several chunks, mixed in one batch.
    engine = VllmEngine(model, dtype="float32", kv_cache_gib=0.05, max_model_len=128, max_num_batched_tokens=128,
                        long_prefill_token_threshold=24)  # fmt: skip
    try:
        before = engine.generate([item.prompt + item.answer for item in ITEMS], 6)
        found = engine.profile(ITEMS, channels=channels)
        watched = engine._rpc("leap_start_profile"), engine.score(ITEMS), engine._rpc("leap_stop_profile")
        scores = engine.score(ITEMS)
        after = engine.generate([item.prompt + item.answer for item in ITEMS], 6)
    finally:
        engine.close()
    assert before == after
    assert watched[1] == scores, "recording changed what the model computes"
    np.testing.assert_allclose([s.logprob for s in scores], [s.logprob for s in expected_scores], rtol=1e-4)
    assert [s.tokens for s in scores] == [s.tokens for s in expected_scores]
    assert found.tokens == expected.tokens == TOKENS
    assert (found.base, found.top_k, found.data_sha256) == (expected.base, expected.top_k, expected.data_sha256)
    for index, layer in expected.layers.items():
        for name in (*STATISTICS, *(CHANNEL_SUMS if channels else ())):
            # A square of what an expert chosen once hardly lets through has few digits that two kernels share.
            least = 1e-6 if name in CHANNEL_SUMS else 1e-9
            np.testing.assert_allclose(
                getattr(found.layers[index], name), getattr(layer, name), rtol=1e-4, atol=least,
                err_msg=f"{family}, layer {index}, {name}",
            )  # fmt: skip
        assert layer.n.sum() == TOKENS * expected.top_k[index]
        assert len(np.flatnonzero(layer.n)) > expected.top_k[index], "the routing must not be trivial"


TENSOR_PARALLEL = """
import sys
from pathlib import Path
from leap_serve.tasks.base import Item
from leap_serve.engines.vllm_engine import VllmEngine

if __name__ == "__main__":
    engine = VllmEngine(sys.argv[1], dtype="float32", kv_cache_gib=0.05, max_model_len=128, tensor_parallel_size=2)
    engine.profile([Item("0", "The quick brown fox", " jumps.")]).save(Path(sys.argv[2]))
    print(engine.memory().weights_bytes)
    engine.close()
"""


def test_tensor_parallel_workers_see_whole_outputs(tmp_path: Path) -> None:
    """Each of two workers holds half of every expert: norms of halves would be wrong, so halves are summed first."""
    # GPT-OSS since its experts have biases, which must be added once; stock vLLM shares no KV head between workers.
    model = add_tokenizer(make_checkpoint("gpt_oss", tmp_path / "gpt_oss", num_key_value_heads=2))
    (tmp_path / "run.py").write_text(TENSOR_PARALLEL)
    command = [sys.executable, str(tmp_path / "run.py"), str(model), str(tmp_path / "prof")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    found = Profile.load(tmp_path / "prof")
    reference = TorchEngine(model, dtype="float32", device="cpu")
    expected = reference.profile([Item("0", "The quick brown fox", " jumps.")])
    reference.close()
    for index, layer in expected.layers.items():
        for name in STATISTICS:
            np.testing.assert_allclose(
                getattr(found.layers[index], name), getattr(layer, name), rtol=1e-4, atol=1e-9, err_msg=name
            )
