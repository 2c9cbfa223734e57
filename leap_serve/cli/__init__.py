"""``leap VERB``: one module per verb, each with ``add_arguments(parser)`` and ``run(args) -> dict``."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import sys
from typing import Any

from leap_serve import __version__
from leap_serve.errors import LeapError, UsageError

VERBS = {
    "demo": "the whole line on the bundled small model, on a CPU, in minutes",
    "run": "the whole line from a recipe in YAML, resumable",
    "profile": "collect the experts' statistics on a task, inside the engine that serves",
    "search": "choose the experts to retain: a profile becomes a plan",
    "methods": "list the methods of search: paper, what each needs, what it decides",
    "cut": "cut the planned experts out of a checkpoint, on files only",
    "verify": "check a cut checkpoint, with --base against the model it came from",
    "inspect": "show what a checkpoint or plan retains and where it came from",
    "tune": "repair and specialise a cut: routing agent and experts, on actively chosen items",
    "export": "merge what tuning learned into the weights: a plain checkpoint",
    "serve": "serve a checkpoint with vLLM's OpenAI-compatible server",
    "compare": "put prompts to several models of one server: answers and speed side by side",
    "bench": "measure latency, throughput, memory or serving, one checkpoint or two interleaved",
    "eval": "score a checkpoint or an endpoint on tasks, against another, or at the off-domain gate",
    "report": "show what runs left on disk as one self-contained HTML page",
    "tune-kernels": "find the fastest launch of the MoE kernels on this GPU, for each |I| of a checkpoint",
    "env": "show versions, hardware and whether vLLM and the plugin are sound",
}


def main(argv: list[str] | None = None) -> int:
    """Run a verb; the result's table goes to stderr or stdout, ``--json`` ends stdout with one JSON line."""
    argv = sys.argv[1:] if argv is None else argv
    # vLLM's flags follow a lone "--" and are not ours to parse.
    cut = argv.index("--") if "--" in argv else len(argv)
    ours, rest = argv[:cut], argv[cut + 1 :]
    parser = argparse.ArgumentParser(prog="leap", description="Prune MoE models and serve them with vLLM.")
    parser.add_argument("--version", action="version", version=f"leap-serve {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    wanted = next((word for word in ours if not word.startswith("-")), None)
    for verb, help_text in VERBS.items():
        # Only the verb that runs is imported: `leap --help` stays instant.
        sub = verbs.add_parser(verb, help=help_text, description=help_text)
        sub.add_argument("--json", action="store_true", help="end standard output with one line of JSON")
        if verb == wanted:
            module = importlib.import_module(f"leap_serve.cli.{verb.replace('-', '_')}")
            module.add_arguments(sub)
            sub.set_defaults(run=module.run)
    args = parser.parse_args(ours)
    args.rest = rest
    try:
        if rest and args.verb != "serve":
            raise UsageError("--", f"leap {args.verb} passes no flags on, got {' '.join(rest)}", "remove them")
        result: dict[str, Any] = args.run(args)
    except LeapError as error:
        print(f"leap {args.verb}: {error}", file=sys.stderr)
        if args.json and error.result is not None:
            print(json.dumps(error.result, ensure_ascii=False))
        return error.exit_code
    except KeyboardInterrupt:
        print(f"leap {args.verb}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if args.json:
        print(json.dumps(result, ensure_ascii=False))
    return 0
