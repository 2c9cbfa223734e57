"""safetensors files as bytes: a strict header reader, and a writer that copies byte ranges.

The layout (8 bytes little-endian header length, JSON header, data) and its MUST sentences are those of
https://github.com/huggingface/safetensors. No array is ever built, so a tensor may be of any size.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from leap_serve.errors import CheckpointError

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
MAX_HEADER_BYTES = 100_000_000
"""The limit of the safetensors library itself."""
CHUNK_BYTES = 16 * 2**20
_NO_COPY_FILE_RANGE = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.EPERM}
REMEDY = "copy or download the file again"


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor in a file: its name, safetensors dtype ("BF16"), shape, and absolute byte range [begin, end)."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.begin

    @property
    def elements(self) -> int:
        """Number of stored elements (of a packed quantised tensor: of its containers)."""
        return prod(self.shape)

    def rows(self, ids: Iterable[int]) -> list[tuple[int, int]]:
        """Return the byte ranges of the given indices on dimension 0, neighbours joined."""
        size, left = divmod(self.nbytes, self.shape[0])
        if left:
            raise CheckpointError(
                self.file, f"tensor {self.name} ({self.dtype} {list(self.shape)}) has rows of a broken number of bytes",
                "convert it to a dtype of whole bytes",
            )  # fmt: skip
        return joined((self.begin + i * size, self.begin + (i + 1) * size) for i in ids)


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join byte ranges that follow each other, keeping their order."""
    out: list[tuple[int, int]] = []
    for begin, end in ranges:
        if out and out[-1][1] == begin:
            out[-1] = (out[-1][0], end)
        elif begin != end:
            out.append((begin, end))
    return out


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Read and check a file's header; return its tensors in file order and its metadata.

    Raises CheckpointError for everything the format forbids: absurd header length, a header that is
    not JSON, unknown dtype, size ≠ dtype × shape, ranges that overlap, leave holes or exceed the file.
    """
    header, start, length = _header_json(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(path, "its __metadata__ is not a map of strings", REMEDY)
    entries = sorted((_entry(path, name, spec, start) for name, spec in header.items()), key=lambda e: (e.begin, e.end))
    position = start
    for entry in entries:
        if entry.begin < position:
            raise CheckpointError(path, f"tensor {entry.name} overlaps another ({entry.begin} < {position})", REMEDY)
        if entry.begin > position:
            raise CheckpointError(path, f"{entry.begin - position} unowned bytes before tensor {entry.name}", REMEDY)
        position = entry.end
    if position > length:
        raise CheckpointError(path, f"is truncated: {length} bytes, its header needs {position}", REMEDY)
    if position < length:
        raise CheckpointError(path, f"has {length - position} bytes after the last tensor", REMEDY)
    return {entry.name: entry for entry in entries}, metadata


def _header_json(path: Path) -> tuple[dict[str, Any], int, int]:
    """Return the parsed header, the offset of the data and the file's length."""
    try:
        with path.open("rb") as stream:
            length = os.fstat(stream.fileno()).st_size
            size = int.from_bytes(stream.read(8), "little")
            if length < 8 or size > MAX_HEADER_BYTES or size > length - 8:
                what = f"says its header has {size} bytes, the file has {length}" if length >= 8 else "is too short"
                raise CheckpointError(path, f"{what}: truncated, or not safetensors", REMEDY)
            text = stream.read(size)
    except OSError as error:
        raise CheckpointError(path, f"cannot be read ({error.strerror})", "check the path and its rights") from None
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(path, f"its header is not valid JSON ({str(error)[:80]})", REMEDY) from None
    if not isinstance(header, dict):
        raise CheckpointError(path, f"its header is a JSON {type(header).__name__}, not an object", REMEDY)
    return header, 8 + size, length


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _entry(path: Path, name: str, spec: Any, start: int) -> TensorEntry:
    """Check one tensor of a header."""
    try:
        dtype, shape, (begin, end) = spec["dtype"], tuple(spec["shape"]), spec["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(path, f"tensor {name} lacks dtype, shape or data_offsets", REMEDY) from None
    if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)) or end < begin:
        raise CheckpointError(path, f"tensor {name} has impossible shape {list(shape)} or range {begin}…{end}", REMEDY)
    if dtype not in DTYPE_BITS:
        raise CheckpointError(path, f"tensor {name} has unknown dtype {dtype!r}", "update leap-serve, or convert it")
    bits = prod(shape) * DTYPE_BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(
            path, f"tensor {name}, {dtype} {list(shape)}, needs {bits / 8:g} bytes but its range has {end - begin}",
            REMEDY,
        )  # fmt: skip
    return TensorEntry(name, path, dtype, shape, start + begin, start + end)


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor to be written: its new name and shape, and the byte ranges of ``file`` that make it up, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: Path
    ranges: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(end - begin for begin, end in self.ranges)

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return prod(self.shape)

    @classmethod
    def whole(cls, entry: TensorEntry, name: str | None = None) -> Piece:
        """Return a tensor that is copied untouched, perhaps under another name."""
        return cls(name or entry.name, entry.dtype, entry.shape, entry.file, ((entry.begin, entry.end),))

    @classmethod
    def sliced(cls, entry: TensorEntry, ids: Sequence[int]) -> Piece:
        """Return the given indices of dimension 0, in that order."""
        return cls(entry.name, entry.dtype, (len(ids), *entry.shape[1:]), entry.file, tuple(entry.rows(ids)))


@dataclass(frozen=True, slots=True)
class Made:
    """A tensor to be written whose content is computed: ``make`` yields its bytes in order, a part at a time."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    make: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.elements * DTYPE_BITS[self.dtype] // 8

    @property
    def elements(self) -> int:
        """Number of stored elements."""
        return prod(self.shape)


def write_tensors(
    path: Path,
    pieces: Sequence[Piece | Made],
    metadata: Mapping[str, str],
    on_bytes: Callable[[int], None] | None = None,
) -> None:
    """Write a safetensors file: the header first, since all sizes are known, then the tensors; fsync at the end.

    Copying needs no more memory than one 16 MiB buffer, what is computed a part at a time. ``on_bytes`` is called with the number of bytes as they are written.
    """
    # Readers view the data in place, so wide dtypes go first: every tensor then starts on a multiple of its width.
    ordered = sorted(pieces, key=lambda piece: -DTYPE_BITS[piece.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for piece in ordered:
        end = position + piece.nbytes
        header[piece.name] = {"dtype": piece.dtype, "shape": list(piece.shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with ExitStack() as stack, path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        out.flush()
        sources: dict[Path, int] = {}
        for piece in ordered:
            if isinstance(piece, Made):
                _write_made(out.fileno(), piece, on_bytes)
                continue
            if piece.file not in sources:
                sources[piece.file] = stack.enter_context(piece.file.open("rb")).fileno()
            for begin, end in piece.ranges:
                _copy_range(sources[piece.file], out.fileno(), begin, end, piece.file, on_bytes)
        os.fsync(out.fileno())


def _write_made(target: int, piece: Made, on_bytes: Callable[[int], None] | None) -> None:
    """Append a computed tensor to a file."""
    written = 0
    for part in piece.make():
        view = memoryview(part)
        while view:
            done = os.write(target, view)
            view, written = view[done:], written + done
        if on_bytes:
            on_bytes(len(part))
    assert written == piece.nbytes, f"{piece.name}: {written} bytes were made, {piece.nbytes} were announced"


def _copy_range(
    source: int, target: int, begin: int, end: int, name: Path, on_bytes: Callable[[int], None] | None
) -> None:
    """Append bytes [begin, end) of one file to another, inside the kernel where the file systems allow it."""
    in_kernel = True
    while begin < end:
        want = min(end - begin, CHUNK_BYTES)
        done = 0
        if in_kernel:
            try:
                done = os.copy_file_range(source, target, want, offset_src=begin)
            except OSError as error:
                if error.errno not in _NO_COPY_FILE_RANGE:
                    raise
            in_kernel = done > 0
        if not done:
            done = os.write(target, os.pread(source, want, begin))
        if not done:
            raise CheckpointError(name, f"ended at byte {begin} while it was being copied", "leave it alone meanwhile")
        begin += done
        if on_bytes:
            on_bytes(done)
