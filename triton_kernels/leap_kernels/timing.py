"""The kernels' stopwatch: contenders take turns in one process, on weights that rotate so that no cache holds them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Layer = Callable[[int], object]
"""Runs one layer once, with the i-th of the rotating sets of weights."""
Run = Callable[[], float]
"""Runs a contender once and gives µs a layer."""


def in_turns(runs: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """Return each contender's times in µs a layer, one per round; in every round all run, in turning order."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for number in range(rounds):
        turned = number % len(names)
        for name in names[turned:] + names[:turned]:
            times[name].append(runs[name]())
    return times


def stopwatch(layer: Layer, sets: int, device: torch.device, repeat: int = 1) -> Run:
    """Return what runs ``repeat`` × ``sets`` layers and gives µs a layer. Raises whatever the layer does.

    On a GPU the layers are captured in a CUDA graph, as an engine's decode step runs them, and a replay is timed
    between two events: one that waits for its own results, say, cannot be captured. Without a GPU the clock times
    direct calls: for smoke tests only.
    """
    if device.type != "cuda":
        return _direct(layer, sets, repeat)
    # A capture that fails leaves its own stream the current one.
    with torch.cuda.stream(torch.cuda.current_stream()):
        return _replay(layer, sets, repeat)


def median_us(layer: Layer, sets: int, rounds: int, device: torch.device, repeat: int = 1) -> float:
    """Return the median time of one layer in µs."""
    return statistics.median(in_turns({"": stopwatch(layer, sets, device, repeat)}, rounds)[""])


def _replay(layer: Layer, sets: int, repeat: int) -> Run:
    """Capture a graph; what is returned replays it once and gives µs a layer."""
    current, stream = torch.cuda.current_stream(), torch.cuda.Stream()
    stream.wait_stream(current)  # weights and tokens may still be under way there
    with torch.cuda.stream(stream):
        # Compiles, and lets lazy libraries set themselves up outside the capture.
        for index in range(min(2, sets)):
            layer(index)
    current.wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeat):
            for index in range(sets):
                layer(index)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    graph.replay()

    def run() -> float:
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1000 / (sets * repeat)

    return run


def _direct(layer: Layer, sets: int, repeat: int) -> Run:
    layer(0)

    def run() -> float:
        began = time.perf_counter()
        for _ in range(repeat):
            for index in range(sets):
                layer(index)
        return (time.perf_counter() - began) * 1e6 / (sets * repeat)

    return run
