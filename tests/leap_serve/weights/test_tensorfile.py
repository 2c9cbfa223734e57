"""Copying byte ranges: in the kernel and, where a file system does not allow that, in bounded buffers."""

from __future__ import annotations

import os
import random
import tracemalloc
from pathlib import Path

import pytest

from leap_serve.errors import CheckpointError
from leap_serve.weights.tensorfile import CHUNK_BYTES, Piece, _copy_range, joined, read_header, write_tensors
from synthetic import read_safetensors, write_safetensors


def test_neighbouring_ranges_are_joined_in_order() -> None:
    assert joined([(0, 4), (4, 8), (8, 8), (12, 16), (8, 12), (16, 20)]) == [(0, 8), (12, 16), (8, 12), (16, 20)]


@pytest.mark.parametrize("flags", [0, os.O_APPEND], ids=["in the kernel", "through a buffer"])
def test_both_ways_of_copying_give_the_same_bytes(tmp_path: Path, flags: int) -> None:
    # copy_file_range refuses a target opened for appending (EBADF), as it refuses some file systems.
    content = random.Random(0).randbytes(2 * CHUNK_BYTES + 12345)
    (tmp_path / "a").write_bytes(content)
    seen: list[int] = []
    source = os.open(tmp_path / "a", os.O_RDONLY)
    target = os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT | flags)
    try:
        if flags:
            with pytest.raises(OSError):
                os.copy_file_range(source, target, 1, offset_src=0)
        tracemalloc.start()
        _copy_range(source, target, 7, len(content) - 5, tmp_path / "a", seen.append)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
        os.close(source)
        os.close(target)
    assert (tmp_path / "b").read_bytes() == content[7:-5]
    assert sum(seen) == len(content) - 12
    assert peak < CHUNK_BYTES + 2**20


@pytest.mark.parametrize("flags", [0, os.O_APPEND])
def test_a_source_that_shrinks_meanwhile_is_an_error_not_a_loop(tmp_path: Path, flags: int) -> None:
    (tmp_path / "a").write_bytes(b"x" * 100)
    source = os.open(tmp_path / "a", os.O_RDONLY)
    target = os.open(tmp_path / "b", os.O_WRONLY | os.O_CREAT | flags)
    try:
        with pytest.raises(CheckpointError, match="a: ended at byte 100 while it was being copied"):
            _copy_range(source, target, 0, 200, tmp_path / "a", None)
    finally:
        os.close(source)
        os.close(target)


def test_rows_come_in_the_order_asked_for(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "a.safetensors", {"w": ("I32", (6, 3)), "v": ("BF16", (2,))})
    entries, metadata = read_header(tmp_path / "a.safetensors")
    assert metadata == {"format": "pt"}
    pieces = [Piece.whole(entries["v"], "renamed"), Piece.sliced(entries["w"], [4, 0, 1])]
    write_tensors(tmp_path / "b.safetensors", pieces, {"k": "ü"})
    before, after = read_safetensors(tmp_path / "a.safetensors"), read_safetensors(tmp_path / "b.safetensors")
    row = 12
    blob = before["w"][2]
    assert after["w"] == ("I32", (3, 3), blob[4 * row : 5 * row] + blob[: 2 * row])
    assert after["renamed"] == before["v"]
    assert read_header(tmp_path / "b.safetensors")[1] == {"k": "ü"}


def test_the_library_reads_what_we_write(tmp_path: Path) -> None:
    import safetensors

    write_safetensors(tmp_path / "a.safetensors", {"w": ("F32", (6, 3)), "s": ("F32", ()), "e": ("U8", (0,))})
    entries, _ = read_header(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", [Piece.whole(entry) for entry in entries.values()], {})
    with safetensors.safe_open(tmp_path / "b.safetensors", "np") as library:
        assert set(library.keys()) == {"w", "s", "e"}
        assert library.get_tensor("w").tobytes() == read_safetensors(tmp_path / "a.safetensors")["w"][2]


def test_rows_of_half_bytes_are_refused(tmp_path: Path) -> None:
    text = b'{"w":{"dtype":"F4","shape":[4,3],"data_offsets":[0,6]}}'
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(6))
    entry = read_header(tmp_path / "a.safetensors")[0]["w"]
    with pytest.raises(CheckpointError, match="rows of a broken number of bytes"):
        Piece.sliced(entry, [0])
