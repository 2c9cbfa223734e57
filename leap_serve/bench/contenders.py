"""Two checkpoints measured in one run, interleaved A, B, B, A, … and never at the same time."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from leap_serve.checkpoint import Checkpoint, resolve_model
from leap_serve.engine import Progress
from leap_serve.errors import LeapError
from leap_serve.flops import flops_per_token
from leap_serve.measure import Sample, check_rounds, ratio, summary
from leap_serve.provenance import command, hardware, versions
from leap_serve.server.launch import dying_with_parent
from leap_serve.workload import Workload

OPEN_TIMEOUT_S = 1800.0
ROUND_TIMEOUT_S = 1800.0


@dataclass(frozen=True, slots=True)
class Contender:
    """One side of a comparison.

    Args:
        label: its name in tables.
        model: a folder, ``leap-tiny`` or a model id.
        engine: arguments of VllmEngine.
        env: environment variables of its process, e.g. VLLM_PLUGINS="" for stock vLLM.
    """

    label: str
    model: str
    engine: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What a result row says of it; checks the checkpoint, so call it before anything is loaded."""
        checkpoint = Checkpoint.open(resolve_model(self.model))
        plan = checkpoint.plan
        layers = checkpoint.moe_layers
        return {
            "label": self.label,
            "family": checkpoint.family.model_type,
            "fingerprint": plan.fingerprint if plan else None,
            "retained": plan.counts if plan else [checkpoint.num_experts] * len(layers),
            "top_k": [layer.top_k for layer in plan.layers.values()] if plan else [checkpoint.top_k] * len(layers),
            "weights_bytes_on_disk": checkpoint.weight_bytes,
            "flops_per_token": flops_per_token(checkpoint),
            "engine": dict(self.engine),
            "env": dict(self.env),
        }


class Worker:
    """A contender's process. It is stopped whenever it has nothing to answer, so that it takes no core.

    ``about``: what the engine says of itself once it is open: dtype, max_model_len, threads.
    """

    def __init__(self, label: str, env: Mapping[str, str] | None = None) -> None:
        self.label = label
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "leap_serve.bench.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=_environment(env or {}),
            # One that is stopped hears nothing else and would stay for ever.
            preexec_fn=dying_with_parent(signal.SIGKILL),
        )  # fmt: skip
        self.pid = self._process.pid
        self._pending = b""
        self.about: dict[str, Any] = {}

    def ask(self, do: str, timeout_s: float, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer; the process runs only meanwhile. Raises LeapError."""
        assert self._process.stdin is not None
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"do": do, **arguments}).encode() + b"\n")
            self._process.stdin.flush()
            answer: dict[str, Any] = json.loads(self._read_line(timeout_s))
        except BrokenPipeError:
            raise self._died() from None
        self._signal(signal.SIGSTOP)
        if "error" in answer:
            raise LeapError(*answer["error"])
        return answer

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]

    def _read_line(self, timeout_s: float) -> bytes:
        assert self._process.stdout is not None
        handle, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([handle], [], [], left)[0]:
                raise LeapError(self.label, f"no answer within {timeout_s:.0f} s", "use a smaller workload")
            chunk = os.read(handle, 1 << 16)
            if not chunk:
                raise self._died()
            self._pending += chunk
        line, _, self._pending = self._pending.partition(b"\n")
        return line

    def _died(self) -> LeapError:
        status = self._process.wait()
        self._log.seek(0)
        tail = self._log.read().decode(errors="replace").strip().splitlines()[-15:]
        return LeapError(
            self.label, f"its process ended with status {status}:\n  " + "\n  ".join(tail),
            "free memory or correct the engine's arguments",
        )  # fmt: skip

    def _signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)


@contextlib.contextmanager
def opened(contenders: Sequence[Contender]) -> Iterator[list[Worker]]:
    """Start one worker per contender, loaded one after the other; all are ended when the block is left."""
    with contextlib.ExitStack() as stack:
        workers = []
        for contender in contenders:
            worker = Worker(contender.label, contender.env)
            stack.callback(worker.close)
            worker.about = worker.ask("open", OPEN_TIMEOUT_S, model=contender.model, engine=dict(contender.engine))
            workers.append(worker)
        yield workers


def turns(contenders: int, rounds: int) -> Iterator[tuple[int, int]]:
    """Yield (round, contender): A, B, then B, A, and so on, so that a drift of the machine hits both alike."""
    for number in range(rounds):
        order = range(contenders) if number % 2 == 0 else reversed(range(contenders))
        yield from ((number, index) for index in order)


def measure_rounds(
    workers: Sequence[Worker], workload: Workload, rounds: int, warmup: int, progress: Progress | None = None
) -> list[list[Sample]]:
    """Run a workload ``rounds`` times on every worker, interleaved; returns one list of samples per worker.

    The i-th samples of two workers form a pair: same prompts, measured one right after the other. Warm-up
    rounds come first and are not kept.
    """
    check_rounds(rounds, warmup)
    samples: list[list[Sample]] = [[] for _ in workers]
    total = (warmup + rounds) * len(workers)
    for done, (number, index) in enumerate(turns(len(workers), warmup + rounds), 1):
        answer = workers[index].ask("round", ROUND_TIMEOUT_S, workload=workload.to_json(), number=number)
        if number >= warmup:
            samples[index].append(Sample(**answer))
        if progress is not None:
            progress(done, total)
    return samples


def compare(
    bench: str, described: Sequence[Mapping[str, Any]], samples: Sequence[Sequence[Sample]], metrics: Sequence[str]
) -> dict[str, Any]:
    """Return a result row's figures: quantiles per contender, and A/B per pair with its interval."""
    series = [{metric: [getattr(one, metric) for one in side] for metric in metrics} for side in samples]
    row: dict[str, Any] = {
        "bench": bench,
        "contenders": [
            {**about, "metrics": {metric: summary(values).to_json() for metric, values in side.items()}}
            for about, side in zip(described, series, strict=True)
        ],
    }
    if len(series) == 2:
        a, b = series
        row["ratio_a_over_b"] = {metric: ratio(a[metric], b[metric]).to_json() for metric in metrics}
    return row


def stamped(row: Mapping[str, Any]) -> dict[str, Any]:
    """Add what makes a row reproducible: time, command, versions, hardware."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    load = [round(value, 2) for value in os.getloadavg()]
    return {**row, "time": now, "command": command(), "versions": versions(), "hardware": hardware(), "load": load}


def _environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The worker's environment: nothing imported from the current folder, no usage reports, vLLM's allocator."""
    env = {**os.environ, "PYTHONSAFEPATH": "1", "VLLM_NO_USAGE_STATS": "1", **extra}
    found = importlib.util.find_spec("vllm")
    if found and found.origin and "LD_PRELOAD" not in env:
        # As vLLM's server does for its workers on a CPU; it cannot do so for an engine in its own process.
        for path in sorted((Path(found.origin).parent / "libs").glob("libtcmalloc_minimal*.so*")):
            env["LD_PRELOAD"] = str(path)
    return env
