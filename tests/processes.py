"""Servers as processes: their environment in tests, their children, and that nothing of them is left."""

from __future__ import annotations

import socket
import time
from pathlib import Path

SERVER_ENV = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
"""For every server that a test starts: no usage reports, a small KV cache, no threads that wait for each other."""


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


def assert_all_gone(pids: set[int], port: int) -> None:
    deadline = time.monotonic() + 20
    left = pids
    while left and time.monotonic() < deadline:
        left = {pid for pid in left if Path(f"/proc/{pid}").exists() and not _is_zombie(pid)}
        time.sleep(0.1)
    assert not left
    with socket.create_server(("127.0.0.1", port)):
        pass  # the port is free again


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True
