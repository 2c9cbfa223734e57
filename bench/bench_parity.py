"""How far vLLM with the plugin is from transformers behind masked routers: the largest log-probability difference.

    python bench/bench_parity.py                    # every family and leap-tiny, a row each in bench/results/parity.jsonl

Tiny random fp32 checkpoints of every family, cut to different |I|, top_k and τ in each layer, and leap-tiny
cut by a global REAP plan; prompts of one token and more, all positions, the whole vocabulary. `controls` are
differences from references that are wrong on purpose (no plan, no τ, one other expert, another top_k): parity
means something only while these are large. The same code runs as the test tests/e2e/test_parity.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from leap_serve import provenance
from leap_serve.architectures import served_families
from leap_serve.checkpoint import resolve_model
from leap_serve.files import append_jsonl

# After leap_serve, since tests/ has a folder of that name.
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))
from families import make_checkpoint
from parity import TOLERANCE, measure, reap_plan, uneven_plan

RESULTS = Path(__file__).parent / "results" / "parity.jsonl"
FAMILIES = [family.model_type for family in served_families()]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*FAMILIES, "leap-tiny"], choices=[*FAMILIES, "leap-tiny"])
    parser.add_argument("--tensor-parallel-size", type=int, default=1)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        models = {}
        for name in args.models:
            if name == "leap-tiny":
                models[name] = (resolve_model(name), reap_plan(name, work))
                continue
            # Two key/value heads: GPT-OSS in vLLM wants no fewer than there are ranks.
            full = make_checkpoint(name, work / "full" / name, num_key_value_heads=2)
            models[name] = (full, uneven_plan(full))
        engine = {"tensor_parallel_size": args.tensor_parallel_size}
        several = args.tensor_parallel_size > 1
        env = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if several else {}
        rows = measure(
            models, work / "cut", env, **engine, **({"distributed_executor_backend": "mp"} if several else {})
        )
    for name, row in rows.items():
        print(
            f"{name:12} largest difference {row['max_diff']:.1e}, wrong references {min(row['controls'].values()):.1e}"
        )
        append_jsonl(
            RESULTS,
            {
                "model": name, **row, "tolerance": TOLERANCE, "dtype": "float32", **engine, **provenance.made_by(),
                "command": provenance.command(), "versions": provenance.versions(), "hardware": provenance.hardware(),
            },
        )  # fmt: skip
    return int(any(row["max_diff"] > TOLERANCE for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
