"""``leap compare URL --models base,math --prompt …``: answers and speed of several served models side by side."""

from __future__ import annotations

import argparse
import os
from typing import Any

from leap_serve.cli.console import say, table
from leap_serve.evaluation.compare import Asking, compare


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the verb's flags."""
    parser.add_argument("url", help="of the server, such as http://127.0.0.1:8000")
    parser.add_argument("--models", required=True, help="served names, comma-separated; base is the model itself")
    parser.add_argument("--prompt", action="append", required=True, help="may be given several times")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--completion", action="store_true", help="complete the prompt instead of chatting")
    parser.add_argument("--rounds", type=int, default=3, help="questions per model; times are medians (default 3)")
    parser.add_argument("--api-key", help="default: VLLM_API_KEY, which does not show in the process list")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Ask and show."""
    key = args.api_key or os.environ.get("VLLM_API_KEY")
    asking = Asking(args.max_tokens, args.temperature, not args.completion, key)
    models = [name.strip() for name in args.models.split(",") if name.strip()]
    rows = compare(args.url, list(dict.fromkeys(models)), args.prompt, asking, args.rounds)
    for prompt in args.prompt:
        of_prompt = [row for row in rows if row.prompt == prompt]
        table(
            f"{prompt!r}, median of {args.rounds}",
            ["model", "TTFT ms", "TPOT ms", "E2EL ms", "tokens", "ended by"],
            [
                [
                    row.model, f"{row.answer.ttft_ms:.1f}",
                    "" if row.answer.tpot_ms is None else f"{row.answer.tpot_ms:.2f}", f"{row.answer.e2el_ms:.1f}",
                    row.answer.completion_tokens, row.answer.finish_reason,
                ]
                for row in of_prompt
            ],
        )  # fmt: skip
        for row in of_prompt:
            say(f"{row.model}: {row.answer.text.strip()}\n")
    return {"url": args.url, "rows": [row.to_json() for row in rows]}
