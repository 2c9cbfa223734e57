"""What GET /metrics says of each specialist, beside vLLM's own numbers, which know the engine only."""

from __future__ import annotations

import contextlib
from typing import Any

LABEL = "model_name"


class Counters:
    """Requests and tokens by the name that clients asked for. One per process, as Prometheus's registry is.

    Args:
        registry: of prometheus_client; None takes the one that GET /metrics shows.
    """

    def __init__(self, registry: Any = None) -> None:
        from prometheus_client import REGISTRY, Counter, Gauge

        here = registry or REGISTRY
        self.requests = Counter(
            "leap:specialist_requests", "Requests that the engine has ended, aborted ones included.", [LABEL],
            registry=here,
        )  # fmt: skip
        self.prompt_tokens = Counter("leap:specialist_prompt_tokens", "Tokens of prompts.", [LABEL], registry=here)
        self.generated_tokens = Counter(
            "leap:specialist_generation_tokens", "Tokens generated.", [LABEL], registry=here
        )
        self.running = Gauge(
            "leap:specialist_requests_running", "Requests that the engine has.", [LABEL], registry=here
        )

    def begin(self, name: str) -> Counted:
        """Count a request in; ``end`` counts it out."""
        self.running.labels(name).inc()
        return Counted(self, name)

    def forget(self, name: str) -> None:
        """Drop a name that is served no more, or the names of all times would pile up."""
        for metric in (self.requests, self.prompt_tokens, self.generated_tokens, self.running):
            with contextlib.suppress(KeyError):
                metric.remove(name)


class Counted:
    """One request: what its outputs hold, added up in the end."""

    def __init__(self, counters: Counters, name: str) -> None:
        self._counters, self._name = counters, name
        self._prompt = self._generated = 0

    def see(self, output: Any) -> None:
        """Look at one of vLLM's RequestOutputs, which holds the tokens since the last one, or all at the end."""
        if not self._prompt and output.prompt_token_ids is not None:
            self._prompt = len(output.prompt_token_ids)
        for one in output.outputs:
            self._generated += len(one.token_ids)

    def end(self) -> None:
        """Count the request out, whether it was answered or aborted."""
        counters, name = self._counters, self._name
        counters.running.labels(name).dec()
        counters.requests.labels(name).inc()
        counters.prompt_tokens.labels(name).inc(self._prompt)
        counters.generated_tokens.labels(name).inc(self._generated)
