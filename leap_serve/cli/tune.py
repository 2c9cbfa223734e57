"""``leap tune CKPT --task T|--data F``: repair and specialise a cut; the results lie beside its weights."""

from __future__ import annotations

import argparse
import shutil
from contextlib import nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.cli.console import noted_bar, say, table
from leap_serve.cut.write import check_destination
from leap_serve.errors import UsageError
from leap_serve.files import check_free, check_place, new_folder
from leap_serve.tasks.base import Item, Task, fingerprint
from leap_serve.tasks.registry import NAMES, PUBLISHED, items_from_file, load_task
from leap_serve.tasks.rows import MissingSplitError
from leap_serve.tasks.user import UserTask

if TYPE_CHECKING:
    from leap_serve.plan import Plan
    from leap_training.tune import Report, Tuner
    from leap_training.tune_config import TuneConfig, TuneData

CODE = ("humaneval", "mbpp")
FEWEST = 20
"""Held-out items below which the router's test can hardly be won: five that all are better are the least there is."""
UNTESTED = "no test items are known, so none could be kept out of the pool"
BASELINES: dict[str, Literal["none", "logits", "experts"]] = {
    "vanilla": "none", "full": "none", "kd": "logits", "kd-experts": "experts",
}  # fmt: skip
"""Rivals that move whole weights and routers by supervision, and what each learns from the full model."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("checkpoint", help="a cut checkpoint")
    parser.add_argument("--task", help=f"one of {', '.join(NAMES)}, or a task file (.yaml)")
    parser.add_argument(
        "--data", type=Path, help="JSON Lines of {prompt, answer} or {text}; 5 %% held out, at most twice --held-out"
    )
    parser.add_argument("-o", "--out", type=Path, help="tune a copy (default: write beside the checkpoint's weights)")
    parser.add_argument("--force", action="store_true", help="replace --out, or the tuned parts that are there")
    parser.add_argument("--state", type=Path, help="folder to resume from (default: RESULT.tune, gone at the end)")
    labels = parser.add_argument_group("labels and steps (defaults: 10 rounds of 1,024 labels, the paper's)")
    labels.add_argument("--rounds", type=int, default=10)
    labels.add_argument("--labels", type=int, default=1024, help="items labelled in each round (B)")
    labels.add_argument("--pool", type=int, default=16384, help="train items to choose from")
    labels.add_argument("--held-out", type=int, default=256, help="validation items of each of the two parts")
    labels.add_argument("--steps", type=int, default=4000, help="expert steps of the whole run")
    labels.add_argument("--batch", type=int, default=32, help="items of a step")
    labels.add_argument("--accumulate", type=int, default=1, help="parts in which a step's items pass")
    labels.add_argument("--max-length", type=int, metavar="TOKENS", help="leave out items that are longer")
    labels.add_argument("--patience", type=int, default=3, help="rounds without gain that end the run; 0: never")
    parts = parser.add_argument_group("parts, each of which can be left out")
    parts.add_argument("--no-rl-router", action="store_true", help="no router steps")
    parts.add_argument(
        "--supervised-router",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="expert steps also move the routers",
    )
    parts.add_argument(
        "--active-learning", action=argparse.BooleanOptionalAction,
        help="choose the items to label (default: on, off for humaneval and mbpp as in the paper); --no-: random batches",
    )  # fmt: skip
    parts.add_argument(
        "--uncertainty", default="answer", choices=("entropy", "margin", "output", "answer", "none"),
        help="what makes an item worth its label; the paper: entropy, of the routers",
    )  # fmt: skip
    parts.add_argument(
        "--diversity", default="k-means++", choices=("nearest", "k-means++", "none"), help="the paper: nearest"
    )
    parts.add_argument(
        "--al-temperature", type=float, default=1.0, help="T of eq. 16, of entropy and margin (default 1)"
    )
    parts.add_argument(
        "--candidates", type=int, default=24, help="items judged for each one chosen; 0, as the paper: all"
    )
    parts.add_argument("--no-lora", action="store_true", help="the experts stay as they are")
    parts.add_argument("--baseline", choices=BASELINES, help="a rival under the same labels and steps; needs --out")
    parts.add_argument("--teacher", help="the full model: learn its next-token distributions beside the labels")
    knobs = parser.add_argument_group("knobs")
    knobs.add_argument("--rank", type=int, default=32, help="of the experts' adapters")
    knobs.add_argument("--learning-rate", type=float, help="default: 0.768 / hidden size, 3.75e-4 at 2,048")
    knobs.add_argument("--lr-warmup", type=int, default=50, help="steps over which that rate rises")
    knobs.add_argument("--router-learning-rate", type=float, default=1e-4)
    knobs.add_argument("--router-every", type=int, default=4, help="expert steps per router step")
    knobs.add_argument("--router-warmup", type=int, default=20, help="router steps before the first expert step")
    knobs.add_argument("--exploration", default="gumbel", choices=("epsilon", "gumbel"))
    knobs.add_argument("--noise", type=float, default=0.3, help="scale of the Gumbel noise")
    knobs.add_argument("--epsilon", type=float, default=0.1, help="epsilon: probability of drawing")
    knobs.add_argument("--kl-coef", type=float, default=0.02, help="β of eq. 18")
    knobs.add_argument("--ent-coef", type=float, default=0.001, help="η of eq. 18")
    knobs.add_argument("--latency-coef", type=float, default=0.0, help="λ of eq. 14")
    knobs.add_argument("--latency", type=Path, help="for --latency-coef: a calibration on the engine, JSON")
    knobs.add_argument("--div-coef", type=float, default=1.0, help="η of eq. 17")
    knobs.add_argument("--adapter-l2", type=float, default=0.01, help="μ of eq. 18")
    knobs.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: float32; bfloat16 on a GPU")
    knobs.add_argument("--save-every", type=int, default=100, help="steps between two states on disk")
    knobs.add_argument("--checkpointing", action="store_true", help="recompute activations instead of keeping them")
    knobs.add_argument("--seed", type=int, default=0)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Tune, keep the tuned router only if it earns it, and write what lies beside the weights."""
    source = _source(args)
    from leap_training.tune_result import write_plain, write_tuned
    from leap_training.tune_state import remove_state

    tuner = _tuner(args, source)
    state = tuner.state
    assert state is not None
    with noted_bar("tune") as bar:
        report = tune(tuner, bar, task=args.task, data=args.data and str(args.data), model=args.checkpoint,
                      baseline=args.baseline)  # fmt: skip
    out = args.out or source
    args.json = args.json and tuner.accelerator.is_main_process
    if tuner.accelerator.is_main_process:
        if tuner.config.experts == "full":
            write_plain(tuner, source, out, report, args.force)
        else:
            with new_folder(out, args.force) if args.out else nullcontext(source) as work:
                if args.out:
                    shutil.copytree(source, work, dirs_exist_ok=True)
                write_tuned(tuner, work, report)
        remove_state(state)
        _show(args, report)
    return {
        "out": str(out), "labels": report["labels"], "curve": report["curve"], "router": report["router"],
        "validation_loss_before": report["validation_loss_before"], "stopped_early": report["stopped_early"],
    }  # fmt: skip


def tune(tuner: Tuner, show: Report, **origin: Any) -> dict[str, Any]:
    """Tune to the end and keep the tuned router only if it earns it; returns the content of tune.json."""
    from leap_training.tune_result import keep_router, report_of

    tuner.run(show)
    moved = tuner.config.rl_router or tuner.config.supervised_router
    # A rival's router is part of it; whether ours stays is asked of ours alone.
    router = keep_router(tuner) if moved and tuner.config.experts != "full" else None
    return report_of(tuner, router, **origin)


def _show(args: argparse.Namespace, report: dict[str, Any]) -> None:
    table(
        f"{args.checkpoint}, validation loss {report['validation_loss_before']:.4f} before tuning",
        ["round", "labels", "training loss", "validation loss", "all tokens right"],
        [
            [row["round"], row["labels"], "–" if row["train_loss"] is None else f"{row['train_loss']:.4f}",
             f"{row['validation_loss']:.4f}", f"{100 * row['validation_exact']:.1f} %"]
            for row in report["curve"]
        ],
    )  # fmt: skip
    if not report["best_round"]:
        say("no round was better than the cut itself: what was written changes nothing; try a lower --learning-rate")
        return
    router = report["router"]
    if router:
        verdict = "the tuned router stays" if router["kept"] else "no gain was shown, so the sliced router stays"
        say(
            f"router, {router['items']} other items: loss {router['sliced_loss']:.4f} sliced, "
            f"{router['tuned_loss']:.4f} tuned, p = {router['p_value']:.4f}: {verdict}"
        )
        if not router["kept"]:
            loss = f"validation loss {router['shipped_loss']:.4f} with it"
            say(loss if router["adapters_kept"] else f"{loss}, more than the cut's: the adapters were emptied, too")


def _source(args: argparse.Namespace) -> Path:
    """Refuse, before anything is loaded, what cannot be tuned."""
    folder = resolve_model(args.checkpoint)
    checkpoint = Checkpoint.open(folder)
    if checkpoint.plan is None:
        raise UsageError(folder, "is a full model, nothing has been cut out of it", "cut it first with leap cut")
    if checkpoint.overlays and not (args.force and args.out is None):
        raise UsageError(folder, "has tuned parts already", "pass --force without --out to tune it anew")
    if args.pool < 1 or args.held_out < 1:
        raise UsageError("--pool, --held-out", f"are {args.pool} and {args.held_out}", "give 1 or more")
    if args.baseline:
        _check_baseline(args, checkpoint.plan)
    if args.teacher:
        _check_teacher(args, checkpoint.plan)
    if args.state is not None:
        check_place("--state", args.state)
    if args.out is not None:
        check_place("--out", args.out)
        check_destination(folder, args.out)
        check_free(args.out, args.force)
    return folder


def _check_baseline(args: argparse.Namespace, plan: Plan) -> None:
    """Refuse a rival that this cut does not allow."""
    where = f"--baseline {args.baseline}"
    if args.out is None:
        raise UsageError("--baseline", "writes whole weights", "name a folder for them with --out")
    method = plan.made_by.get("method")
    if args.baseline == "vanilla" and method != "frequency":
        raise UsageError(
            where, f"starts from experts chosen by frequency, these were chosen by {method}",
            "cut a plan of leap search --method frequency, or choose --baseline full",
        )  # fmt: skip
    if BASELINES[args.baseline] != "none" and not args.teacher:
        raise UsageError(where, "learns from the full model", "name it with --teacher")


def _check_teacher(args: argparse.Namespace, plan: Plan) -> None:
    """Refuse a teacher that is not the model that was cut, or that nothing learns from."""
    if args.no_lora and not args.supervised_router:
        raise UsageError("--teacher", "expert steps learn from it, and nothing moves in them", "leave it out")
    if args.baseline and BASELINES[args.baseline] == "none":
        raise UsageError(
            "--teacher", f"--baseline {args.baseline} learns from labels alone", "leave it out, or choose kd"
        )
    teacher = Checkpoint.open(resolve_model(args.teacher)).identity()
    if teacher.sha256 != plan.base.sha256:
        raise UsageError("--teacher", f"{teacher.id} is not {plan.base.id}, the model that was cut", "name that model")


def _tuner(args: argparse.Namespace, source: Path) -> Tuner:
    from leap_training.tune import Tuner

    config, data = _config(args, source), _data(args)
    if args.max_length is not None:
        data = _shorter(data, source, args.max_length)
    if len(data.router) < FEWEST:
        say(
            f"only {len(data.router)} items judge whether the tuned router stays, and {len(data.stopping)} when to stop: "
            f"with fewer than {FEWEST} it goes unless it is better on nearly all of them; hold more out"
        )
    return Tuner(source, data, config, args.state or _state_beside(args.out or source))


def _state_beside(result: Path) -> Path:
    """Return where a run keeps its state unless told: by its result, so that two runs of one cut do not share it."""
    return result.absolute().parent / f"{result.absolute().name}.tune"


def _config(args: argparse.Namespace, source: Path) -> TuneConfig:
    import torch

    from leap_training.active_learning import Acquisition
    from leap_training.routing_agent import Exploration, RouterConfig
    from leap_training.tune_config import TuneConfig

    rival = args.baseline is not None
    chosen = args.active_learning if args.active_learning is not None else args.task not in CODE
    distill = BASELINES[args.baseline] if rival else "logits" if args.teacher else "none"
    return TuneConfig(
        rounds=args.rounds, labels=args.labels, steps=args.steps, batch=args.batch, accumulate=args.accumulate,
        learning_rate=args.learning_rate, lr_warmup=args.lr_warmup, experts="full" if rival else "none" if args.no_lora else "lora",
        distill=distill, teacher=str(resolve_model(args.teacher)) if distill != "none" else None,
        rank=args.rank, adapter_l2=args.adapter_l2, rl_router=not (rival or args.no_rl_router),
        supervised_router=rival or args.supervised_router, router_warmup=args.router_warmup,
        router_every=args.router_every, patience=args.patience, seed=args.seed,
        dtype=args.dtype or ("bfloat16" if torch.cuda.is_available() and not rival else "float32"),
        checkpointing=args.checkpointing, save_every=args.save_every,
        router=RouterConfig(learning_rate=args.router_learning_rate, kl_coef=args.kl_coef, ent_coef=args.ent_coef,
                            latency_coef=args.latency_coef, **_price(args, source)),
        exploration=Exploration(args.exploration, args.noise, args.epsilon),
        acquisition=Acquisition(strategy="active" if chosen and not rival else "random", uncertainty=args.uncertainty,
                                diversity=args.diversity, div_coef=args.div_coef, candidates=args.candidates,
                                al_temperature=args.al_temperature),
    )  # fmt: skip


def _price(args: argparse.Namespace, source: Path) -> dict[str, Any]:
    """What one more expert read costs a decode step of how many tokens, as a calibration in the engine measured it."""
    if args.latency is None:
        if args.latency_coef > 0:
            raise UsageError(
                "--latency-coef", "needs --latency, a calibration in the engine that serves",
                "name the latency.json that leap search --lambda X --state DIR leaves in DIR",
            )  # fmt: skip
        return {}
    from leap_training.latency import LatencyModel

    found, plan = LatencyModel.load(args.latency), Checkpoint.open(source).plan
    assert plan is not None  # _source saw it
    if plan.base.sha256 != found.base_sha256:
        raise UsageError(args.latency, f"was measured on another model than {plan.base.id}", "calibrate on this one")
    model = found.of_reads(plan)
    again = "" if model is found else f", fitted again as {model.form} since {found.form} gives a read no price"
    say(
        f"latency model of {model.workload.batch} tokens a step{again}: off by {100 * model.mape[model.form]:.1f} % on "
        f"{model.held_out} plans it was not fitted to"
    )
    prices = model.coefficients[1:-1]
    if args.latency_coef > 0 and not any(prices):
        say("by this calibration an expert read costs nothing, so --latency-coef changes nothing")
    return {"latency_per_read": prices, "latency_batch": model.workload.batch}


def _data(args: argparse.Namespace) -> TuneData:
    from leap_training.splits import validation_part
    from leap_training.tune_config import TuneData

    if bool(args.task) == (args.data is not None) and args.task not in PUBLISHED:
        raise UsageError("--task, --data", "exactly one is needed", "give one of them")
    if args.task is None:
        return _from_file(args)
    task = load_task(args.task, args.data)
    stopping, router = (validation_part(task, name, args.held_out, args.seed) for name in ("stopping", "router"))
    tests = _tests(task, args.seed)
    held_out = {fingerprint(item) for item in (*stopping, *router)}
    items = task.items("train", args.pool, args.seed)
    pool = [item for item in items if fingerprint(item) not in held_out]
    if len(pool) < len(items):
        say(f"{len(items) - len(pool)} of {len(items)} train items are validation items, too: left out")
    if not pool:
        raise UsageError(args.task, "has no train item that is not one of validation", "correct its splits")
    for name, part in (("stopping", stopping), ("router", router)):
        if not part:
            what = f"has no validation item for {name}, one of three parts that its validation items are dealt to"
            raise UsageError(args.task, what, "give it more of them")
    return TuneData(pool, tests, stopping, router)


def _tests(task: Task, seed: int) -> list[Item]:
    """Return the task's test items, to keep them out of the pool; where its rows hold none, this is said."""
    tests: list[Item] = []
    if not isinstance(task, UserTask) or "test" in task.source.splits:
        with suppress(MissingSplitError):
            tests = task.items("test", None, seed)
    if not tests:
        say(UNTESTED)
    return tests


def _shorter(data: TuneData, folder: Path, longest: int) -> TuneData:
    """Leave out what has more than ``longest`` tokens: prompt, answer and end of text."""
    from transformers import AutoTokenizer

    from leap_serve.encoding import encode_items

    tokenizer = AutoTokenizer.from_pretrained(folder)
    parts = {}
    for name in ("pool", "stopping", "router"):
        items = getattr(data, name)
        lengths = [len(one.prompt) + len(one.answer) + 1 for one in encode_items(tokenizer, items)]
        parts[name] = [item for item, length in zip(items, lengths, strict=True) if length <= longest]
        if not parts[name]:
            what = f"is {longest}, and the shortest of the {len(items)} {name} items has {min(lengths)} tokens"
            raise UsageError("--max-length", what, "raise it")
        if len(parts[name]) < len(items):
            say(
                f"{len(items) - len(parts[name])} of {len(items)} {name} items have more than {longest} tokens: left out"
            )
    return replace(data, **parts)


def _from_file(args: argparse.Namespace) -> TuneData:
    """5 % of the user's items are held out, at most --held-out for each part, the rest is cut to --pool.

    Which ones follows from their text, not their order.
    """
    from leap_training.tune_config import TuneData

    items = list({fingerprint(item): item for item in items_from_file(args.data)}.values())
    held = sorted(items, key=fingerprint)[: min(max(2, len(items) // 20), 2 * args.held_out)]
    names = {fingerprint(item) for item in held}
    pool = [item for item in items if fingerprint(item) not in names]
    if not pool:
        raise UsageError(args.data, f"holds {len(items)} different items", "give at least 3")
    say(UNTESTED)
    return TuneData(sorted(pool, key=fingerprint)[: args.pool], [], held[0::2], held[1::2])
