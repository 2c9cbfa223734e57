"""NAEE: the subset of each layer that best reconstructs the layer's output.

Paper: Lu et al. 2024, «Not All Experts are Equal» (ACL), §3.2: with calibration inputs X cached at every MoE layer,
try every subset C of the wanted size, route within it, and keep argmin_C Σ_batches ‖F'(X; C) − F(X)‖_F. ``naee`` does
so with X from the full model, ``naee-progressive`` with X from the model that is pruned up to the layer. §3.3,
dynamic skipping: β_l = median over tokens of p₍₂₎/p₍₁₎, under the plan.

Ours: a batch is one calibration item. A layer's output is linear in the router weights, so that with the Gram
matrices G_t[e, e'] = ⟨f_e(x_t), f_e'(x_t)⟩ a subset's error of a token is dᵀG_t d, d being the change of its weights:
every expert runs once per token, and subsets cost O(T·E²) each, whatever H is. Where C(E, r) exceeds 20,000 the
search is greedy backward elimination, and the plan says «naee-greedy». With k > 2 every choice below β_l·p₍₁₎ is skipped.
β_l is part of the plan (and the served model skips by it) only where that is asked for; how many experts a token then
uses on the calibration items is recorded. The calibration items come from the training split.

Cost: naee one forward pass over the items, naee-progressive one per layer that ends there ((L + 1)/2 in all), plus
all E experts on every token once; min(C(E, r), E²/2) subsets per layer. Memory: one layer's G, T·E²·8 bytes, while
the layers' inputs lie on disk (T·H per layer). No gradients.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leap_serve.architectures import Family
from leap_serve.engine import Progress
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_training.methods.blocks import CHUNK, BlockModel, Captured, LayerResults, MoeLayer
from leap_training.pruning_space import PruningSpace

EXHAUSTIVE = 20_000
"""The most subsets of a layer that are all tried."""
AT_ONCE = 256
"""Subsets that are scored together."""


@dataclass(frozen=True, slots=True)
class LayerData:
    """All that the errors of one layer's subsets depend on.

    Args:
        layer: the layer.
        z: router logits [T, E], float32.
        gram: ⟨f_e(x_t), f_e'(x_t)⟩, [T, E, E] float64.
        ends: where each item's tokens begin and end.
    """

    layer: MoeLayer
    z: torch.Tensor
    gram: torch.Tensor
    ends: tuple[tuple[int, int], ...]

    @classmethod
    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def of(cls, layer: MoeLayer, index: int, captured: Captured) -> LayerData:
        """Run all experts on a layer's inputs, a few tokens at a time."""
        stops = list(itertools.accumulate(captured.tokens))
        ends = tuple(zip([0, *stops[:-1]], stops, strict=True))
        experts = int(layer.block.experts.num_experts)
        _check_memory(stops[-1] * experts**2 * 8, captured.device)
        z = torch.empty(stops[-1], experts, device=captured.device)
        gram = torch.empty(stops[-1], experts, experts, dtype=torch.float64, device=captured.device)
        for item, (start, _) in enumerate(ends):
            x = captured.read(item, index)
            for part in x.split(max(1, CHUNK // (experts * x.shape[1]))):
                stop = start + len(part)
                z[start:stop] = logits = layer.logits(part)
                every = torch.arange(experts, device=x.device).expand(len(part), -1)
                f = layer.contributions(part, logits, every).double()
                gram[start:stop] = f @ f.mT
                start = stop
        return cls(layer, z, gram, ends)

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def losses(self, plans: Sequence[LayerPlan]) -> list[float]:
        """Return Σ_items ‖F'(X; plan) − F(X)‖_F of each plan, in float64."""
        full = [LayerPlan(tuple(range(self.z.shape[1])), self.layer.top_k)]
        total = torch.zeros(len(plans), dtype=torch.float64, device=self.z.device)
        for start, stop in self.ends:
            z = self.z[start:stop]
            change = (self.layer.weights(z, plans) - self.layer.weights(z, full)).transpose(0, 1)  # [T, S, E]
            squares = ((change @ self.gram[start:stop]) * change).sum((0, 2))
            total += squares.clamp_min(0.0).sqrt()  # rounding may leave −1e−20 of a perfect fit
        return total.tolist()

    def beta(self, plan: LayerPlan) -> float | None:
        """Return the median of p₍₂₎/p₍₁₎ over all tokens (NAEE §3.3); None where one expert is chosen."""
        if plan.top_k < 2:
            return None
        highest = self.layer.gates(self.z, [plan])[0].topk(2, -1).values
        return float(np.median((highest[:, 1] / highest[:, 0]).cpu().numpy()))

    def active(self, plan: LayerPlan, beta: float) -> float:
        """Return how many experts a token uses on average when choices below ``beta`` times its highest are skipped."""
        weights = self.layer.gates(self.z, [plan])[0]
        # Of a plan's own top_k: what it has not chosen weighs 0.
        return float(((weights > 0) & (weights >= beta * weights.amax(-1, keepdim=True))).sum(-1).double().mean())


def is_exhaustive(experts: int, keep: int) -> bool:
    """Whether every subset of a layer is tried."""
    return math.comb(experts, keep) <= EXHAUSTIVE


def best_subset(data: LayerData, start: LayerPlan, keep: int) -> tuple[LayerPlan, float]:
    """Return the subset of ``keep`` experts with the least error, and its error; ties go to the lowest ids.

    Args:
        data: the layer's.
        start: a plan that retains all experts, with the top_k and τ that the result shall have.
        keep: experts to retain.
    """
    if is_exhaustive(len(start.retained), keep):
        return _least(data, (replace(start, retained=ids) for ids in itertools.combinations(start.retained, keep)))
    plan = start
    while len(plan.retained) > keep:
        ids = plan.retained
        # The last expert first, so that of equals the lowest ids remain, as they do above.
        fewer = (replace(plan, retained=ids[:at] + ids[at + 1 :]) for at in reversed(range(len(ids))))
        plan, loss = _least(data, fewer)
    return plan, loss


def naee(
    model: BlockModel,
    ids: Sequence[Sequence[int]],
    space: PruningSpace,
    folder: Path,
    results: LayerResults,
    progressive: bool = False,
    progress: Progress | None = None,
    skip: bool = False,
    capturing: Progress | None = None,
    **provenance: Any,
) -> Plan:
    """Choose every layer's experts; what ``results`` knows is not computed again.

    Args:
        model: the full one.
        ids: calibration items, from ``model.encode``.
        space: how many experts a layer retains; a uniform one.
        folder: where the layers' inputs are kept meanwhile.
        results: of this very search, so far.
        progressive: take a layer's inputs from the model as it is pruned before that layer.
        progress: called with layers done and layers in all.
        skip: make dynamic skipping by β_l part of the plan.
        capturing: called with items done and items in all of the pass that writes every layer's inputs; a progressive
            one has a pass for each layer instead, as part of it.
        provenance: what else ``made_by`` shall record.
    """
    check_space(space, model.family, skip)
    experts, keep = space.routing.num_experts, space.cap
    layers = {
        index: LayerPlan(tuple(range(experts)), top_k, space.temperature)
        for index, top_k in zip(space.layers, space.top_k, strict=True)
    }
    full = {index: LayerPlan(tuple(range(experts)), k) for index, k in space.routing.top_k.items()}
    left = [index for index in layers if results.get(index) is None]
    captured = model.capture(ids, folder, left, progress=capturing) if left and not progressive else None
    for number, index in enumerate(layers, 1):
        if results.get(index) is None:
            if progressive:
                before = {at: layers[at] if at < index else full[at] for at in layers}
                captured = model.capture(ids, folder, [index], Plan(space.routing.base, experts, before))
            assert captured is not None
            data = LayerData.of(model.layers[index], index, captured)
            plan, loss = best_subset(data, layers[index], keep)
            beta = data.beta(plan)
            active = None if beta is None else data.active(plan, beta)
            results.put(index, {"retained": list(plan.retained), "loss": loss, "beta": beta, "active": active})
        layers[index] = replace(layers[index], retained=tuple(results.get(index)["retained"]))
        if progress is not None:
            progress(number, len(layers))
    chosen = np.zeros(space.shape, bool)
    for row, plan in zip(chosen, layers.values(), strict=True):
        row[list(plan.retained)] = True
    found = space.plan(chosen, **_record(space, results, progressive, skip), **provenance)
    if not skip:
        return found
    # A ratio that rounds to 0 skips nothing, and a plan cannot say so.
    beta = {index: results.get(index)["beta"] or None for index in found.layers}
    return replace(found, layers={index: replace(layer, skip=beta[index]) for index, layer in found.layers.items()})


def check_space(space: PruningSpace, family: Family, skip: bool = False) -> None:
    """Raise LeapError for plans that NAEE cannot search or skip by; to be asked before a model is loaded."""
    if not space.uniform:
        raise UsageError("--allocation", "NAEE retains equally many in every layer", "choose uniform")
    check_temperatures(family, space.temperatures)
    if skip and max(space.top_k) < 2:
        raise UnsupportedError("--skip", "every token uses one expert, so there is none to skip", "leave it out")


def check_temperatures(family: Family, temperatures: Iterable[float], on: Path | None = None) -> None:
    """Raise UnsupportedError where experts' contributions depend on τ: they are computed at τ = 1, and weighed after.

    ``on``: the plan that τ comes from, where it is not --temperature.
    """
    if family.weight_on_input and any(tau != 1.0 for tau in temperatures):
        if on is not None:
            what = "has a router temperature other than 1, which is part of this model's expert inputs"
            raise UnsupportedError(on, what, "give another plan")
        raise UnsupportedError("--temperature", "is part of this model's expert inputs", "leave it out")


def _record(space: PruningSpace, results: LayerResults, progressive: bool, skip: bool) -> dict[str, Any]:
    """What ``made_by`` says of a search."""
    experts, keep = space.routing.num_experts, space.cap
    exact, name = is_exhaustive(experts, keep), "naee-progressive" if progressive else "naee"
    of = {layer: results.get(layer) for layer in space.layers}
    notices = (
        ["choices below β times the highest weight are skipped in vLLM: a cut needs leap-serve's architecture"]
        if skip
        else ["the thresholds of dynamic skipping are recorded only; --skip makes them part of the plan"]
    )
    if not exact:
        notices.append(
            f"greedy backward elimination (ours), not NAEE's exhaustive search: C({experts}, {keep}) = "
            f"{math.comb(experts, keep):.3g} subsets per layer exceed {EXHAUSTIVE}"
        )
    return {
        "method": name if exact else f"{name}-greedy", "exact": exact, "notices": notices,
        "reconstruction": {str(layer): one["loss"] for layer, one in of.items()},
        "dynamic_skipping": {
            "beta": {str(layer): one["beta"] for layer, one in of.items()},
            "active_experts": {str(layer): one.get("active") for layer, one in of.items()},
        },
    }  # fmt: skip


def _least(data: LayerData, plans: Iterable[LayerPlan]) -> tuple[LayerPlan, float]:
    """Return the plan with the least error, the first of equals."""
    best: tuple[LayerPlan, float] | None = None
    for part in _batched(plans, AT_ONCE):
        for plan, loss in zip(part, data.losses(part), strict=True):
            if best is None or loss < best[1]:
                best = plan, loss
    assert best is not None, "no subset was given"
    return best


def _batched(plans: Iterable[LayerPlan], size: int) -> Iterator[list[LayerPlan]]:
    source = iter(plans)
    while part := list(itertools.islice(source, size)):
        yield part


def _check_memory(wanted: int, device: torch.device) -> None:
    """Refuse Gram matrices that the device's memory cannot hold, before anything is computed."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
    else:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    if wanted > free:
        raise LeapError(
            "--items", f"need {wanted / 2**30:.1f} GiB at a time, {free / 2**30:.1f} GiB are free", "give fewer"
        )
