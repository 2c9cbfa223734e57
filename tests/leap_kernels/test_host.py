"""What needs neither a GPU nor the interpreter: refusals, launch configurations, measured tables, tuning."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from leap_kernels import fused_moe, reference_moe, tuning
from leap_kernels.config import KernelConfig, Reduction, Tile, default_config
from leap_kernels.fused_moe import max_blocks
from leap_kernels.tuning import Entry, Shape, Table, changed, shared_bytes

SHAPE = Shape(16, 2048, 768, 8, "bfloat16")
DEVICE = "NVIDIA H200"


def arguments(**changes: Any) -> dict[str, Any]:
    """A sound call with T 3, H 8, I 4, E 5, K 2, and what a case changes in it."""
    sound: dict[str, Any] = {
        "x": torch.zeros(3, 8), "w13": torch.zeros(5, 8, 8), "w2": torch.zeros(5, 8, 4),
        "router_logits": torch.zeros(3, 5), "top_k": 2,
    }  # fmt: skip
    return {**sound, **changes}


GIVEN = {"router_logits": None, "topk_ids": torch.zeros(3, 2, dtype=torch.int32), "topk_weights": torch.zeros(3, 2)}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"x": torch.zeros(3, 9)}, "x [3, 9], w13 [5, 8, 8], w2 [5, 8, 4] do not fit"),
        ({"x": torch.zeros(8)}, "x [8], w13 [5, 8, 8], w2 [5, 8, 4]: expected x [T, H]"),
        ({"w13": torch.zeros(5, 7, 8)}, "w13 [5, 7, 8]"), ({"w2": torch.zeros(4, 8, 4)}, "w2 [4, 8, 4] do not fit"),
        ({"w13": torch.zeros(0, 8, 8), "w2": torch.zeros(0, 8, 4)}, "w13 [0, 8, 8]"),
        ({"x": torch.zeros(3, 8, dtype=torch.float64)}, "x is torch.float64, expected one of torch.float32"),
        ({"w2": torch.zeros(5, 8, 4, dtype=torch.float16)}, "w2 is torch.float16, expected torch.float32"),
        ({"w2": torch.zeros(5, 4, 8).transpose(1, 2)}, "w2 has strides (32, 1, 8), expected a last stride of 1"),
        ({"x": torch.zeros(8, 3).T}, "x has strides (1, 3), expected a last stride of 1"),
        ({"router_logits": torch.zeros(3, 6)}, "router_logits is [3, 6], expected [3, 5]"),
        ({"router_logits": torch.zeros(3, 5, device="meta")}, "router_logits is on meta, x on cpu"),
        ({"top_k": 6}, "top_k is 6, expected 1 … 5"), ({"top_k": None}, "top_k is None"),
        ({"temperature": 0.0}, "temperature is 0.0"), ({"scoring": "tanh"}, "scoring is 'tanh'"),
        ({"bias": torch.zeros(4)}, "bias is [4], expected [5]"),
        ({"topk_ids": GIVEN["topk_ids"]}, "router_logits exclude topk_ids"),
        ({"router_logits": None}, "expected router_logits and top_k, or topk_ids and topk_weights"),
        ({**GIVEN, "bias": torch.zeros(5)}, "bias is for router_logits"),
        ({**GIVEN, "top_k": 3}, "topk_ids (3, 2), top_k 3"),
        ({**GIVEN, "topk_ids": torch.zeros(3, 2)}, "topk_ids is torch.float32, expected torch.int32 or torch.int64"),
        ({**GIVEN, "topk_weights": torch.zeros(3, 1)}, "topk_weights is [3, 1], expected [3, 2]"),
        ({**GIVEN, "expert_map": torch.zeros(4)}, "expert_map is torch.float32"),
        ({"out": torch.zeros(3, 16)[:, ::2]}, "out has strides (16, 2), expected a contiguous tensor"),
        ({"w13": torch.zeros(513, 8, 8), "w2": torch.zeros(513, 8, 4)}, "513 experts, expected at most 512"),
    ],
)  # fmt: skip
def test_refusals_name_the_values(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        fused_moe(**arguments(**changes))


def test_reference_by_hand() -> None:
    """Two experts, one number each: 0.5·SiLU(1·2)·(3·2)·4 + 0.5·SiLU(2·2)·(1·2)·(−1)."""
    x = torch.tensor([[2.0]], dtype=torch.float64)
    w13 = torch.tensor([[[1.0], [3.0]], [[2.0], [1.0]]], dtype=torch.float64)
    w2 = torch.tensor([[[4.0]], [[-1.0]]], dtype=torch.float64)
    out = reference_moe(x, w13, w2, torch.zeros(1, 2, dtype=torch.float64), top_k=2)
    silu = [value / (1 + math.exp(-value)) for value in (2.0, 4.0)]
    assert out.item() == pytest.approx(0.5 * silu[0] * 6 * 4 - 0.5 * silu[1] * 2)


def test_blocks_suffice_for_the_worst_routing() -> None:
    """All ways to spread up to 9 slots over up to 3 experts."""
    for slots in range(1, 10):
        spreads = [(a, b, slots - a - b) for a in range(slots + 1) for b in range(slots + 1 - a)]
        for block_m in (1, 2, 4):
            for experts in (1, 2, 3):
                fitting = [s for s in spreads if not any(s[experts:])]
                worst = max(sum(-(-n // block_m) for n in spread) for spread in fitting)
                assert worst <= max_blocks(slots, experts, block_m) <= worst + experts


@pytest.mark.parametrize("experts", [1, 2, 7, 8, 13, 16, 64, 128, 512])
def test_default_launch_stays_within_any_chips_shared_memory(experts: int) -> None:
    for tokens in (1, 3, 17, 64, 300, 4096, 100_000):
        for size in (2, 4):
            assert shared_bytes(default_config(tokens, experts, min(8, experts), size), size) <= 99 * 1024


@pytest.mark.parametrize(
    ("value", "sentence"),
    [
        ({"block_m": 24}, "block_m is 24, expected a power of two"), ({"reduction": "sum"}, "reduction 'sum'"),
        ({"blockm": 16}, "not a kernel configuration"), ({"down": {"block_n": 16}}, "not a kernel configuration"),
    ],
)  # fmt: skip
def test_configurations_are_checked(value: dict[str, Any], sentence: str) -> None:
    sound = default_config(1, 16, 8, 2).to_json()
    assert KernelConfig.from_json(json.loads(json.dumps(sound))) == default_config(1, 16, 8, 2)
    with pytest.raises(ValueError, match=re.escape(sentence)):
        KernelConfig.from_json({**sound, **value})


@pytest.mark.parametrize("reduction", ["rows", "by_expert", "atomic"])
def test_configurations_as_numbers(reduction: Reduction) -> None:
    config = KernelConfig(32, 4, Tile(16, 64, 2, 3), Tile(128, 32, 8, 5), reduction)
    assert KernelConfig.from_ints(config.to_ints()) == config


def table(*, ours: float = 10.0, vllm: float | None = 20.0) -> Table:
    entries = {
        m: Entry(default_config(m, 16, 8, 2), ours * m, vllm and vllm * 16, {"BLOCK_SIZE_M": 16}) for m in (1, 16, 64)
    }
    return Table(SHAPE, DEVICE, entries, {"triton": "3.9.0"})


def test_tables_come_back_as_they_were_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = table().save(tmp_path)
    assert path.name == "E=16,H=2048,I=768,top_k=8,dtype=bfloat16,device_name=NVIDIA_H200.json"
    assert Table.load(path) == table() and list(tmp_path.iterdir()) == [path]
    assert tuning.find_table(SHAPE, DEVICE) is None, "nothing is measured for this shape until a file says so"
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    assert tuning.find_table(SHAPE, DEVICE) == table()
    assert tuning.find_table(replace(SHAPE, experts=15), DEVICE) is None
    monkeypatch.delenv(tuning.FOLDER_VARIABLE)
    assert tuning.find_file(SHAPE, DEVICE, tmp_path) == path and tuning.find_file(SHAPE, DEVICE) is None
    beside = table(ours=5.0).save(tmp_path / "kernels").parent
    monkeypatch.setenv(tuning.FOLDER_VARIABLE, str(tmp_path))
    assert tuning.find_table(SHAPE, DEVICE, beside) == table(), "the folder that is named comes first"


def test_only_a_measurement_makes_ours_the_faster_one() -> None:
    assert table().faster(1) and table().faster(16) and not table().faster(64)
    assert not table(vllm=None).faster(1)
    assert table().nearest(40).config == table().entries[16].config or table().nearest(41) == table().entries[64]
    assert table().nearest(100_000) == table().entries[64]


@pytest.mark.parametrize("damage", ["{", "[]", '{"format": 2}', '{"format": 1, "entries": {}}'])
def test_damaged_tables_are_named(damage: str, tmp_path: Path) -> None:
    path = table().save(tmp_path)
    path.write_text(damage)
    with pytest.raises(ValueError, match=re.escape(f"{path}: not a table of kernel configurations")):
        Table.load(path)


def test_a_table_under_anothers_name_is_refused(tmp_path: Path) -> None:
    path = table().save(tmp_path).rename(tmp_path / replace(SHAPE, experts=8).file_name(DEVICE))
    with pytest.raises(ValueError, match="holds 3 entries of E=16"):
        Table.load(path)


def cost(config: KernelConfig) -> float:
    """A landscape with one lowest point away from the default, and a wall where a chip would run out of registers."""
    if config.gate_up.num_warps == 2:
        return math.inf
    up = abs(math.log2(config.gate_up.block_n / 128)) + abs(math.log2(config.gate_up.block_k / 64))
    down = abs(math.log2(config.down.block_n / 64)) + abs(config.down.num_stages - 5)
    return 10 + up + down + abs(config.gate_up.num_warps - 8) + (config.reduction != "by_expert")


def test_tuning_finds_the_lowest_point_and_stays_within_shared_memory() -> None:
    tried, ready = [], [default_config(8, 16, 8, 2)]

    def measure(config: KernelConfig) -> float:
        assert config in ready, "what is measured was compiled ahead"
        tried.append(config)
        return cost(config)

    best, us = tuning.tune(SHAPE, 8, measure, 227 * 1024, ready.extend)
    assert us == cost(best) == 10
    assert (best.gate_up.block_n, best.gate_up.num_warps, best.reduction) == (128, 8, "by_expert")
    assert max(shared_bytes(config, 2) for config in tried) <= 227 * 1024 and len(tried) < 100
    cramped, _ = tuning.tune(SHAPE, 8, cost, 48 * 1024)
    assert shared_bytes(cramped, 2) <= 48 * 1024


def test_changes_reach_into_tiles() -> None:
    start = default_config(1, 16, 8, 2)
    other = changed(start, {"down.num_stages": 5, "block_m": 32})
    assert other == replace(start, block_m=32, down=replace(start.down, num_stages=5))
    assert isinstance(other.down, Tile) and tuning.missing(table(), (1, 2, 64)) == [2]


def test_tuning_goes_on_where_it_was_interrupted(tmp_path: Path) -> None:
    asked: list[int] = []

    def measure_at(tokens: int) -> tuning.Measure:
        asked.append(tokens)
        if asked == [1, 8]:
            raise KeyboardInterrupt
        return cost

    def run() -> Table:
        seen: list[tuple[int, int]] = []
        vllm = lambda tokens: (2.0 * tokens, {"BLOCK_SIZE_M": 16})  # noqa: E731
        found = tuning.tune_shape(
            SHAPE,
            DEVICE,
            tmp_path,
            (1, 8, 64),
            227 * 1024,
            {"version": "x"},
            measure_at,
            vllm,
            lambda *at: seen.append(at),
        )
        assert seen[-1] == (3, 3)
        return found

    with pytest.raises(KeyboardInterrupt):
        run()
    assert list(Table.load(tmp_path / SHAPE.file_name(DEVICE)).entries) == [1]
    found = run()
    assert asked == [1, 8, 8, 64] and sorted(found.entries) == [1, 8, 64]
    assert found.entries[8].us == 10 and found.faster(8) and not found.faster(1)
    assert run() == found and asked == [1, 8, 8, 64], "a finished table is not measured again"
    assert tuning.vllm_file(found, "3.9.0") == {
        "triton_version": "3.9.0", **{str(m): {"BLOCK_SIZE_M": 16} for m in (1, 8, 64)},
    }  # fmt: skip
