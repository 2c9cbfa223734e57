"""Real vLLM in a child process: serve checkpoints one after another, get full-vocabulary logprobs or the error.

One child serves many checkpoints, since importing vLLM costs more than loading a tiny model; and what
goes wrong there, a crash in native code included, cannot harm the tests that come after.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "PYTHONSAFEPATH": "1",
}


@dataclass(frozen=True)
class Job:
    """A checkpoint to serve, the token ids to score, and arguments of vllm.LLM."""

    model: str
    prompts: list[list[int]]
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Served:
    """Log-probabilities [tokens, vocabulary] of each prompt, in fp32, or the error's class name and text."""

    logprobs: list[Any]
    error: str
    message: str


def serve(jobs: Sequence[Job], env: Mapping[str, str] | None = None, timeout_s: float = 420) -> list[Served]:
    """Serve every job in one child process, in order."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "jobs.json").write_text(json.dumps([asdict(job) for job in jobs]))
        child = subprocess.run(
            [sys.executable, __file__, folder], env={**os.environ, **ENVIRONMENT, **(env or {})}, timeout=timeout_s,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        )  # fmt: skip
        results = []
        for index in range(len(jobs)):
            path = Path(folder) / f"{index}.json"
            if not path.exists():
                raise RuntimeError(f"vLLM ended with {child.returncode} in job {index}:\n{child.stdout[-6000:]}")
            error, message = json.loads(path.read_text())
            found = {} if error else load_file(path.with_suffix(".safetensors"))
            results.append(Served([found[str(i)] for i in range(len(found))], error, message))
        return results


def main(folder: Path) -> None:
    """The child: write {index}.json, and {index}.safetensors where there was no error."""
    import vllm.v1.worker.cpu_model_runner  # noqa: F401
    from safetensors.torch import save_file

    gc.freeze()  # the modules stay; collecting what an engine left must not visit them each time
    for index, job in enumerate(json.loads((folder / "jobs.json").read_text())):
        error = message = ""
        try:
            rows = score(job["model"], job["prompts"], job["args"])
            save_file({str(i): row for i, row in enumerate(rows)}, folder / f"{index}.safetensors")
        except Exception as raised:
            error, message = type(raised).__name__, str(raised)
        (folder / f"{index}.json").write_text(json.dumps([error, message]))
        clean_up()


def score(model: str, prompts: list[list[int]], args: dict[str, Any]) -> list[Any]:
    """Return the log-probabilities of every next token, the one after the prompt's last included."""
    import torch
    from vllm import LLM, SamplingParams

    defaults: dict[str, Any] = {
        "dtype": "float32", "max_model_len": 128, "max_num_seqs": 8, "enforce_eager": True, "seed": 0,
        "kv_cache_memory_bytes": 64 * 2**20, "skip_tokenizer_init": True, "enable_prefix_caching": False,
    }  # fmt: skip
    llm = LLM(model, max_logprobs=-1, **{**defaults, **args})
    wanted = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=-1, logprobs=-1, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], wanted, use_tqdm=False)
    scored = []
    for output in outputs:
        rows = [*output.prompt_logprobs[1:], output.outputs[0].logprobs[0]]
        scored.append(torch.tensor([[row[token].logprob for token in range(len(row))] for row in rows]))
    return scored


def clean_up() -> None:
    """Leave no distributed state behind, whether the engine started or not."""
    from vllm.distributed import cleanup_dist_env_and_memory

    cleanup_dist_env_and_memory()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
