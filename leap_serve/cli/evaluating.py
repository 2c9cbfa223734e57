"""What ``leap eval`` asks, and whom: the tasks with their items, and the models with their answers on record."""

from __future__ import annotations

import argparse
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from leap_serve.engine import Model, Progress
from leap_serve.errors import UsageError
from leap_serve.evaluation.endpoint import Endpoint, is_url
from leap_serve.evaluation.evaluate import Evaluation, Sampling, evaluate, evaluate_text
from leap_serve.evaluation.journal import Journal, Recorded, folder_identity
from leap_serve.hub import resolve_model
from leap_serve.provenance import versions
from leap_serve.tasks.base import Item, Task
from leap_serve.tasks.chat import in_chat
from leap_serve.tasks.passkey import Passkey
from leap_serve.tasks.registry import load_task
from leap_serve.tasks.text import WIKITEXT, Text

NO_END = (
    "the loss at {} leaves out the end of text, since the server does not say which token that is (leap serve does): "
    "it is not comparable with one measured in this process or through leap serve"
)


@dataclass(frozen=True, slots=True)
class Side:
    """A model to ask, under the name that tables and progress bars give it; ``note`` is what limits its loss."""

    name: str
    model: Recorded
    note: str = ""


@dataclass(frozen=True, slots=True)
class Work:
    """One task, its items already at hand."""

    name: str
    evaluate: Callable[[Model, Progress], Evaluation]


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a model is run or reached."""
    engine = parser.add_argument_group("a model in this process")
    engine.add_argument("--engine", default="vllm", choices=("vllm", "torch"))
    engine.add_argument("--dtype", default="auto")
    engine.add_argument("--max-model-len", type=int, help="longest sequence in tokens (default: the model's own)")
    engine.add_argument("--kv-cache-gib", type=float, default=1.0, help="vllm: KV cache (default 1)")
    endpoint = parser.add_argument_group("a model behind a URL")
    endpoint.add_argument("--model", help="its name there (default: the only one that the server lists)")
    endpoint.add_argument("--vs-model", help="the name of the model behind --vs URL")
    endpoint.add_argument(
        "--chat", action="store_true",
        help="ask through chat completions: no stop strings, code is taken out of its fences; they tell no loss",
    )  # fmt: skip
    endpoint.add_argument("--concurrency", type=int, default=16, help="requests under way at a time (default 16)")
    endpoint.add_argument("--timeout", type=float, default=600, help="seconds to wait for one answer (default 600)")


def work_of(args: argparse.Namespace) -> list[Work]:
    """Load every task's items, before any model is: what is wrong with them costs nothing."""
    names = list(dict.fromkeys(args.task))
    if args.data is not None and len(names) > 1:
        raise UsageError("--data", f"is given for {len(names)} tasks", "evaluate them one by one")
    sampling = Sampling(args.samples, args.temperature, tuple(args.k), args.seed)
    work = [_work(args, name, sampling) for name in names]
    twice = sorted(name for name, count in Counter(one.name for one in work).items() if count > 1)
    if twice:
        raise UsageError("--task", f"{len(work)} tasks, and several are called {twice[0]}", "give them other names")
    return work


def _work(args: argparse.Namespace, name: str, sampling: Sampling) -> Work:
    if name == Text.name:
        text = Text(args.data or WIKITEXT, args.window, args.stride)
        text.read(args.split)
        return Work(name, lambda model, progress: evaluate_text(model, text, args.split, args.limit, progress))
    data = None if args.data is None else Path(args.data)
    task: Task = Passkey(tuple(args.words), tuple(args.depths)) if name == Passkey.name else load_task(name, data)
    if args.chat:
        task = in_chat(task)
    items: Sequence[Item] = task.items(args.split, args.limit, args.seed)
    return Work(task.name, lambda model, progress: evaluate(model, task, items, progress, sampling))


def sides(args: argparse.Namespace, other: str | None, journal: Journal) -> list[Side]:
    """The models to ask. Those in this process are opened when they are first needed, one at a time."""
    named = [(args.target, args.model)] + ([(other, args.vs_model)] if other else [])
    return [_side(args, model, name, journal) for model, name in named]


def _side(args: argparse.Namespace, model: str, name: str | None, journal: Journal) -> Side:
    if is_url(model):
        endpoint = Endpoint(model, name, chat=args.chat, concurrency=args.concurrency, timeout_s=args.timeout)
        note = "" if endpoint.chat or endpoint.end_of_text is not None else NO_END.format(model)
        return Side(Path(model).name, Recorded(lambda: endpoint, journal, endpoint.identity), note)
    if name is not None or args.chat:
        raise UsageError(
            "--model, --chat", f"are for an endpoint, and {model} is none", "give its URL, or leave them out"
        )
    folder = resolve_model(model)
    identity = {
        "files": folder_identity(folder), "engine": args.engine, "dtype": args.dtype, "versions": versions(),
        "max_model_len": args.max_model_len,
    }  # fmt: skip
    return Side(Path(model).name, Recorded(lambda: _engine(args, folder), journal, identity))


def _engine(args: argparse.Namespace, folder: Path) -> Model:
    # A running text may be longer than the model takes: it is scored in windows, and transformers need not warn.
    logging.getLogger("transformers.tokenization_utils_base").setLevel(logging.ERROR)
    if args.engine == "vllm":
        from leap_serve.engines.vllm_engine import VllmEngine

        return VllmEngine(folder, dtype=args.dtype, max_model_len=args.max_model_len, kv_cache_gib=args.kv_cache_gib)
    from leap_serve.engines.torch_engine import TorchEngine

    return TorchEngine(folder, dtype=args.dtype, max_model_len=args.max_model_len)
