"""Servers as processes: their environment in tests, their children, and that nothing of them is left."""

from __future__ import annotations

import socket
import time
from pathlib import Path

SERVER_ENV = {
    "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1", "VLLM_LOGGING_LEVEL": "INFO",
}  # fmt: skip
"""For every server that a test starts: no usage reports, a small KV cache, no threads that wait for each other, and the
log level that an engine opened in the test process may have lowered."""

WAIT_S = 180.0
"""How long an ending may take, at most: seconds on a quiet machine, and no test measures them."""


def children_of(pid: int) -> set[int]:
    """All descendants that live now."""
    parents = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    found, grown = {pid}, True
    while grown:
        more = {child for child, parent in parents.items() if parent in found} - found
        found, grown = found | more, bool(more)
    return found - {pid}


def assert_all_gone(pids: set[int], port: int | None = None) -> None:
    """Wait a little for processes to end, and check that a port is free again."""
    deadline = time.monotonic() + WAIT_S
    while (left := {pid for pid in pids if state_of(pid) not in ("", "Z")}) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not left
    if port is not None:
        socket.create_server(("127.0.0.1", port)).close()


def state_of(pid: int) -> str:
    """Return a process's state letter ("T" stopped, "Z" ended but not yet waited for), or "" when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
