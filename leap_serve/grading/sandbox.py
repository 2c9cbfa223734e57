"""Runs generated Python in a process of its own, behind barriers of the kernel. Model output is never run elsewhere.

Two barriers, the first that the kernel allows: ``namespace`` (user, mount, network, IPC namespaces: the program's
root holds Python's libraries and 16 MiB of memory) or ``landlock`` (files by Landlock). Both add a filter that allows
the system calls a single process needs by name — no socket, no process or thread, no signal to others, no other
program — and both drop every capability and limit CPU time, memory, file size, open files and wall clock; the
environment is empty, the folder temporary, the output discarded. No privilege is needed (``sandbox_child``).

A program shares its interpreter with its own tests, so one that is out to forge its verdict can: the sandbox
protects the machine, not the score.
"""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.grading import sandbox_child

Barrier = Literal["namespace", "landlock", "none"]

CPU_S = 4
WALL_S = 10.0  # a loop ends earlier, by its CPU time; a busy machine needs some of this to start
START_S = 60.0
STDERR_BYTES = 4096
POLL_S = 0.02
UNSAFE = "LEAP_ALLOW_UNSAFE_EXECUTION"


class BarrierError(LeapError):
    """A barrier that this kernel does not let us raise."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: ``passed`` iff it ran to its last line; ``reason`` says why it did not."""

    passed: bool
    reason: str


@cache
def best_barrier() -> Barrier:
    """Return the strongest barrier of this kernel, found by running an empty program behind it.

    Raises:
        UnsupportedError: neither works, and LEAP_ALLOW_UNSAFE_EXECUTION=1 does not permit to go without ("none").
    """
    reasons = []
    for barrier in ("namespace", "landlock"):
        try:
            outcome = run_python("", START_S, barrier)
        except LeapError as error:
            reasons.append(f"{barrier}: {error.what}")
            continue
        if outcome.passed:
            return barrier
        reasons.append(f"{barrier}: {outcome.reason}")
    if os.environ.get(UNSAFE) == "1":
        return "none"
    raise UnsupportedError(
        "sandbox", f"this kernel lets us raise no barrier around generated code ({'; '.join(reasons)})",
        f"run where user namespaces or Landlock work, or, at your own risk, with --allow-unsafe-execution ({UNSAFE}=1)",
    )  # fmt: skip


def run_python(source: str, wall_s: float = WALL_S, barrier: Barrier | None = None, cpu_s: int = CPU_S) -> Outcome:
    """Run ``source`` as a Python program behind ``barrier`` (the best by default) and say whether it came to its end.

    Raises:
        UnsupportedError: this kernel has no barrier.
        BarrierError: ``barrier`` was named and this kernel does not have it.
        LeapError: the sandbox's own process ended before it came to the program, of which that says nothing.
    """
    barrier = barrier or best_barrier()
    token = secrets.token_hex(16).encode()
    with (
        tempfile.TemporaryDirectory(prefix="leap-sandbox-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as program,
        tempfile.TemporaryFile() as verdict,
        tempfile.TemporaryFile() as stderr,
    ):
        program.write(token + b"\n" + source.encode("utf-8", "replace"))
        program.seek(0)
        # The base interpreter: with -I -S a virtual environment adds nothing but its folder.
        python = getattr(sys, "_base_executable", None) or sys.executable
        process = subprocess.Popen(
            [python, "-I", "-S", "-B", sandbox_child.__file__, barrier, str(os.getpid()), str(cpu_s)],
            cwd=folder, env={}, stdin=program, stdout=verdict, stderr=stderr, start_new_session=True,
        )  # fmt: skip
        try:
            stopped = _wait(process, Path(folder), wall_s)
        finally:
            _kill_group(process)
        verdict.seek(0)
        said = verdict.read(STDERR_BYTES)
        if said == sandbox_child.BEGUN + token:
            return Outcome(True, "")
        if said.startswith(b"setup: "):
            what = said.removeprefix(b"setup: ").decode(errors="replace")
            raise BarrierError("sandbox", what, "see the section on safety in the README")
        stderr.seek(max(0, stderr.seek(0, os.SEEK_END) - STDERR_BYTES))
        why = stopped or _why(process.returncode, stderr.read(), cpu_s)
        if not said and not stopped:
            raise LeapError(
                "sandbox",
                f"ended before the program began: {why}",
                "see whether leap-serve is whole and memory is left",
            )
        return Outcome(False, why)


def _wait(process: subprocess.Popen[bytes], folder: Path, wall_s: float) -> str:
    """Wait for the end; return why the program has to be stopped before it, or nothing."""
    deadline = time.monotonic() + wall_s
    while True:
        try:
            process.wait(POLL_S)
            return ""
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                return f"still running after {wall_s} s"
            # Behind "namespace" this folder stays empty: the program's lies in a file system of limited size.
            if _size(folder) > sandbox_child.DISK_BYTES:
                return f"wrote more than {sandbox_child.DISK_BYTES >> 20} MiB of files"


def _size(folder: Path) -> int:
    """Bytes of the files of a folder; each counts as a page at least, so that empty ones run out, too."""
    total = 0
    for entry in os.scandir(folder):
        try:
            total += max(4096, entry.stat(follow_symlinks=False).st_size)
        except FileNotFoundError:
            continue
    return total


def _why(code: int, stderr: bytes, cpu_s: int) -> str:
    """Say how a program that did not come to its end has ended."""
    if code == -signal.SIGXCPU:
        return f"used more than {cpu_s} s of CPU time"
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    tail = stderr.decode(errors="replace").strip().splitlines()
    return tail[-1] if tail and code else f"ended before its last line, with exit status {code}"


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child's process group, and reap the child."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
