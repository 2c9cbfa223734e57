"""Runs generated Python in a process of its own, under limits. Model output is never run elsewhere.

What holds here: an own process group and session, CPU seconds, address space, number of processes,
file size and open files limited, wall clock, an empty environment, a temporary working directory
that is removed, standard output discarded, and no socket (creating one raises inside the child).
What does not hold yet: a kernel-enforced network and file-system barrier.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

WALL_S = 5.0
CPU_S = 4
MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
STDERR_BYTES = 4096

# Runs in the child before the program: the limits cannot be raised again, and every way to a
# socket in the standard library goes through the C module `_socket`, which is made unimportable.
_GUARD = f"""
import resource, sys
for what, much in (("CPU", {CPU_S}), ("AS", {MEMORY_BYTES}), ("FSIZE", {FILE_BYTES}),
                   ("NOFILE", 32), ("NPROC", 0), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + what), (much, much))
sys.modules["_socket"] = sys.modules["socket"] = None
def _audit(event, args):
    if event.startswith(("socket.", "subprocess.", "os.fork", "os.posix_spawn", "os.exec", "os.system",
                         "os.kill", "ctypes.", "shutil.rmtree")):
        raise PermissionError("not allowed in the sandbox: " + event)
sys.addaudithook(_audit)
del resource, sys, what, much, _audit
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a program ended: ``passed`` iff it exited with 0; ``reason`` says why it did not."""

    passed: bool
    reason: str


def run_python(source: str, wall_s: float = WALL_S) -> Outcome:
    """Run ``source`` as a Python program under the limits and say whether it exited with 0."""
    with tempfile.TemporaryDirectory(prefix="leap-sandbox-") as folder:
        Path(folder, "program.py").write_text(source, encoding="utf-8")
        bootstrap = (
            f"{_GUARD}\nexec(compile(open('program.py').read(), 'program.py', 'exec'), {{'__name__': '__main__'}})"
        )
        with tempfile.TemporaryFile() as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", "-S", "-c", bootstrap],
                cwd=folder,
                env={"PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
            try:
                code = process.wait(timeout=wall_s)
            except subprocess.TimeoutExpired:
                return Outcome(False, f"still running after {wall_s} s")
            finally:
                _kill_group(process)
            if code == 0:
                return Outcome(True, "")
            stderr.seek(0)
            tail = stderr.read(STDERR_BYTES).decode(errors="replace").strip().splitlines()
            return Outcome(False, tail[-1] if tail else f"exit status {code}")


def _kill_group(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of the child's process group, and reap the child."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
