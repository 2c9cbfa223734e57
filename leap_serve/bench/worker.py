"""``python -m leap_serve.bench.worker``: one contender of a benchmark, in a process of its own.

Speaks JSON lines: a request on standard input, its answer on standard output. Whatever vLLM prints
goes to standard error. The parent stops the process (SIGSTOP) while the other contender is measured.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from leap_serve.errors import LeapError
from leap_serve.measure import measure_round
from leap_serve.workload import Workload


class Contender:
    """Answers requests; each method is a request of the same name, and returns JSON."""

    def open(self, model: str, engine: Mapping[str, Any]) -> dict[str, Any]:
        """Load the model into the engine that serves."""
        from leap_serve.engines.vllm_engine import VllmEngine

        self.engine = VllmEngine(model, **engine)
        kernels = Counter(f"{one['kernel']}: {one['experts_class']}" for one in self.engine.kernels())
        return {
            "dtype": self.engine.dtype, "max_model_len": self.engine.max_model_len, "threads": _threads(),
            "moe_kernels": dict(kernels),
        }  # fmt: skip

    def round(self, workload: Mapping[str, Any], number: int) -> dict[str, Any]:
        """Run one round of a workload; returns its Sample."""
        return asdict(measure_round(self.engine, Workload(**workload), number))

    def memory(self) -> dict[str, Any]:
        """Report bytes held."""
        return asdict(self.engine.memory())

    def client(self, flags: list[str]) -> dict[str, Any]:
        """Run vLLM's serving benchmark as a client of a server that is up; per-request times in seconds."""
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        result = main(parser.parse_args([*flags, "--save-detailed"]))
        wanted = ("completed", "failed", "errors", "start_times", "ttfts", "itls", "input_lens", "output_lens")
        return {key: result.get(key) for key in wanted}


def _threads() -> int:
    import torch

    return int(torch.get_num_threads())


def main() -> int:
    """Answer until standard input ends."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    contender = Contender()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = getattr(contender, request.pop("do"))(**request)
        except LeapError as error:
            answer = {"error": [error.where, error.what, error.remedy]}
        print(json.dumps(answer), file=answers, flush=True)
    # Freeing the model takes seconds and nobody waits for anything it could still say.
    os._exit(0)


if __name__ == "__main__":
    raise SystemExit(main())
