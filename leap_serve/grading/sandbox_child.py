"""The sandboxed process itself: ``python -I -S sandbox_child.py BARRIER PARENT CPU_S``; standard library only.

Standard input holds a token, a line feed and the program. This process gives up whatever the program does not
need, in an order that needs no privilege, and then executes the program. Standard output receives BEGUN before the
program and the token if it ran to its end, or ``setup: why`` where a barrier could not be raised; the program itself never sees it.

System calls are allowed by name and everything else fails with EPERM (``ALLOWED``): what the kernel learns
tomorrow is refused, too. Sources: seccomp(2), landlock(7), user_namespaces(7), mount_setattr(2), pivot_root(2).
"""

# Importing pathlib would double the time that this process takes to start.
# ruff: noqa: PTH100, PTH103, PTH109, PTH110, PTH113, PTH120, PTH102

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import types

BEGUN = b"begun "
MEMORY_BYTES = 512 << 20
FILE_BYTES = 1 << 20
DISK_BYTES = 16 << 20
OPEN_FILES = 32

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7), "riscv64": (1, 0xC00000F3)}
# name: number on x86_64, number in the generic table (aarch64, riscv64); -1 where there is none.
ALLOWED = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, -1), "fstat": (5, 80), "lstat": (6, -1),
    "poll": (7, -1), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "pread64": (17, 67),
    "pwrite64": (18, 68), "readv": (19, 65), "writev": (20, 66), "access": (21, -1), "select": (23, -1),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, -1),
    "pause": (34, -1), "nanosleep": (35, 101), "getitimer": (36, 102), "alarm": (37, -1), "setitimer": (38, 103),
    "getpid": (39, 172), "sendfile": (40, 71), "exit": (60, 93), "uname": (63, 160), "fsync": (74, 82),
    "fdatasync": (75, 83), "ftruncate": (77, 46), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "rename": (82, -1), "unlink": (87, -1), "readlink": (89, -1), "umask": (95, 166), "gettimeofday": (96, 169),
    "getrlimit": (97, 163), "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174),
    "getgid": (104, 176), "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "getpgrp": (111, -1),
    "getgroups": (115, 158), "getpgid": (121, 155), "getsid": (124, 156), "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137), "rt_sigsuspend": (130, 133), "sigaltstack": (131, 132), "statfs": (137, 43),
    "fstatfs": (138, 44), "gettid": (186, 178), "time": (201, -1), "futex": (202, 98), "sched_getaffinity": (204, 123),
    "getdents64": (217, 61), "restart_syscall": (219, 128), "fadvise64": (221, 223), "clock_gettime": (228, 113),
    "clock_getres": (229, 114), "clock_nanosleep": (230, 115), "exit_group": (231, 94), "newfstatat": (262, 79),
    "unlinkat": (263, 35), "renameat": (264, 38), "readlinkat": (267, 78), "faccessat": (269, 48),
    "pselect6": (270, 72), "ppoll": (271, 73), "dup3": (292, 24), "getcpu": (309, 168), "renameat2": (316, 276),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "close_range": (436, 436),
    "faccessat2": (439, 439),
}  # fmt: skip
# Calls allowed only where one argument has one of these values. fcntl: no F_SETOWN, which would send signals.
_OWN_PID = -1
ALLOWED_IF = {
    "ioctl": ((16, 29), 1, (0x5401, 0x5451)),  # TCGETS, FIOCLEX
    "fcntl": ((72, 25), 1, (0, 1, 2, 3, 4, 1030)),  # DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC
    "kill": ((62, 129), 0, (_OWN_PID,)),
    "tgkill": ((234, 131), 0, (_OWN_PID,)),
    "prlimit64": ((302, 261), 0, (0,)),
}
# Opening read-only with O_TRUNC empties a file, which Landlock below ABI 3 does not see. name: numbers, flags' argument
OPENING = {"open": ((2, -1), 1), "openat": ((257, 56), 2)}

_libc = ctypes.CDLL(None, use_errno=True)


def _call(what: str, *arguments: object, number: int | None = None) -> int:
    """Call libc's function, or the system call of that number, and raise OSError naming it where it fails."""
    result: int = getattr(_libc, what)(*arguments) if number is None else _libc.syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def readable() -> list[str]:
    """What Python needs to import its standard library: existing paths, none inside another."""
    wanted = [
        os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", f"{sys.base_prefix}/lib64",
        "/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/share/zoneinfo", "/etc/ld.so.cache",
    ]  # fmt: skip
    paths: list[str] = []
    for path in sorted({os.path.abspath(path) for path in wanted if os.path.exists(path)}):
        if not any(path.startswith(f"{parent}/") for parent in paths):
            paths.append(path)
    return paths


def enter_namespaces(folder: str) -> None:
    """Leave for namespaces of our own: no network but a loopback that is down, and a root of 16 MiB in memory.

    That root is mounted over ``folder``, holds ``readable()`` read-only, and dies with this process.
    """
    user, group = os.getuid(), os.getgid()
    paths = readable()
    # CLONE_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWNET
    _call("unshare", 0x00020000 | 0x04000000 | 0x08000000 | 0x10000000 | 0x40000000)
    for name, text in (("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")):
        with open(f"/proc/self/{name}", "w") as stream:
            stream.write(text)
    _call("mount", None, b"/", None, ctypes.c_ulong(0x4000 | 0x40000), None)  # MS_REC | MS_PRIVATE
    options = f"size={DISK_BYTES},nr_inodes=4096,mode=700".encode()
    _call("mount", b"tmpfs", folder.encode(), b"tmpfs", ctypes.c_ulong(2 | 4 | 8), options)  # nosuid, nodev, noexec
    read_only = struct.pack("QQQQ", 1 | 2 | 4, 0, 0, 0)  # MOUNT_ATTR_RDONLY | _NOSUID | _NODEV
    for path in paths:
        inside = folder + path
        os.makedirs(os.path.dirname(inside) if os.path.isfile(path) else inside, exist_ok=True)
        if os.path.isfile(path):
            open(inside, "x").close()
        source = os.path.realpath(path).encode()
        _call("mount", source, inside.encode(), None, ctypes.c_ulong(0x1000 | 0x4000), None)  # MS_BIND | MS_REC
        # All mounts below it, too: AT_FDCWD, AT_RECURSIVE.
        arguments = (ctypes.c_int(-100), inside.encode(), ctypes.c_uint(0x8000), read_only, ctypes.c_size_t(32))
        _call("mount_setattr", *arguments, number=442)
    os.mkdir(f"{folder}/program")
    os.chdir(folder)
    _call("pivot_root", b".", b".", number=(155, 41)[_table()])
    _call("umount2", b".", 2)  # MNT_DETACH: the old root lies on top
    os.chdir("/program")


def restrict_files(folder: str) -> None:
    """Let this process read ``readable()`` and read, write and remove plain files in ``folder``; nothing else."""
    version = _call("landlock_create_ruleset", None, ctypes.c_size_t(0), ctypes.c_uint(1), number=444)
    # Access rights are bits; every version of Landlock added some: 1 has 13, 2 REFER, 3 TRUNCATE, 5 IOCTL_DEV.
    handled = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    execute, write, read, list_folder, remove, make, truncate = 1, 2, 4, 8, 32, 256, 1 << 14
    attributes = struct.pack("Q", handled)
    ruleset = _call("landlock_create_ruleset", attributes, ctypes.c_size_t(8), ctypes.c_uint(0), number=444)
    rules = [(path, execute | read | list_folder) for path in readable()]
    for path, access in [*rules, (folder, write | read | list_folder | remove | make | truncate)]:
        handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
        if os.path.isfile(path):
            access &= ~list_folder
        rule = struct.pack("=Qi", access & handled, handle)
        _call("landlock_add_rule", ruleset, 1, rule, ctypes.c_uint(0), number=445)
        os.close(handle)
    _call("landlock_restrict_self", ruleset, ctypes.c_uint(0), number=446)
    os.close(ruleset)


def _table() -> int:
    """Which column of the tables of system calls is ours."""
    try:
        return _ARCHITECTURES[os.uname().machine][0]
    except KeyError:
        raise OSError(f"no table of system calls for {os.uname().machine}") from None


def system_call_filter() -> bytes:
    """Assemble the classic BPF program that allows the tables above and answers EPERM to everything else."""
    column, architecture = _table(), _ARCHITECTURES[os.uname().machine][1]
    load, equal, mask, answer = 0x20, 0x15, 0x54, 0x06  # BPF_LD|W|ABS, JMP|JEQ|K, ALU|AND|K, RET|K
    allow, refuse, kill = (answer, 0, 0, 0x7FFF0000), (answer, 0, 0, 0x00050001), (answer, 0, 0, 0x80000000)
    # struct seccomp_data: number at 0, architecture at 4, low halves of the arguments at 16, 24, …
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill, (load, 0, 0, 0)]
    for numbers in ALLOWED.values():
        if numbers[column] >= 0:
            code += [(equal, 0, 1, numbers[column]), allow]
    for numbers, argument, values in ALLOWED_IF.values():
        tests = [(equal, 0, 1, os.getpid() if value == _OWN_PID else value) for value in values]
        block = [(load, 0, 0, 16 + 8 * argument), *(part for test in tests for part in (test, allow)), refuse]
        code += [(equal, 0, len(block), numbers[column]), *block]
    for numbers, argument in OPENING.values():
        if numbers[column] >= 0:
            truncates = os.O_ACCMODE | os.O_TRUNC
            block = [(load, 0, 0, 16 + 8 * argument), (mask, 0, 0, truncates), (equal, 0, 1, os.O_TRUNC), refuse, allow]
            code += [(equal, 0, len(block), numbers[column]), *block]
    return b"".join(struct.pack("HBBI", *instruction) for instruction in [*code, refuse])


def limit_resources(cpu_s: int) -> None:
    """Set the limits; with no capability left none can be raised again."""
    for name, soft, hard in (
        ("CPU", cpu_s, cpu_s + 1), ("AS", MEMORY_BYTES, MEMORY_BYTES), ("FSIZE", FILE_BYTES, FILE_BYTES),
        ("NOFILE", OPEN_FILES, OPEN_FILES), ("NPROC", 0, 0), ("CORE", 0, 0), ("MEMLOCK", 0, 0),
    ):  # fmt: skip
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))


def raise_barriers(barrier: str, parent: int, cpu_s: int) -> None:
    """Give up every right; the order is the one that the kernel asks for. Raises OSError where one cannot be."""
    _call("prctl", 1, ctypes.c_ulong(9), 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL
    if os.getppid() != parent:
        raise OSError("the parent has ended")
    _call("prctl", 38, ctypes.c_ulong(1), 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    if barrier == "namespace":
        enter_namespaces(os.getcwd())
    elif barrier == "landlock":
        restrict_files(os.getcwd())
    _call("prctl", 4, ctypes.c_ulong(0), 0, 0, 0)  # PR_SET_DUMPABLE: no core file, no ptrace
    version = struct.pack("Ii", 0x20080522, 0)
    _call("capset", version, bytes(24))
    limit_resources(cpu_s)
    if barrier != "none":
        code = system_call_filter()
        buffer = ctypes.create_string_buffer(code, len(code))
        program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
        _call("prctl", 22, ctypes.c_ulong(2), program, 0, 0)  # PR_SET_SECCOMP, SECCOMP_MODE_FILTER


def main(barrier: str, parent: int, cpu_s: int) -> None:
    """Read the program, raise the barriers, run it as ``__main__``, and say whether it came to its end."""
    token, _, source = sys.stdin.buffer.read().partition(b"\n")
    verdict = os.dup(1)
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)
    try:
        raise_barriers(barrier, parent, cpu_s)
    except (OSError, AttributeError, ValueError) as error:
        os.write(verdict, f"setup: {error}".encode())
        os._exit(1)
    os.write(verdict, BEGUN)
    sys.argv[:] = ["program.py"]
    sys.modules["__main__"] = module = types.ModuleType("__main__")
    exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    os.write(verdict, token)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
