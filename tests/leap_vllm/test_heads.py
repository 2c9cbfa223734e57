"""Tables of plans and router heads that change slot by slot: what they hold is what a loop over tokens says."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import save

from leap_serve.errors import LeapError
from leap_vllm.heads import HeadTable, LayerHead, read_heads
from leap_vllm.subsets import MAX_SLOTS, LayerTable, Subsets

E, H, T, K = 8, 16, 40, 4
HEADS: dict[int, tuple[list[int], LayerHead]] = {
    2: ([0, 3, 5], (torch.randn(3, H, generator=torch.Generator().manual_seed(2)), None)),
    7: ([1, 2, 3, 6, 7], (torch.randn(5, H, generator=torch.Generator().manual_seed(7)), torch.linspace(-1, 1, 5))),
    64: ([4], (torch.randn(1, H, generator=torch.Generator().manual_seed(64)), None)),
}
"""Slot → retained ids and head."""


def table_of(*slots: int) -> HeadTable:
    table = HeadTable(torch.device("cpu"))
    for slot in slots:
        table.put(slot, *HEADS[slot], torch.float32)
    return table


def places_of(slots: list[int]) -> dict[int, torch.Tensor]:
    return {slot: torch.tensor([t for t, own in enumerate(slots) if own == slot]) for slot in set(slots)}


def expected(hidden: torch.Tensor, logits: torch.Tensor, slots: list[int], held: tuple[int, ...]) -> torch.Tensor:
    rows = logits.clone()
    for token, slot in enumerate(slots):
        if slot in held:
            ids, (weight, bias) = HEADS[slot]
            for row, expert in enumerate(ids):
                rows[token, expert] = hidden[token] @ weight[row] + (0.0 if bias is None else bias[row])
    return rows


@pytest.mark.parametrize("held", [(2,), (2, 7), (64, 7, 2)])
def test_heads_take_the_gates_place_for_their_tokens_alone(held: tuple[int, ...]) -> None:
    made = torch.Generator().manual_seed(0)
    hidden, logits = torch.randn(T, H, generator=made), torch.randn(T, E, generator=made)
    table, slots = table_of(*held), [0, 2, 7, 64, 5] * (T // 5)
    found = table.logits(hidden, logits, places_of(slots))
    assert torch.allclose(found, expected(hidden, logits, slots, held), atol=1e-5)
    padded = torch.nn.functional.pad(hidden, (0, 8), value=9.0)  # kernels want some multiple
    assert torch.equal(table.logits(padded, logits, places_of(slots)), found)
    for slot in (0, 2, 7):
        alone = table.logits(hidden, logits, {slot: None})
        assert torch.allclose(alone, expected(hidden, logits, [slot] * T, held), atol=1e-5)


def test_heads_come_and_go() -> None:
    made = torch.Generator().manual_seed(0)
    hidden, logits, slots = torch.randn(T, H, generator=made), torch.randn(T, E, generator=made), [2, 7] * (T // 2)
    table = table_of(2, 7, 64)
    table.drop(2)
    table.drop(2)
    assert torch.allclose(
        table.logits(hidden, logits, places_of(slots)), expected(hidden, logits, slots, (7,)), atol=1e-5
    )
    table.put(2, *HEADS[2], torch.float32)
    both = expected(hidden, logits, slots, (2, 7))
    assert torch.allclose(table.logits(hidden, logits, places_of(slots)), both, atol=1e-5)
    for slot in (2, 7, 64):
        table.drop(slot)
    assert torch.equal(table.logits(hidden, logits, places_of(slots)), logits)


def test_a_head_is_rounded_as_a_merged_one_is() -> None:
    table = HeadTable(torch.device("cpu"))
    ids, (weight, _) = HEADS[2]
    table.put(2, ids, (weight, None), torch.bfloat16)
    hidden = torch.randn(T, H, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)
    found = table.logits(hidden, torch.zeros(T, E), {2: None})
    assert torch.allclose(found[:, ids], hidden.float() @ weight.to(torch.bfloat16).float().T, atol=1e-5)


def test_files_that_are_no_head_of_the_plan() -> None:
    plan = {3: ([0, 1], 1, 1.0), 4: ([2, 5], 1, 1.0)}
    good = {"layers.3.weight": torch.ones(2, H), "layers.3.bias": torch.ones(2)}
    found = read_heads(save(good), plan, "head")
    assert list(found) == [3] and found[3][1] is not None
    with pytest.raises(LeapError, match="head: layer 4 has 3 rows, the plan retains 2"):
        read_heads(save({"layers.4.weight": torch.ones(3, H)}), plan, "head")
    for name in ("layers.5.weight", "layers.4.bias", "lm_head.weight"):
        with pytest.raises(LeapError, match=name):
            read_heads(save({**good, name: torch.ones(2)}), plan, "head")


def test_a_slot_keeps_no_layer_of_the_head_before() -> None:
    subsets, cpu = Subsets.__new__(Subsets), torch.device("cpu")
    subsets.layers, subsets._loaded, subsets._fixed, subsets._dtype = {0: None, 1: None}, set(), False, torch.float32
    subsets._tables = {layer: LayerTable(E, K, cpu) for layer in subsets.layers}
    subsets._heads = {layer: HeadTable(cpu) for layer in subsets.layers}
    subsets._headed = np.zeros(MAX_SLOTS, dtype=bool)
    ids, head = HEADS[2]
    plan = dict.fromkeys(subsets.layers, (ids, 1, 1.0))
    hidden, logits = torch.ones(T, H), torch.zeros(T, E)
    changed = []
    for layer in (0, 1):
        subsets.put(2, plan, {layer: head})
        changed.append(
            [not torch.equal(table.logits(hidden, logits, {2: None}), logits) for table in subsets._heads.values()]
        )
    assert changed == [[True, False], [False, True]]


def test_slots_are_written_one_at_a_time() -> None:
    plans = [([0, 1, 4], 3, 1.0), ([2, 3], 1, 0.5)]
    together, apart = (LayerTable(E, K, torch.device("cpu")) for _ in range(2))
    together.load(plans)
    for slot in (2, 1):
        apart.put(slot, plans[slot - 1])
    for name in ("penalty", "top_k", "temperature", "scaled", "limited"):
        assert torch.equal(torch.as_tensor(getattr(together, name)), torch.as_tensor(getattr(apart, name))), name
    assert apart.scaled and apart.limited
    apart.clear(2)
    assert not apart.scaled and apart.limited
    together.load([])
    apart.clear(1)
    for table in (together, apart):
        assert not table.penalty.any() and (table.top_k == K).all() and (table.temperature == 1.0).all()
        assert not table.scaled and not table.limited
