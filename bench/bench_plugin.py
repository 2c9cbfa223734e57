"""Our plugin serving a uniform checkpoint is not slower than stock vLLM serving the same files.

The bundled leap-tiny cut to 16 experts per layer, a model so small that a step is nearly all overhead, in
four engines, interleaved: our architecture with --load-format leap forced upon the files, the stock
architecture loaded through the plugin, stock vLLM (VLLM_PLUGINS empty) a second time as the control that
shows what the machine can resolve, and stock vLLM. Appends three rows to bench/results/plugin.jsonl;
``ratio_a_over_b`` is the engine over stock vLLM, so for output_tok_s it is the speed.

    python bench/bench_plugin.py
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from leap_serve.bench.contenders import Contender, compare, measure_rounds, opened, stamped
from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import progress_bar, table
from leap_serve.cut.write import cut
from leap_serve.files import append_jsonl
from leap_serve.measure import Sample
from leap_serve.plan import LayerPlan, Plan
from leap_serve.workload import Workload

RESULTS = Path(__file__).parent / "results" / "plugin.jsonl"
METRICS = ("output_tok_s", "tpot_ms", "ttft_ms")


def main() -> None:
    """Cut, measure, record, show."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="leap-tiny")
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--starts", type=int, default=8, help="times that all engines are started afresh")
    parser.add_argument("--rounds", type=int, default=8, help="pairs per start")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    load = Workload("decode", input_tokens=32, output_tokens=64, batch=args.batch)
    with tempfile.TemporaryDirectory() as folder:
        source = Checkpoint.open(resolve_model(args.model))
        layer = LayerPlan(tuple(range(args.experts)), source.top_k)
        plan = Plan(source.identity(), source.num_experts, dict.fromkeys(source.moe_layers, layer))
        model = Path(folder) / f"{source.folder.name}-{args.experts}"
        cut(source.folder, plan, model)
        ours = source.family.leap_architecture
        engine = {"kv_cache_gib": 0.25, "max_model_len": 128, "max_num_seqs": args.batch}
        leap = {**engine, "load_format": "leap"}
        env = {"OMP_NUM_THREADS": str(args.threads)}
        contenders = [
            Contender(ours, str(model), {**leap, "hf_overrides": {"architectures": [ours]}}, env),
            Contender("stock architecture through the plugin", str(model), leap, env),
            Contender("stock vLLM again (control)", str(model), engine, {**env, "VLLM_PLUGINS": ""}),
            Contender("stock vLLM", str(model), engine, {**env, "VLLM_PLUGINS": ""}),
        ]
        described = [contender.describe() for contender in contenders]
        samples: list[list[Sample]] = [[] for _ in contenders]
        for start in range(args.starts):
            # A process keeps the memory layout that it was born with, which alone can cost some per cent: all
            # are started afresh several times, each time in another order.
            order = [(index + start) % len(contenders) for index in range(len(contenders))]
            with opened([contenders[index] for index in order]) as workers, progress_bar(f"start {start}") as progress:
                for index, found in zip(
                    order, measure_rounds(workers, load, args.rounds, warmup=3, progress=progress), strict=True
                ):
                    samples[index] += found
    shown = []
    for index in range(len(contenders) - 1):
        row = compare("plugin", [described[index], described[-1]], [samples[index], samples[-1]], METRICS)
        append_jsonl(args.results, stamped({"workload": load.to_json(), **row}))
        speed, mine, stock = (
            row["ratio_a_over_b"]["output_tok_s"],
            *(s["metrics"]["tpot_ms"] for s in row["contenders"]),
        )
        interval = f"{speed['median']:.4f} [{speed['low']:.4f}, {speed['high']:.4f}]"
        shown.append([contenders[index].label, f"{mine['median']:.3f}", f"{stock['median']:.3f}", interval])
    table(f"{args.starts * args.rounds} pairs", ["engine", "TPOT ms", "TPOT ms, stock", "speed over stock"], shown)


if __name__ == "__main__":
    main()
