"""Atomic writing: readers see the old or the new, never a part, and nothing is left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from leap_serve.errors import CheckpointError, UsageError
from leap_serve.files import append_jsonl, new_folder, read_json, sha256_of, write_bytes, write_json


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_json_round_trip_and_mode(tmp_path: Path) -> None:
    write_json(tmp_path / "deep" / "a.json", {"τ": 1.5})
    assert read_json(tmp_path / "deep" / "a.json") == {"τ": 1.5}
    assert (tmp_path / "deep" / "a.json").stat().st_mode & 0o777 == 0o644
    assert names(tmp_path / "deep") == ["a.json"]


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"", b"9" * 5000], ids=range(4))
def test_bad_json_names_the_file(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"bad\.json: not valid JSON"):
        read_json(tmp_path / "bad.json")
    with pytest.raises(CheckpointError, match="does not exist"):
        read_json(tmp_path / "none.json")
    with pytest.raises(CheckpointError, match=r"cannot be read \(IsADirectoryError\)"):
        read_json(tmp_path)
    (tmp_path / "deep.json").write_bytes(b"[" * 200_000)
    with pytest.raises(CheckpointError, match=r"deep\.json: cannot be read \(RecursionError\)"):
        read_json(tmp_path / "deep.json")


def test_a_failed_write_keeps_the_old_file(tmp_path: Path) -> None:
    write_bytes(tmp_path / "a", b"old")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError):
        write_bytes(tmp_path / "folder", b"a folder cannot be replaced by a file")
    assert (tmp_path / "a").read_bytes() == b"old"
    assert names(tmp_path) == ["a", "folder"]


def test_rows_are_appended(tmp_path: Path) -> None:
    for value in (1, 2):
        append_jsonl(tmp_path / "results" / "r.jsonl", {"v": value})
    lines = (tmp_path / "results" / "r.jsonl").read_text().splitlines()
    assert [json.loads(line)["v"] for line in lines] == [1, 2]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256_of(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_folder_appears_only_at_the_end(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with new_folder(out) as work:
        (work / "x").write_text("x")
        assert not out.exists()
    assert (out / "x").read_text() == "x"
    assert names(tmp_path) == ["out"]


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out") as work:
        (work / "x").write_text("x")
        raise KeyboardInterrupt
    assert names(tmp_path) == []


def test_a_full_folder_is_kept_without_force_and_on_errors(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("1")
    with pytest.raises(UsageError, match=r"out: exists and is not empty; choose another --out"), new_folder(out):
        pass
    with pytest.raises(ValueError), new_folder(out, force=True):
        raise ValueError
    assert (out / "precious").read_text() == "1"
    with new_folder(out, force=True) as work:
        (work / "new").write_text("2")
    assert names(out) == ["new"]
    assert names(tmp_path) == ["out"]


def test_leftovers_of_the_dead_go_those_of_the_living_stay(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait(timeout=60)
    for pid in (dead.pid, os.getppid()):
        (tmp_path / f".out.partial-{pid}").mkdir()
    with new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == [f".out.partial-{os.getppid()}", "out"]
