"""``leap serve`` as a child process: start it, wait until it answers, stop it."""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

from leap_serve.errors import LeapError

_READY = re.compile(r"^leap serve: (?P<name>.+) is ready at (?P<url>\S+)/v1;", re.MULTILINE)


def dying_with_parent(number: int) -> Callable[[], object] | None:
    """Return a ``preexec_fn`` with which a child gets a signal when the thread that started it ends, however it ends.

    Linux only; None elsewhere.
    """
    if sys.platform != "linux":
        return None
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG of prctl(2)
    libc, parent = ctypes.CDLL(None), os.getpid()

    def bind() -> None:
        libc.prctl(set_parent_death_signal, int(number))
        if os.getppid() != parent:  # it ended before the kernel knew, and no signal will come
            os._exit(1)

    return bind


class Server:
    """A running ``leap serve MODEL``, in its own process group; a context manager that stops it.

    It also stops when the thread that made it ends, were it by SIGKILL.

    Args:
        model: folder, ``leap-tiny`` or model id.
        flags: of leap serve, then ``--`` and vLLM's.
        env: variables added to this process's environment.
        timeout_s: how long loading may take.

    Attributes: ``url`` (without /v1), ``name`` (of the model, for clients), ``pid``. Raises LeapError with the
    server's own message when it does not come up.
    """

    def __init__(
        self, model: str | Path, flags: Sequence[str] = (), env: Mapping[str, str] | None = None, timeout_s: float = 900
    ) -> None:
        self.model = str(model)
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "leap_serve.cli", "serve", self.model, "--port", "0", *flags],
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=subprocess.STDOUT, start_new_session=True,
            env={**os.environ, "PYTHONSAFEPATH": "1", **(env or {})}, preexec_fn=dying_with_parent(signal.SIGTERM),
        )  # fmt: skip
        self.pid = self._process.pid
        try:
            self.name, self.url = self._wait_ready(timeout_s)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> Server:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def log(self) -> str:
        """What the server has printed so far."""
        # Its own offset: seeking would move the one that the child writes at.
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def stop(self, number: int = signal.SIGTERM, timeout_s: float = 60) -> int:
        """Ask it to stop, wait, and return its exit status; whatever is left after that is killed."""
        if self._process.poll() is None:
            self._process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout_s)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, signal.SIGKILL)
        return self._process.wait()

    def wait(self, timeout_s: float) -> int:
        """Wait until it ends by itself and return its exit status; raises LeapError when it does not."""
        try:
            return self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise LeapError(self.model, f"the server still runs after {timeout_s:.0f} s", "stop it") from None

    def _wait_ready(self, timeout_s: float) -> tuple[str, str]:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            ended = self._process.poll() is not None
            found = _READY.search(self.log)
            if found:
                return found["name"], found["url"]
            if ended:
                raise self._failure()
            time.sleep(0.1)
        raise LeapError(self.model, f"the server was not ready within {timeout_s:.0f} s", "see whether it fits")

    def _failure(self) -> LeapError:
        """Give the error that leap serve printed, or the end of its log."""
        lines = self.log.strip().splitlines()
        said = [line.removeprefix("leap serve: ") for line in lines if line.startswith("leap serve: ")]
        what = said[-1] if said else "\n  ".join(lines[-15:])
        status = self._process.returncode
        return LeapError(
            self.model, f"leap serve ended with status {status}: {what}", "start it by hand to see its log"
        )
