"""Atomic writing, and JSON read with errors a user understands."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from leap_serve.errors import CheckpointError, LeapError, UsageError


def read_json(path: Path) -> Any:
    """Parse a JSON file, or raise CheckpointError naming it and the line at fault."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path, "the file does not exist", "check the path") from None
    except (OSError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read ({type(error).__name__})", "restore the file") from None
    except ValueError as error:
        # Not only JSONDecodeError and UnicodeDecodeError: a number of 5,000 digits is a ValueError, too.
        raise CheckpointError(path, f"not valid JSON ({error})", "restore the file or make it again") from None


def read_yaml(path: Path) -> Any:
    """Parse a YAML file of plain data. Raises LeapError where it is unreadable, FileNotFoundError where there is none."""
    import yaml  # not needed by most of what imports this module

    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise LeapError(path, f"is not readable YAML ({' '.join(str(error).split())})", "correct it") from None


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that readers see the old file or the new one, never a part."""
    write_bytes(path, (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Replace a file atomically; LeapError where none can be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise LeapError(path, f"cannot be written ({error.strerror})", "choose another place") from None
    try:
        with os.fdopen(handle, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).chmod(0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def append_jsonl(path: Path, row: dict[str, Any]) -> None:
    """Append one row to a JSON Lines file with a single write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(row, ensure_ascii=False) + "\n")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Return the objects that append_jsonl wrote to ``path``; none where there is no file yet."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def check_place(flag: str, folder: Path) -> None:
    """Raise UsageError, before any work, where a folder can neither be used nor made."""
    if folder.exists() and not folder.is_dir():
        raise UsageError(flag, f"{folder} is a file", "give a folder")
    above = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UsageError(flag, f"is below {above}, where no file can be made", "choose another")


def check_free(out: Path, force: bool = False, flag: str = "--out") -> None:
    """Raise UsageError where a folder of this name would replace something that is not empty, unless ``force``."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())) and not force:
        raise UsageError(out, "exists and is not empty", f"choose another {flag}, or pass --force to replace it")


@contextlib.contextmanager
def new_folder(out: Path, force: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling of ``out`` that takes its name when the block ends without an error.

    A non-empty ``out`` is refused unless ``force``; then it is replaced, and only at the end. A run
    that is killed leaves nothing under the name ``out``; its leftovers are removed by the next run.
    """
    check_free(out, force)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LeapError(out, f"cannot be written ({error.strerror})", "choose another --out") from None
    for left in out.parent.glob(f".{out.name}.partial-*"):
        if not _alive(left):
            shutil.rmtree(left, ignore_errors=True)
    work = out.parent / f".{out.name}.partial-{os.getpid()}"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    try:
        yield work
        if out.exists():
            _exchange(work, out)
            shutil.rmtree(work) if work.is_dir() else work.unlink()
        else:
            work.rename(out)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _exchange(one: Path, other: Path) -> None:
    """Swap two paths in one step, so that a kill leaves the old or the new under ``other``, never neither."""
    libc = ctypes.CDLL(None, use_errno=True)
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE of renameat2(2)
    if hasattr(libc, "renameat2") and libc.renameat2(here, bytes(one), here, bytes(other), exchange) == 0:
        return
    # A file system without the exchange: for an instant neither name is there.
    aside = other.parent / f".{other.name}.partial-old-{os.getpid()}"
    other.rename(aside)
    one.rename(other)
    aside.rename(one)


def _alive(partial: Path) -> bool:
    """Whether the process that is writing this partial folder still runs."""
    pid = partial.name.rpartition("-")[2]
    return pid.isdigit() and int(pid) != os.getpid() and Path(f"/proc/{pid}").exists()


def sha256_of(path: Path) -> str:
    """Return the hex SHA-256 of a file's bytes."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
