"""``leap bench serve``: vLLM's own serving benchmark against ``leap serve``, A and B by turns."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from leap_serve.bench.contenders import Contender, Worker, turns
from leap_serve.checkpoint import resolve_model
from leap_serve.engine import Progress, RequestTiming
from leap_serve.errors import LeapError
from leap_serve.measure import Sample, check_rounds, sample
from leap_serve.server.launch import Server
from leap_serve.workload import Workload


def measure_serving(
    contenders: Sequence[Contender],
    workload: Workload,
    request_rate: float,
    concurrency: int | None,
    rounds: int,
    warmup: int,
    flags: Sequence[str] = (),
    progress: Progress | None = None,
) -> list[list[Sample]]:
    """Serve all contenders at once, ask one at a time (an idle server takes no core), and return the samples of each.

    Args:
        contenders: one or two checkpoints; ``engine`` is ignored, ``env`` goes to the server.
        workload: ``batch`` is the number of requests per round.
        request_rate: requests per second on average (Poisson); inf sends all at once.
        concurrency: requests in flight at most, or None.
        rounds, warmup: as in measure_rounds.
        flags: of leap serve, then ``--`` and vLLM's; the same for all.
    """
    check_rounds(rounds, warmup)
    samples: list[list[Sample]] = [[] for _ in contenders]
    total = (warmup + rounds) * len(contenders)
    with contextlib.ExitStack() as stack:
        servers = []
        for contender in contenders:
            servers.append(stack.enter_context(Server(contender.model, flags, contender.env)))
        client = Worker("client")
        stack.callback(client.close)
        for done, (number, index) in enumerate(turns(len(contenders), warmup + rounds), 1):
            server = servers[index]
            call = _client_flags(server, resolve_model(contenders[index].model), workload, number)
            call += [f"--request-rate={request_rate}"] + ([f"--max-concurrency={concurrency}"] if concurrency else [])
            answer = client.ask("client", 1800, flags=call)
            if number >= warmup:
                samples[index].append(_sample_of(answer, contenders[index].label, workload.batch))
            if progress is not None:
                progress(done, total)
    return samples


def _client_flags(server: Server, folder: Path, workload: Workload, number: int) -> list[str]:
    return [
        "--backend=openai", "--endpoint=/v1/completions", f"--base-url={server.url}", f"--model={folder}",
        f"--served-model-name={server.name}", f"--tokenizer={folder}", "--dataset-name=random", "--temperature=0",
        f"--random-input-len={workload.input_tokens}", f"--random-output-len={workload.output_tokens}",
        # Another seed every round, so that no prefix cache answers for the model.
        f"--num-prompts={workload.batch}", f"--seed={workload.seed + number}", "--disable-tqdm",
    ]  # fmt: skip


def _sample_of(answer: dict[str, Any], label: str, requests: int) -> Sample:
    if answer["completed"] != requests:
        errors = sorted({str(error)[:200] for error in answer["errors"] or [] if error})
        raise LeapError(
            label, f"{answer['completed']} of {requests} requests were answered ({'; '.join(errors[:3])})",
            "use shorter requests, or give the server more room with flags after --",
        )  # fmt: skip
    timings = [
        RequestTiming(tuple(itertools.accumulate([first, *gaps])))
        for first, gaps in zip(answer["ttfts"], answer["itls"], strict=True)
    ]
    return sample(timings, answer["input_lens"], answer["start_times"], answer["output_lens"])
