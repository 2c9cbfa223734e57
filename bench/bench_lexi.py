"""Fewer experts, narrower experts, or fewer of them per token: quality against throughput, as LExI's figures 2 to 4.

    python bench/bench_lexi.py                     # all three parts; rows that are there are not made again
    python bench/bench_lexi.py --part speed --rounds 12

- speed: (input + output tokens) / E2EL at batch 16 on a random model whose weights are nearly all experts (top-4 of 64),
  in vLLM. Every cut is measured against the full model, interleaved; a row's ratio is cut over full, of pairs.
  «inter» drops experts, «intra» a share of every expert's channels, «lexi» active experts (its own search, per layer),
  «skip» is dynamic skipping (NAEE) with all experts there: β = 1 leaves a token its best expert alone, the most that can
  be skipped; β = 1e-6 skips nothing and shows what the mechanism costs; rows say how many experts a token uses. «merge» averages neighbours, as HC-SMoE routes to
  them, «map» the same behind the router's probabilities, as EEP's; «uneven» keeps half as many experts in all layers but
  one, as MoE-I² does. «llama4 inter» drops experts of a model of Llama 4's form.
- quality: leap-tiny on its three tasks, 256 test items in vLLM, untuned: inter by REAP and by the agent (plans of
  search_methods.jsonl), intra, HC-SMoE («merge») and LExI, each through `leap search`, and LExI on top of REAP's subset
  («inter + lexi»); the last three and the agent with three seeds. «skip» with one β for all layers, and with NAEE's β_l.
- sensitivity: LExI's D_l(k) of leap-tiny with the standard error of its draws: the heat map.

Rows go to bench/results/lexi.jsonl.
"""

from __future__ import annotations

import argparse
import itertools
import random
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from leap_serve.bench.contenders import Contender, compare, measure_rounds, opened, stamped
from leap_serve.checkpoint import Checkpoint, resolve_model, width_of
from leap_serve.cli.console import progress_bar, say, table
from leap_serve.cut.write import cut
from leap_serve.encoding import encode_items
from leap_serve.engines.torch_cut import load_model
from leap_serve.engines.torch_subsets import moe_blocks
from leap_serve.files import append_jsonl, read_jsonl
from leap_serve.flops import parameters
from leap_serve.plan import LayerPlan, Plan
from leap_serve.plan_extras import Merge
from leap_serve.tasks.registry import load_task
from leap_serve.workload import Workload

sys.path.append(str(Path(__file__).parent))  # PYTHONSAFEPATH leaves it out
from bench_batch import make_model
from bench_methods import SMOKE, Bench, Cell, Size, run

RESULTS = Path(__file__).parent / "results" / "lexi.jsonl"
MODEL, TASKS = "leap-tiny", ("toy-gsm", "toy-code", "toy-xsum")
INTER, INTRA, LEXI = (0.125, 0.25, 0.5, 0.75, 0.875), (0.125, 0.25, 0.5, 0.875), (0.125, 0.25, 0.375, 0.5, 0.75)
"""Shares that are taken away: of experts, of channels, of active experts."""
AGENT = (0.75, 0.875)
MERGE, UNEVEN, LLAMA4 = (0.25, 0.5, 0.875), 0.875, (0.5, 0.75, 0.875, 0.9375)
CROSSED = ((0.25, 0.25), (0.5, 0.25), (0.5, 0.5))
"""Shares of experts and then of active experts."""
SKIPS = {"β = 1e-6": 1e-6, "β = 0.25": 0.25, "β = 0.5": 0.5, "β = 0.75": 0.75, "β = 1": 1.0}
BOTH, CALIBRATED = "inter + lexi", "β_l of NAEE"
FORMS, OTHER_FORM = ("qwen3_moe", "llama4_text"), "llama4"
METRICS = ("total_tok_s", "e2el_ms", "tpot_ms", "ttft_ms")


def both(experts: float, active: float) -> str:
    """The setting that takes away a share of the experts, and then of the active ones."""
    return f"{100 * experts:g} % + {100 * active:g} %"


SETTINGS = [
    *(("inter", f"{100 * share:g} %") for share in INTER), *(("intra", f"{100 * share:g} %") for share in INTRA),
    *(("lexi", f"{100 * share:g} %") for share in LEXI), *((BOTH, both(*shares)) for shares in CROSSED), *(("skip", setting) for setting in SKIPS),
    *(("merge", f"{100 * share:g} %") for share in MERGE), ("map", f"{100 * UNEVEN:g} %"),
    ("uneven", f"{100 * UNEVEN:g} %"), *((f"{OTHER_FORM} inter", f"{100 * share:g} %") for share in LLAMA4),
]  # fmt: skip


def share_of(setting: str) -> float:
    """What a setting takes away."""
    return float(setting.removesuffix(" %")) / 100


def plan_of(source: Checkpoint, method: str, setting: str, draws: int, folder: Path) -> Plan:
    """A plan for the random model, where it does not matter which experts or channels stay."""
    full = LayerPlan(tuple(range(source.num_experts)), source.top_k)
    layer = full
    if method == BOTH:
        experts, setting = setting.split(" + ")
        plan_of(source, "inter", experts, draws, folder).save(folder / "on.json")
    if method in ("lexi", BOTH):
        out, on = folder / "plan.json", ("--on", folder / "on.json") if method == BOTH else ()
        budget = ("--budget", 1 - share_of(setting), "--draws", draws)
        run("search", source.folder, "--method", "lexi", *on, *budget, "-o", out)
        return Plan.load(out)
    kept = 0 if method == "skip" else round(source.num_experts * (1 - share_of(setting)))
    if method == "uneven":
        first, *others = source.moe_layers
        counts = {first: kept * len(source.moe_layers) - kept // 2 * len(others)} | dict.fromkeys(others, kept // 2)
        layers = {index: replace(full, retained=tuple(range(count))) for index, count in counts.items()}
        return Plan(source.identity(), source.num_experts, layers)
    if method in ("merge", "map"):
        rows = clusters(source.num_experts, kept)
        merge = (
            Merge(rows, rows)
            if method == "map"
            else Merge(rows, tuple(tuple((e, 1.0) for e, _ in row) for row in rows), "ids")
        )
        layer = replace(full, retained=tuple(row[0][0] for row in rows), merge=merge)
    elif method.endswith("inter"):
        layer = replace(full, retained=tuple(number * source.num_experts // kept for number in range(kept)))
    elif method == "intra":
        width = round(width_of(source) * (1 - share_of(setting)))
        layer = replace(full, channels=(tuple(range(width)),) * source.num_experts)
    else:
        layer = replace(full, skip=SKIPS[setting])
    return Plan(source.identity(), source.num_experts, dict.fromkeys(source.moe_layers, layer))


def clusters(experts: int, kept: int) -> tuple[tuple[tuple[int, float], ...], ...]:
    """Neighbours in as many groups as are kept, as even as can be; each expert weighs the same in its group."""
    edges = [number * experts // kept for number in range(kept + 1)]
    return tuple(
        tuple((e, 1 / (stop - start)) for e in range(start, stop)) for start, stop in itertools.pairwise(edges)
    )


def speed(args: argparse.Namespace) -> None:
    """Measure the cuts that have no row, one after the other, against one full model of each form that stays loaded."""
    done = {(row["method"], row["setting"]) for row in read_jsonl(args.results) if row["bench"] == "lexi-speed"}
    some = [one for one in SETTINGS if one[1] in ("50 %", "50 % + 50 %", "β = 1") or one[0] in ("map", "uneven")]
    wanted = some if args.smoke else SETTINGS
    missing = [one for one in wanted if one not in done]
    for form in FORMS:
        if own := [one for one in missing if one[0].startswith(OTHER_FORM) is (form == "llama4_text")]:
            speed_of(form, own, args)


def speed_of(form: str, missing: Sequence[tuple[str, str]], args: argparse.Namespace) -> None:
    """Measure cuts of the random model of one form."""
    load = Workload("lexi", args.input, args.output, args.batch)
    engine = {"kv_cache_gib": 0.25, "max_model_len": args.input + args.output, "max_num_seqs": args.batch}
    env = {"OMP_NUM_THREADS": str(args.threads)}
    with tempfile.TemporaryDirectory() as home:
        # Of Llama 4's form half of the layers have experts, each used by fewer tokens.
        layers, width = (
            (2 * args.layers, 2 * args.intermediate) if form == "llama4_text" else (args.layers, args.intermediate)
        )
        full = make_model(Path(home) / "full", args.hidden, width, 64, layers, form=form)
        source, base = Checkpoint.open(full), Contender("full", str(full), engine, env)
        with opened([base]) as first:
            for method, setting in missing:
                with tempfile.TemporaryDirectory() as work:
                    plan = plan_of(source, method, setting, args.draws, Path(work))
                    cut(full, plan, Path(work) / "cut")
                    other = Contender(f"{method} {setting}", str(Path(work) / "cut"), engine, env)
                    used = active_experts(Path(work) / "cut", texts(source)) if method == "skip" else None
                    described = [other.describe(), base.describe()]
                    with opened([other]) as second, progress_bar(other.label) as bar:
                        samples = measure_rounds([*second, *first], load, args.rounds, args.warmup, bar)
                row = {**compare("lexi-speed", described, samples, METRICS), "method": method, "setting": setting,
                       "workload": load.to_json(), **shares(source, plan), **(skipped_shares(source, used) if used else {})}  # fmt: skip
                append_jsonl(args.results, stamped(row))
                show(row)


def texts(source: Checkpoint) -> list[list[int]]:
    """Random token ids, as the workload's are."""
    draw = random.Random(0)
    return [[draw.randrange(source.config["vocab_size"]) for _ in range(48)] for _ in range(16)]


def show(row: dict[str, Any]) -> None:
    """A line of a speed row."""
    found = row["ratio_a_over_b"]["total_tok_s"]
    say(f"{row['method']} {row['setting']}: {found['median']:.2f} [{found['low']:.2f}, {found['high']:.2f}] of the full "
        "model's tok/s")  # fmt: skip


def shares(source: Checkpoint, plan: Plan) -> dict[str, float]:
    """FLOPs per token and weights over the full model's."""
    own, full = parameters(source, plan), parameters(source)
    return {"flops_share": own.matmul / full.matmul, "weights_share": own.total / full.total}


class Quality(Bench):
    """Plans of leap-tiny by `leap search`; sizes are shares that are taken away. ``name`` and ``setting`` say what the next row is of."""

    name = setting = ""

    def flags(self, cell: Cell) -> list[Any]:
        flags = super().flags(cell)
        if self.name == "skip":
            return [*flags, "--skip"]
        if cell.method not in ("intra", "lexi"):
            return flags
        place = flags.index("--budget")
        on = () if self.name != BOTH else ("--on", self.subset(cell))
        return [*flags[: place + 1], cell.experts / self.source.num_experts, *flags[place + 2 :], *on]

    def home(self, cell: Cell) -> Path:
        return super().home(cell).with_name(f"{super().home(cell).name}-{self.name}-{self.setting}")

    def subset(self, cell: Cell) -> Path:
        """REAP's plan of the share that the setting names first."""
        kept, out = round(64 * (1 - share_of(self.setting.partition(" + ")[0]))), self.home(cell) / "on.json"
        run("search", self.profile(cell.task), "--method", "reap", "--experts", kept, "--force", "-o", out)
        return out

    def plan(self, cell: Cell) -> tuple[Plan, dict[str, Any]]:
        if self.name == "skip" and self.setting in SKIPS:
            return plan_of(self.source, "skip", self.setting, 0, self.work), {}
        return super().plan(cell)

    def cut(self, cell: Cell, plan: Plan, work: Path) -> Path:
        folder = super().cut(cell, plan, work)
        if self.name == "skip":
            items = load_task(cell.task).items("test", self.size.tests)
            coded = encode_items(AutoTokenizer.from_pretrained(folder), items)
            self.used = active_experts(folder, [one.prompt + one.answer for one in coded])
        return folder

    def measure(self, cell: Cell) -> dict[str, Any]:
        row = super().measure(cell)
        return row | (skipped_shares(self.source, self.used) if self.name == "skip" else {})


def active_experts(folder: Path, ids: Sequence[Sequence[int]]) -> dict[int, float]:
    """How many experts a token of these sequences uses in each layer of a cut, on average, in transformers."""
    checkpoint, counts = Checkpoint.open(folder), dict[int, list[int]]()
    model = load_model(checkpoint, "float32").eval()
    for index, block in moe_blocks(model, checkpoint.family).items():
        own = counts.setdefault(index, [0, 0])

        def count(_module: Any, _args: Any, output: Any, own: list[int] = own) -> None:
            own[0] += int((output[1] > 0).sum())
            own[1] += len(output[1])

        getattr(block, checkpoint.family.router).register_forward_hook(count)
    with torch.inference_mode():
        for one in ids:
            model(input_ids=torch.tensor([list(one)]), use_cache=False)
    return {index: used / tokens for index, (used, tokens) in counts.items()}


def skipped_shares(source: Checkpoint, used: Mapping[int, float]) -> dict[str, Any]:
    """What skipping leaves, where a token uses so many experts of each layer."""
    share = parameters(source, None, used).matmul / parameters(source).matmul
    return {"active_experts": sum(used.values()) / len(used), "flops_share": share}


def quality_cells() -> Iterator[tuple[str, str, Cell]]:
    """What is scored: the names of method and setting in the row, and the cell that makes it."""
    for seed, task in itertools.product(range(3), TASKS):
        methods = [("base", "full-model", (0.0,), 1), ("inter", "reap", INTER, 1), ("inter, agent", "leap", AGENT, 3),
                   ("intra", "intra", INTRA, 1), ("lexi", "lexi", LEXI, 3), ("merge", "hc-smoe", MERGE[:2], 3)]  # fmt: skip
        for name, method, removed, seeds in methods:
            for share in removed if seed < seeds else ():
                yield name, f"{100 * share:g} %", Cell(MODEL, task, round(64 * (1 - share)), method, seed, "none")
        for experts, active in CROSSED:
            yield BOTH, both(experts, active), Cell(MODEL, task, round(64 * (1 - active)), "lexi", seed, "none")
        # What NAEE calibrates on hangs on the seed; a β that is given does not.
        for setting in (*(SKIPS if seed == 0 else ()), CALIBRATED):
            yield "skip", setting, Cell(MODEL, task, 64, "naee", seed, "none")


def quality(args: argparse.Namespace) -> None:
    """Score the cells that have no row."""
    keys = ("method", "setting", "task", "seed")
    done = {tuple(row[key] for key in keys) for row in read_jsonl(args.results) if row["bench"] == "lexi"}
    bench = Quality(MODEL, SMOKE if args.smoke else Size(), args.work, args.results)
    wanted = list(quality_cells())
    if args.smoke:
        wanted = wanted[:2] + [one for one in wanted if one[:2] in ((BOTH, "50 % + 50 %"), ("skip", CALIBRATED))][:2]
    for name, setting, cell in wanted:
        if (name, setting, cell.task, cell.seed) not in done:
            bench.name, bench.setting = name, setting
            row = bench.measure(cell) | {"bench": "lexi", "method": name, "setting": setting}
            append_jsonl(args.results, stamped(row))
            say(f"{cell.task} {name} {setting} seed {cell.seed}: {100 * row['score']:.1f} %")


def sensitivity(args: argparse.Namespace) -> None:
    """Measure D_l(k) of leap-tiny, unless it has been."""
    if any(row["bench"] == "lexi-sensitivity" for row in read_jsonl(args.results)):
        return
    with tempfile.TemporaryDirectory() as work:
        out = Path(work) / "plan.json"
        run("search", resolve_model(MODEL), "--method", "lexi", "--budget", 0.5, "--draws", args.draws, "-o", out)
        found = Plan.load(out).made_by
    for layer, of in found["deviations"].items():
        for k, (mean, error) in enumerate(zip(of, found["standard_errors"][layer], strict=True), 1):
            row = {"bench": "lexi-sensitivity", "model": MODEL, "layer": int(layer), "top_k": k, "deviation": mean,
                   "std_error": error, "draws": found["draws"], "tokens": found["tokens"]}  # fmt: skip
            append_jsonl(args.results, stamped(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = {"sensitivity": sensitivity, "speed": speed, "quality": quality}
    parser.add_argument("--part", nargs="+", choices=tuple(parts), default=tuple(parts))
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--input", type=int, default=32)
    parser.add_argument("--output", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--draws", type=int, default=16)
    parser.add_argument("--smoke", action="store_true", help="a small model and a few rows of each part, for a test")
    parser.add_argument("--work", type=Path, default=Path("runs/lexi"))
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    if args.smoke:
        args.hidden, args.intermediate, args.layers, args.rounds, args.warmup, args.draws = 128, 64, 2, 1, 0, 2
    for part in args.part:
        parts[part](args)
    rows = read_jsonl(args.results)
    table(
        f"throughput over the full model's, batch {args.batch}", ["method", "taken away", "tok/s", "over full", "FLOPs", "weights"],
        [[row["method"], row["setting"], f"{row['contenders'][0]['metrics']['total_tok_s']['median']:.0f}",
          f"{row['ratio_a_over_b']['total_tok_s']['median']:.2f}", f"{row['flops_share']:.2f}", f"{row['weights_share']:.2f}"]
         for row in rows if row["bench"] == "lexi-speed"],
    )  # fmt: skip


if __name__ == "__main__":
    main()
