"""Measured tables: for each shape and device the fastest launch per number of tokens, and vLLM's time beside it.

A table is one JSON file, ``E=16,H=2048,I=768,top_k=8,dtype=bfloat16,device_name=NVIDIA_H200.json``, looked for in the
folder that ``LEAP_KERNEL_CONFIGS`` names, then in ``kernels/`` of the checkpoint, then among those that ship. Only a
table decides that our kernel is the faster one: for a shape that nobody measured vLLM's own kernel runs.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import triton

from leap_kernels.config import KernelConfig, Tile, default_config

FORMAT = 1
SHIPPED = Path(__file__).parent / "configs"
FOLDER_VARIABLE = "LEAP_KERNEL_CONFIGS"
BESIDE_WEIGHTS = "kernels"
"""The folder of a checkpoint in which its tables are looked for."""
INTERPRETED = "cpu, interpreted"
"""What stands for a GPU's name where Triton's interpreter runs the kernels: times from there mean nothing."""
TOKENS = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of tokens that are tuned: vLLM's own grid, thinned out."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What a table is for.

    Args:
        experts: |I| that this device holds.
        hidden: H.
        width: I of one expert, after tensor parallelism.
        top_k: experts per token.
        dtype: "bfloat16", "float16" or "float32".
        ranks: that share the layer's experts; each token's top_k are spread over all of them.
    """

    experts: int
    hidden: int
    width: int
    top_k: int
    dtype: str
    ranks: int = 1

    def file_name(self, device: str) -> str:
        """The table's file name on a device such as "NVIDIA H200"."""
        shared = f"ranks={self.ranks}," if self.ranks > 1 else ""
        return (
            f"E={self.experts},H={self.hidden},I={self.width},top_k={self.top_k},{shared}dtype={self.dtype},"
            f"device_name={device.replace(' ', '_')}.json"
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """The fastest launch for one number of tokens: µs a layer, and the best of vLLM's own (None: not measured)."""

    config: KernelConfig
    us: float
    vllm_us: float | None = None
    vllm_config: Mapping[str, int] | None = None


@dataclass(frozen=True, slots=True)
class Table:
    """All entries of one shape on one device; ``made_by`` says with what they were measured."""

    shape: Shape
    device: str
    entries: Mapping[int, Entry]
    made_by: Mapping[str, Any] = field(default_factory=dict)

    def nearest(self, num_tokens: int) -> Entry:
        """The entry whose number of tokens is nearest, as vLLM chooses from its own files."""
        return self.entries[min(self.entries, key=lambda tokens: abs(tokens - num_tokens))]

    def faster(self, num_tokens: int) -> bool:
        """Whether our kernel was measured to be faster than vLLM's tuned one there."""
        entry = self.nearest(num_tokens)
        return entry.vllm_us is not None and entry.us < entry.vllm_us

    def save(self, folder: Path) -> Path:
        """Write atomically into a folder; returns the file."""
        path = folder / self.shape.file_name(self.device)
        value = {
            "format": FORMAT, "shape": asdict(self.shape), "device": self.device, "made_by": dict(self.made_by),
            "entries": {
                str(tokens): {**asdict(entry), "config": entry.config.to_json()}
                for tokens, entry in sorted(self.entries.items())
            },
        }  # fmt: skip
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=folder, prefix=f".{path.name}.", delete=False) as stream:
            json.dump(value, stream, indent=1)
        os.replace(stream.name, path)
        return path

    @classmethod
    def load(cls, path: Path) -> Table:
        """Read a table. Raises ValueError, naming the file, for anything but what :meth:`save` writes."""
        try:
            value = json.loads(path.read_text(encoding="utf-8"))
            if value["format"] != FORMAT:
                raise ValueError(f"format {value['format']}, this version reads {FORMAT}")
            entries = {
                int(tokens): Entry(**{**entry, "config": KernelConfig.from_json(entry["config"])})
                for tokens, entry in value["entries"].items()
            }
            table = cls(Shape(**value["shape"]), value["device"], entries, value["made_by"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: not a table of kernel configurations: {error}") from None
        if path.name != table.shape.file_name(table.device) or not entries:
            raise ValueError(f"{path}: holds {len(entries)} entries of {table.shape.file_name(table.device)}")
        return table


def find_file(shape: Shape, device: str, beside: Path | None = None) -> Path | None:
    """Return the file that holds a shape's table, or None. ``beside``: the folder of the checkpoint's own tables."""
    named = os.environ.get(FOLDER_VARIABLE)
    for folder in (Path(named) if named else None, beside, SHIPPED):
        if folder is not None and (path := folder / shape.file_name(device)).is_file():
            return path
    return None


def find_table(shape: Shape, device: str, beside: Path | None = None) -> Table | None:
    """Return the measured table of a shape on a device, or None. Raises ValueError for a damaged file."""
    path = find_file(shape, device, beside)
    return Table.load(path) if path else None


def device_name(device: torch.device) -> str:
    """The device's name in file names; all H200 variants share one, as in vLLM."""
    if device.type != "cuda":
        return INTERPRETED
    name = torch.cuda.get_device_name(device)
    return "NVIDIA H200" if "H200" in name.split() else name


Change = Mapping[str, Any]
"""Fields of a KernelConfig to set, such as {"gate_up.block_n": 64, "gate_up.block_k": 128}."""
Measure = Callable[[KernelConfig], float]
"""Runs a configuration and returns µs; infinity for one that the GPU cannot hold."""
Prepare = Callable[[Sequence[KernelConfig]], None]
"""Is told what will be measured next: compiling them together takes a fraction of one after the other."""


def tune(
    shape: Shape, num_tokens: int, measure: Measure, shared_limit: int, prepare: Prepare | None = None
) -> tuple[KernelConfig, float]:
    """Return the fastest configuration found by descent, and its µs; never worse than the default.

    Each group of changes is tried on the best found so far. ``shared_limit``: bytes a block may take.
    """
    size = getattr(torch, shape.dtype).itemsize
    best = default_config(num_tokens, shape.experts, shape.top_k, size)
    best_us = measure(best)
    for group in changes(shape, num_tokens, best.block_m):
        trials = [changed(best, change) for change in group]
        trials = [trial for trial in trials if trial != best and shared_bytes(trial, size) <= shared_limit]
        if prepare is not None:
            prepare(trials)
        for trial in trials:
            if (us := measure(trial)) < best_us:
                best, best_us = trial, us
    return best, best_us


def changes(shape: Shape, num_tokens: int, block_m: int) -> Iterator[list[Change]]:
    """Yield groups of changes worth trying, each about one thing: some eighty in all."""
    yield [{"block_m": m} for m in (block_m // 2, block_m * 2) if 16 <= m <= 128]
    for product, wide in (("gate_up", shape.width), ("down", shape.hidden)):
        deep = shape.hidden if product == "gate_up" else shape.width
        yield [
            {f"{product}.block_n": n, f"{product}.block_k": k}
            for n in (16, 32, 64, 128, 256) for k in (32, 64, 128, 256)
            if n <= triton.next_power_of_2(wide) and k <= triton.next_power_of_2(deep)
        ]  # fmt: skip
        yield [
            {f"{product}.num_warps": warps, f"{product}.num_stages": stages}
            for warps in (2, 4, 8) for stages in (2, 3, 4, 5, 6)
        ]  # fmt: skip
    if block_m >= 64:
        yield [{"group_m": group} for group in (1, 4, 16, 32)]
    # The loop over experts costs E/K times the arithmetic: only where the weights' bytes decide.
    if shape.top_k > 1 and num_tokens <= 64:
        yield [{"reduction": "by_expert"}]


def changed(config: KernelConfig, change: Change) -> KernelConfig:
    """Return a configuration with some fields set."""
    for name, value in change.items():
        owner, _, part = name.rpartition(".")
        config = replace(
            config, **{owner: replace(getattr(config, owner), **{part: value})} if owner else {name: value}
        )
    return config


def shared_bytes(config: KernelConfig, element_bytes: int) -> int:
    """Return the shared memory that the deeper of the two pipelines takes; gate_up reads two tiles of weights a step."""

    def pipeline(tile: Tile, weights: int) -> int:
        rows = config.block_m + weights * tile.block_n
        return rows * tile.block_k * element_bytes * max(1, tile.num_stages - 1)

    return max(pipeline(config.gate_up, 2), pipeline(config.down, 1))


def missing(table: Table | None, tokens: Sequence[int]) -> list[int]:
    """Return which numbers of tokens a table lacks: where an interrupted tuning goes on."""
    return [number for number in tokens if table is None or number not in table.entries]


Contender = Callable[[int], tuple[float, Mapping[str, int]]]
"""Tunes vLLM's kernel for a number of tokens: µs and its configuration."""


def tune_shape(
    shape: Shape, device: str, folder: Path, tokens: Sequence[int], shared_limit: int, made_by: Mapping[str, Any],
    measure_at: Callable[[int], Measure], vllm_at: Contender | None, done: Callable[[int, int], None],
    prepare_at: Callable[[int], Prepare] | None = None,
) -> Table:  # fmt: skip
    """Tune what a table in ``folder`` lacks, saving after each number of tokens; returns the table.

    ``measure_at(M)`` times ours, ``vllm_at(M)`` tunes vLLM's, ``done(finished, all)`` shows progress, ``prepare_at(M)``
    compiles ahead. Interrupted at any moment, the next call goes on with the number of tokens that was under way.
    """
    path = folder / shape.file_name(device)
    table = Table.load(path) if path.exists() else None
    for number in missing(table, tokens):
        done(len(tokens) - len(missing(table, tokens)), len(tokens))
        prepare = prepare_at(number) if prepare_at else None
        config, us = tune(shape, number, measure_at(number), shared_limit, prepare)
        vllm_us, vllm_config = vllm_at(number) if vllm_at else (None, None)
        entries = {**(table.entries if table else {}), number: Entry(config, us, vllm_us, vllm_config)}
        table = Table(shape, device, entries, made_by)
        table.save(folder)
    assert table is not None
    done(len(tokens), len(tokens))
    return table


def vllm_file(table: Table, triton_version: str) -> dict[str, Any]:
    """Return vLLM's own format, {M: its configuration}: what VLLM_TUNED_CONFIG_FOLDER takes, for stock vLLM too."""
    found = {str(m): dict(entry.vllm_config) for m, entry in sorted(table.entries.items()) if entry.vllm_config}
    return {"triton_version": triton_version, **found}
