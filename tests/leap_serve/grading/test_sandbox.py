"""Generated code: what passes, what fails, and what each barrier stops. Every attack is shown to work without one."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.grading import sandbox_child
from leap_serve.grading.sandbox import Barrier, BarrierError, best_barrier, run_python

WALL_S = 60.0  # bounded waits, never the thing under test, except where a test gives its own
REFUSED = {"namespace": {"EPERM", "EACCES", "EROFS", "ENOENT"}, "landlock": {"EPERM", "EACCES"}}

# Tries everything in `attempts` and ends with what came of each: "done", or the name of the error.
PROBE = """
import ctypes, errno, json, os
libc = ctypes.CDLL(None, use_errno=True)
def raw(name, *arguments):
    if getattr(libc, name)(*arguments) < 0:
        raise OSError(ctypes.get_errno(), name)
def threads():
    import threading
    threading.Thread(target=int).start()
def run(function):
    try:
        function()
        return "done"
    except OSError as error:
        return errno.errorcode[error.errno]
    except RuntimeError as error:
        return str(error)
parent = os.getppid()
%s
raise SystemExit("RESULT " + json.dumps({name: run(function) for name, function in attempts.items()}))
"""


@pytest.fixture(params=["namespace", "landlock"], scope="module")
def barrier(request: pytest.FixtureRequest) -> Barrier:
    name: Barrier = request.param
    try:
        assert run_python("", WALL_S, name).passed
    except BarrierError as error:
        pytest.skip(f"this kernel has no barrier {name!r}: {error.what}")
    return name


def attempt(attempts: str, barrier: Barrier) -> dict[str, str]:
    """Run a probe with the dict display ``attempts``."""
    outcome = run_python(PROBE % f"attempts = {attempts}", WALL_S, barrier)
    assert outcome.reason.startswith("RESULT "), outcome
    results: dict[str, str] = json.loads(outcome.reason.removeprefix("RESULT "))
    return results


def assert_refused(attempts: str, barrier: Barrier, other: str = "EPERM") -> None:
    """Every attempt is refused behind the barrier."""
    results = attempt(attempts, barrier)
    assert results and set(results.values()) <= {*REFUSED[barrier], other}, results


def test_a_clean_end_passes_and_the_reason_of_a_failure_is_kept(barrier: Barrier) -> None:
    assert run_python("assert sum([1, 2]) == 3", WALL_S, barrier).passed
    outcome = run_python("assert 1 == 2, 'one is not two'", WALL_S, barrier)
    assert not outcome.passed
    assert outcome.reason == "AssertionError: one is not two"
    assert "SyntaxError" in run_python("def f(:", WALL_S, barrier).reason


def test_programs_can_do_what_tests_of_functions_need(barrier: Barrier) -> None:
    source = """
import collections, dataclasses, datetime, decimal, fractions, functools, hashlib, heapq, itertools, json, math
import os, random, re, statistics, string, sys, tempfile, time, typing, uuid
@dataclasses.dataclass
class Point:
    x: "int" = 0
assert __name__ == "__main__" and Point(1).x == 1
assert hashlib.md5(b"abc").hexdigest().startswith("900150")
assert datetime.datetime.now().year > 2000 and uuid.uuid4() and random.random() < 1
assert sys.argv == ["program.py"] and set(os.environ) <= {"LC_CTYPE"}
with open("note.txt", "w") as stream:
    stream.write("kept")
os.rename("note.txt", "moved.txt")
assert open("moved.txt").read() == "kept" and os.listdir() == ["moved.txt"]
os.unlink("moved.txt")
time.sleep(0.01)
"""
    assert run_python(source, WALL_S, barrier) == run_python("", WALL_S, barrier)


@pytest.mark.parametrize("source", ["raise SystemExit(0)", "import os\nos._exit(0)"])
def test_a_program_that_leaves_before_its_last_line_has_not_passed(source: str) -> None:
    outcome = run_python(source + "\nassert False", WALL_S)
    assert not outcome.passed
    assert outcome.reason == "ended before its last line, with exit status 0"


def test_text_that_is_no_program_fails_without_an_error_of_ours() -> None:
    for source in ("\udcff", "x = 1\x00", "(" * 100_000, "é = 'ü'\nassert é != 'ü'"):
        assert not run_python(source, WALL_S).passed


def test_a_sandbox_that_does_not_start_is_no_verdict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = best_barrier()
    monkeypatch.setattr(sandbox_child, "__file__", str(tmp_path / "moved.py"))
    with pytest.raises(LeapError, match=r"ended before the program began: .*No such file"):
        run_python("", barrier=best)
    monkeypatch.delenv("LEAP_ALLOW_UNSAFE_EXECUTION", raising=False)
    with pytest.raises(UnsupportedError, match=r"namespace: ended before .*; landlock: ended before"):
        best_barrier.__wrapped__()


def test_fork_bombs_and_other_programs(barrier: Barrier) -> None:
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except BlockingIOError: pass"
    assert run_python(bomb, WALL_S, barrier).reason.startswith("PermissionError")
    attempts = """{
        "fork": os.fork, "vfork and exec": lambda: __import__("subprocess").run([os.devnull]),
        "posix_spawn": lambda: os.posix_spawn("/bin/true", ["true"], {}), "thread": threads,
        "fork of libc": lambda: raw("fork"), "clone": lambda: raw("syscall", CLONE, 17, 0, 0, 0, 0),
        "exec": lambda: os.execv("/bin/true", ["true"]), "unshare": lambda: raw("unshare", 0x10000000),
    }""".replace("CLONE", "56" if os.uname().machine == "x86_64" else "220")
    assert_refused(attempts, barrier, "can't start new thread")


def test_memory_bombs(barrier: Barrier) -> None:
    for source in ("x = bytearray(2 << 30)", "x = [0]\nwhile True: x += x"):
        assert run_python(source, WALL_S, barrier).reason == "MemoryError"
    attempts = '{"memory file": lambda: os.memfd_create("x"), "shared memory": lambda: raw("shmget", 0, 4096, 0o1600)}'
    assert set(attempt(attempts, "none").values()) == {"done"}
    assert_refused(attempts, barrier)


def test_floods_of_output_and_files(barrier: Barrier) -> None:
    assert run_python("for _ in range(10000): print('x' * 1000)", WALL_S, barrier).passed
    flood = run_python("import sys\nwhile True: sys.stderr.write('x' * 65536); sys.stderr.flush()", WALL_S, barrier)
    assert not flood.passed and len(flood.reason) <= 4096
    assert "Errno 27" in run_python("open('big', 'wb').write(b'x' * (8 << 20))", WALL_S, barrier).reason
    many = "number = 0\nwhile True:\n    number += 1\n    open(str(number), 'wb').write(b'x' * 999999)"
    assert run_python(many, WALL_S, barrier).reason in (
        "OSError: [Errno 28] No space left on device", "wrote more than 16 MiB of files",
    )  # fmt: skip
    empty = "number = 0\nwhile True:\n    number += 1\n    open(str(number), 'wb').close()"
    assert "No space left" in (why := run_python(empty, WALL_S, barrier).reason) or "wrote more" in why
    assert "Errno 24" in run_python("fs = [open('f', 'w') for _ in range(100)]", WALL_S, barrier).reason


def test_time(barrier: Barrier) -> None:
    assert run_python("while True: pass", WALL_S, barrier, cpu_s=1).reason == "used more than 1 s of CPU time"
    stubborn = "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\nwhile True: pass"
    assert run_python(stubborn, WALL_S, barrier, cpu_s=1).reason == "killed by SIGKILL"
    assert run_python("import time\ntime.sleep(600)", 3.0, barrier).reason == "still running after 3.0 s"


def test_signals_and_limits_reach_no_other_process(barrier: Barrier) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: received.append(number))
    attempts = """{
        "kill": lambda: os.kill(parent, 10), "all": lambda: os.kill(-1, 0), "group": lambda: os.killpg(1, 0),
        "queue": lambda: raw("sigqueue", parent, 10, None),
        "limits": lambda: __import__("resource").prlimit(parent, 7),
        "owner of a file": lambda: __import__("fcntl").fcntl(0, 8, parent),
        "priority": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
        "pidfd": lambda: os.pidfd_open(parent),
    }"""
    try:
        assert attempt('{"kill": lambda: os.kill(parent, 10)}', "none") == {"kill": "done"}
        time.sleep(0.01)
        assert received == [signal.SIGUSR1], "the attack works where nothing stops it"
        assert_refused(attempts, barrier)
        assert received == [signal.SIGUSR1]
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert run_python("import os\nos.abort()", WALL_S, barrier).reason == "killed by SIGABRT"


@pytest.fixture
def victim() -> Iterator[Path]:
    """A file in the home folder."""
    with tempfile.TemporaryDirectory(dir=Path.home(), prefix=".leap-sandbox-test-") as folder:
        (Path(folder) / "secret").write_text("keep me")
        yield Path(folder) / "secret"


def test_the_home_folder_can_be_neither_read_nor_changed(barrier: Barrier, victim: Path) -> None:
    attempts = f"""{{
        "list": lambda: os.listdir({str(victim.parent)!r}), "read": lambda: open({str(victim)!r}),
        "append": lambda: open({str(victim)!r}, "a"), "chmod": lambda: os.chmod({str(victim)!r}, 0o600),
        "times": lambda: os.utime({str(victim)!r}), "link": lambda: os.link({str(victim)!r}, {f"{victim}2"!r}),
        "empty": lambda: os.open({str(victim)!r}, os.O_RDONLY | os.O_TRUNC),
        "truncate": lambda: os.truncate({str(victim)!r}, 0),
        "rename": lambda: os.rename({str(victim)!r}, {f"{victim}2"!r}),
        "new": lambda: open({f"{victim}3"!r}, "w"), "remove": lambda: os.unlink({f"{victim}"!r}),
        "memory of the parent": lambda: open(f"/proc/{{parent}}/mem", "rb"), "passwords": lambda: open("/etc/passwd"),
    }}"""
    assert_refused(attempts, barrier)
    assert victim.read_text() == "keep me"
    assert [path.name for path in victim.parent.iterdir()] == ["secret"]
    without = attempt(attempts, "none")
    assert without.pop("link") in ("done", "ENOENT") and without.pop("memory of the parent")
    assert set(without.values()) <= {"done", "ENOENT"} and without["read"] == without["append"] == "done"


def test_no_socket_of_any_kind(barrier: Barrier) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        attempts = f"""{{
            "connect": lambda: __import__("socket").create_connection(("127.0.0.1", {server.getsockname()[1]})),
            "listen": lambda: __import__("socket").create_server(("127.0.0.1", 0)),
            "datagram": lambda: __import__("socket").socket(type=2), "local": lambda: __import__("socket").socket(1),
            "pair": lambda: __import__("socket").socketpair(), "by libc": lambda: raw("socket", 2, 1, 0),
        }}"""
        assert set(attempt(attempts, "none").values()) == {"done"}
        server.accept()[0].close()
        assert_refused(attempts, barrier)
        server.setblocking(False)
        with pytest.raises(BlockingIOError):
            server.accept()


def test_nothing_is_left_behind(barrier: Barrier, tmp_path: Path) -> None:
    before = {path.name for path in Path(tempfile.gettempdir()).glob("leap-sandbox-*")}
    attempts = f"""{{
        "outside": lambda: open({str(tmp_path / "left")!r}, "w"), "tmp": lambda: open("/tmp/leap-left", "w"),
        "memory": lambda: open("/dev/shm/leap-left", "w"), "folder": lambda: os.mkdir("deep"),
        "symlink": lambda: os.symlink("/", "root"), "socket": lambda: os.mknod("fifo", 0o10600),
        "unwritable": lambda: os.chmod(".", 0), "extended": lambda: os.setxattr(".", "user.a", b"b"),
    }}"""
    assert_refused(attempts, barrier)
    assert run_python("for i in range(9): open(str(i), 'w').write('x')", WALL_S, barrier).passed
    after = {path.name for path in Path(tempfile.gettempdir()).glob("leap-sandbox-*")}
    assert after <= before and not list(tmp_path.iterdir())


def test_every_right_is_gone(barrier: Barrier) -> None:
    """No capability: raising a limit, which root may, fails; mounting and tracing are unknown calls."""
    attempts = """{
        "limit": lambda: raw("prlimit", 0, 7, (ctypes.c_ulong * 2)(4096, 4096), None),
        "mount": lambda: raw("mount", b"x", b"/", b"tmpfs", 0, None), "trace": lambda: raw("ptrace", 16, parent, 0, 0),
        "user": lambda: os.setuid(1), "chroot": lambda: os.chroot("."), "prctl": lambda: raw("prctl", 1, 0, 0, 0, 0),
        "rings": lambda: raw("syscall", 425, 1, ctypes.create_string_buffer(120)),
        "keys": lambda: raw("syscall", 9999, 0),
    }"""
    assert_refused(attempts, barrier)


def test_a_program_dies_with_its_parent(barrier: Barrier) -> None:
    code = f"from leap_serve.grading.sandbox import run_python; run_python('import time; time.sleep(900)', 900, {barrier!r})"
    with subprocess.Popen([sys.executable, "-P", "-c", code]) as parent:
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children")
        assert wait_for(lambda: children.read_text().split())
        child = Path("/proc", children.read_text().split()[0])
        assert wait_for(lambda: "Seccomp:\t2" in (child / "status").read_text()), "behind its barrier"
        parent.kill()
    assert wait_for(lambda: not child.exists() or "State:\tZ" in (child / "status").read_text())


def wait_for(condition: Any) -> bool:
    """Whether the condition comes true within a minute."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return False


def test_the_namespace_alone_has_no_network_and_no_files(victim: Path, tmp_path: Path) -> None:
    """The filter of system calls is not what this barrier rests on."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""
import os, socket, sys
sys.path.insert(0, {str(Path(sandbox_child.__file__).parent)!r})
import sandbox_child
try: sandbox_child.enter_namespaces({str(tmp_path)!r})
except OSError as error: raise SystemExit(f"skip {{error}}")
assert not os.path.exists({str(victim)!r}) and not os.path.exists("/proc/self") and not os.path.exists("/tmp")
try: open("/usr/lib/leap-left", "w")
except OSError: pass
else: raise SystemExit("wrote to /usr/lib")
try: socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 5)
except OSError: raise SystemExit("no network")
"""
        run = subprocess.run(
            [sys.executable, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False
        )
    if run.stderr.startswith("skip"):
        pytest.skip(f"this kernel allows no namespaces: {run.stderr}")
    assert run.stderr.strip() == "no network"
    assert not list(tmp_path.iterdir())


REFUSE = """
import ctypes, os, struct, sys
def instructions():
    yield (0x20, 0, 0, 0)
    for number in map(int, sys.argv[1].split()):
        yield from ((0x15, 0, 1, number), (0x06, 0, 0, 0x00050001))
    yield (0x06, 0, 0, 0x7FFF0000)
code = b"".join(struct.pack("HBBI", *i) for i in instructions())
kept = ctypes.create_string_buffer(code, len(code))
libc = ctypes.CDLL(None)
assert libc.prctl(38, ctypes.c_ulong(1), 0, 0, 0) == 0
assert libc.prctl(22, ctypes.c_ulong(2), struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(kept)), 0, 0) == 0
from leap_serve.errors import LeapError
from leap_serve.grading.sandbox import best_barrier
try: print(best_barrier())
except LeapError as error: print(error)
"""


@pytest.mark.parametrize(
    ("refused", "allow", "expected"),
    [("unshare", "", "landlock"), ("both", "", "--allow-unsafe-execution"), ("both", "1", "none")],
)
def test_the_best_barrier_that_a_kernel_allows(refused: str, allow: str, expected: str) -> None:
    """A container often refuses unshare(2); the same filter that does it there does it here."""
    try:
        run_python("", WALL_S, "landlock")
    except BarrierError as error:
        pytest.skip(f"this kernel has no Landlock to fall back to: {error.what}")
    unshare = 272 if os.uname().machine == "x86_64" else 97
    numbers = f"{unshare}" if refused == "unshare" else f"{unshare} 444"
    env = {**os.environ, "LEAP_ALLOW_UNSAFE_EXECUTION": allow}
    command = [sys.executable, "-P", "-c", REFUSE, numbers]
    run = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=True)
    assert expected in run.stdout
    if expected.startswith("--"):
        assert "unshare: Operation not permitted" in run.stdout and "landlock_create_ruleset" in run.stdout
