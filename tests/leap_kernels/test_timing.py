"""The stopwatch and what it is held to: contenders take turns, no cache holds the weights, no layer runs before its data."""

from __future__ import annotations

import pytest
import torch

from leap_kernels.timing import in_turns, stopwatch
from leap_kernels.tuning import Shape
from leap_kernels.workbench import Workbench


def test_contenders_take_turns_on_rotating_weights() -> None:
    """Each is warmed up once; then every round begins with another one, and each goes through all sets in order."""
    calls: list[tuple[str, int]] = []
    contenders = {name: lambda index, name=name: calls.append((name, index)) for name in "ab"}
    runs = {name: stopwatch(layer, 2, torch.device("cpu")) for name, layer in contenders.items()}
    times = in_turns(runs, rounds=3)
    a, b = [("a", 0), ("a", 1)], [("b", 0), ("b", 1)]
    assert calls == [("a", 0), ("b", 0), *a, *b, *b, *a, *a, *b]
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}


@pytest.mark.parametrize(("experts", "top_k"), [(128, 8), (8, 8), (16, 1)])
def test_what_one_token_reads_in_a_round_outgrows_the_cache(experts: int, top_k: int) -> None:
    """However many experts lie unread beside those it chose."""
    bench = Workbench(Shape(experts, 32, 16, top_k, "float32"), torch.device("cpu"), rotated_bytes=2**19)
    batch = bench.batch(1)
    assert batch.distinct() == top_k
    assert 0.8 * 2**19 < len(bench.w13) * batch.distinct() * bench.expert_bytes < 1.2 * 2**19


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(4, 8, 2), (3, 1, 4), (5, 2, 2), (2, 9, 4)])
def test_a_rank_gets_the_slots_of_its_own_experts(experts: int, top_k: int, ranks: int) -> None:
    """Tokens choose among all experts; this is the rank that most of them chose, so at one token it is not idle."""
    bench = Workbench(Shape(experts, 32, 16, top_k, "float32", ranks), torch.device("cpu"), rotated_bytes=1)
    for tokens in (1, 6):
        batch = bench.batch(tokens)
        assert batch.ids.shape == (tokens, top_k) and batch.expert_map is not None
        assert sorted(set(batch.expert_map.tolist())) == [-1, *range(experts)]
        shared = min(top_k, experts * ranks)
        assert tokens * shared // ranks <= len(batch.local()) <= tokens * min(top_k, experts)
        assert 1 <= batch.distinct() <= experts and bench.flops(batch) == 6 * len(batch.local()) * 32 * 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: streams")
def test_the_first_run_waits_for_its_data() -> None:
    data, seen = torch.zeros(1, device="cuda"), []
    torch.cuda._sleep(10**8)  # tens of milliseconds, and only then the data are written
    data.fill_(1.0)
    stopwatch(lambda _: seen.append(data.clone()), 1, torch.device("cuda"))
    assert seen[0].item() == 1.0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs")
def test_a_capture_that_fails_leaves_the_next_one_whole() -> None:
    """Waiting for a result is no part of a graph; the layer after it is timed as if nothing had been."""
    data, before = torch.ones(1, device="cuda"), torch.cuda.current_stream()
    with pytest.raises(RuntimeError):
        stopwatch(lambda _: data.item(), 1, torch.device("cuda"))
    assert torch.cuda.current_stream() == before
    assert stopwatch(lambda _: data * 2, 1, torch.device("cuda"))() > 0
