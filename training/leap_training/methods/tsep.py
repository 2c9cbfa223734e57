"""TSEP: fine-tuning on the task, during which experts that are not proficient are dropped.

Paper: Chen et al. 2022, «Task-Specific Expert Pruning for Sparse Mixture-of-Experts». Training goes in windows; over a
window an expert's proficiency is its share of the layer's router weight, p_e = Σ_t g[t,e] / Σ_e Σ_t g[t,e]; at the
window's end every expert with p_e < β/E_alive is dropped (β = 0.1), never below the target; at half of the steps
the least proficient ones are dropped down to the target; then fine-tuning goes on with those left.

Ours: dropped experts get the logit −inf, never a factor 0, so that the others' weights sum to 1 as in the cut; what
is trained, and how long, is leap_training.finetune's (experts and routers, AdamW, linear decay), so that the rows of
a table compare; ten windows up to half of the steps.

Cost: forward and backward passes of all steps on the full model, its gradients and two moments per tuned weight in
memory: 4 × the experts in fp32. A state is written after every window, and as often after the last.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from leap_serve.checkpoint import Checkpoint
from leap_serve.cut.write import cut
from leap_serve.engine import Progress
from leap_serve.engines.torch_subsets import MaskedRouters, masked_routers
from leap_serve.errors import CheckpointError, UnsupportedError, UsageError
from leap_serve.files import new_folder
from leap_serve.plan import LayerPlan, Plan
from leap_serve.provenance import made_by
from leap_serve.tasks.base import Item
from leap_training.batches import collate, use_fast_experts, weighted_loss
from leap_training.finetune import FinetuneConfig, in_order
from leap_training.methods.blocks import BlockModel
from leap_training.methods.states import other_search
from leap_training.pruning_space import PruningSpace
from leap_training.whole import replace_weights

BETA = 0.1
WINDOWS = 10
STATE = "state"


@dataclass(frozen=True, slots=True)
class TsepConfig:
    """The fine-tuning, and the windows in its first half.

    Args:
        tuning: items, steps, batch, rate and seed.
        beta: experts below beta / E_alive of a layer's router weight are dropped.
        windows: until half of the steps.
    """

    tuning: FinetuneConfig
    beta: float = BETA
    windows: int = WINDOWS

    @property
    def ends(self) -> tuple[int, ...]:
        """Steps after which a window ends; the last is half of all, where the target is forced."""
        half = max(1, self.tuning.steps // 2)
        return tuple(sorted({max(1, half * window // self.windows) for window in range(1, self.windows + 1)}))

    @property
    def saves(self) -> tuple[int, ...]:
        """Steps after which a state is written: the ends of windows, and as often in the second half."""
        stride = max(1, self.tuning.steps // 2 // self.windows)
        return (*self.ends, *range(self.ends[-1] + stride, self.tuning.steps + 1, stride))

    def check(self) -> None:
        """Raise UsageError on the first setting that cannot be carried out."""
        if self.tuning.steps < 2 or self.windows < 1 or not 0.0 < self.beta < 1.0:
            raise UsageError("tsep", f"has {self.tuning.steps} steps, {self.windows} windows and β {self.beta}",
                             "give 2 steps or more, 1 window or more and β in (0, 1)")  # fmt: skip


def check_space(space: PruningSpace) -> None:
    """Raise UnsupportedError where layers may retain different numbers; to be asked before a model is loaded."""
    if not space.uniform:
        raise UnsupportedError("--allocation", "TSEP retains equally many in every layer", "choose uniform")


def drop(share: Sequence[float], alive: Sequence[int], target: int, beta: float, force: bool) -> tuple[int, ...]:
    """Return the experts of a layer that stay after a window, increasing.

    Args:
        share: proficiency p of every expert, [E]; 0 for the dead.
        alive: experts so far.
        target: fewer than these never stay.
        beta: the threshold is beta / len(alive).
        force: drop the least proficient down to the target.
    """
    ranked = sorted(alive, key=lambda expert: (-share[expert], expert))
    proficient = sum(share[expert] >= beta / len(alive) for expert in alive)
    return tuple(sorted(ranked[: target if force else max(target, proficient)]))


class Tsep:
    """One run: the model, what is alive, and what the window has seen.

    Args:
        model: the full one, in float32; it is trained in place.
        space: the target, and the layers' top_k; a uniform one.
        items: of the task's training split.
        config: settings.
        state: folder to save to (config.saves) and to continue from, or None.
        identity: what must be the same for a run to be continued (JSON values).
    """

    def __init__(
        self, model: BlockModel, space: PruningSpace, items: Sequence[Item], config: TsepConfig,
        state: Path | None = None, identity: dict[str, Any] | None = None,
    ) -> None:  # fmt: skip
        config.check()
        check_space(space)
        self.model, self.space, self.items, self.config = model, space, items, config
        self.state, self.identity = state, identity or {}
        experts = space.routing.num_experts
        self.layers = {
            index: LayerPlan(tuple(range(experts)), k, space.temperature)
            for index, k in zip(space.layers, space.top_k, strict=True)
        }
        self.mass = {index: torch.zeros(experts, dtype=torch.float64) for index in space.layers}
        self.step, self.losses = 0, list[float]()
        self.history: list[dict[str, Any]] = []
        net = model.model
        net.requires_grad_(False)
        self.tuned = {
            name: value.requires_grad_(True) for name, value in net.named_parameters()
            if ".experts." in name or f".{model.family.router}." in name
        }  # fmt: skip
        use_fast_experts(net)
        self.optimizer = torch.optim.AdamW(
            self.tuned.values(), lr=config.tuning.lr, weight_decay=config.tuning.weight_decay
        )

    def run(self, progress: Progress | None = None, **provenance: Any) -> Plan:
        """Train to the end and return the plan, ``made_by`` with ``provenance``; a state that is there is continued."""
        self._resume()
        tuning = self.config.tuning
        batches = in_order(self.items, tuning)
        for _ in range(self.step):
            next(batches)
        with masked_routers(self.model.model, self.model.family) as routers:
            self._assign(routers)
            handles = [
                self.model.layers[index].router.register_forward_hook(self._watch(index)) for index in self.layers
            ]
            try:
                while self.step < tuning.steps:
                    self._take_step(next(batches))
                    if self.step in self.config.ends:
                        self._end_window(force=self.step == self.config.ends[-1])
                        self._assign(routers)
                    if self.step in self.config.saves:
                        self._save()
                    if progress is not None:
                        progress(self.step, tuning.steps)
            finally:
                for handle in handles:
                    handle.remove()
        return Plan(
            self.space.routing.base, self.space.routing.num_experts, self.layers, made_by=self._record(provenance)
        )

    def save_tuned(self, out: Path, plan: Plan, force: bool = False) -> None:
        """Write the cut of the tuned model to ``out``: the full model's cut by ``plan``, with the tuned experts and routers."""

        def save(scratch: Path) -> Path:
            self.model.model.save_pretrained(scratch / "full")
            tuned = Checkpoint.open(scratch / "full").identity()
            cut(scratch / "full", replace(plan, base=tuned), scratch / "cut")
            return scratch / "cut"

        out.parent.mkdir(parents=True, exist_ok=True)
        room = 2 * sum(parameter.nbytes for parameter in self.model.model.parameters())
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.cut-") as folder:
            source = Path(folder) / "cut"
            cut(self.model.checkpoint.folder, plan, source)
            replace_weights(source, out, ("tsep.json", plan.made_by), save, room, force)

    def _take_step(self, items: Sequence[Item]) -> None:
        """One step of AdamW, as leap_training.finetune takes it."""
        tuning = self.config.tuning
        for group in self.optimizer.param_groups:
            group["lr"] = tuning.lr * (1 - self.step / tuning.steps)
        batch = collate(self.model.tokenizer, items, prompt_weight=0.0).to(self.model.device)
        self._real = batch.mask.flatten().bool()
        logits = self.model.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        loss = weighted_loss(logits, batch)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tuned.values(), 1.0)
        self.optimizer.step()
        self.losses.append(loss.item())
        self.step += 1

    def _watch(self, index: int) -> Any:
        """A hook that adds up the router weight of every expert, padding left out."""

        def hook(_router: Any, _args: Any, output: tuple[torch.Tensor, ...]) -> None:
            if self.model.family.weight_on_input:
                dense = output[0].detach()[self._real]
            else:
                _, weights, ids = output
                dense = torch.zeros(len(weights), len(self.mass[index]), device=weights.device)
                dense = dense.scatter_(1, ids, weights.detach().float())[self._real]
            self.mass[index] += dense.sum(0).double().cpu()

        return hook

    def _end_window(self, force: bool) -> None:
        for index, layer in self.layers.items():
            share = (self.mass[index] / self.mass[index].sum().clamp_min(1e-300)).tolist()
            kept = drop(share, layer.retained, self.space.cap, self.config.beta, force)
            self.layers[index] = replace(layer, retained=kept)
            self.mass[index].zero_()
        counts = [len(layer.retained) for layer in self.layers.values()]
        self.history.append({"step": self.step, "alive": counts, "loss": self.losses[-1]})

    def _assign(self, routers: MaskedRouters) -> None:
        routers.assign([Plan(self.space.routing.base, self.space.routing.num_experts, self.layers)])

    def _record(self, provenance: dict[str, Any]) -> dict[str, Any]:
        tuning, last = self.config.tuning, self.losses[-20:]
        return made_by(
            method="tsep", beta=self.config.beta, windows=self.history, steps=tuning.steps, items=len(self.items),
            seed=tuning.seed, first_loss=self.losses[0], last_loss=sum(last) / len(last),
            notices=["the experts were chosen while the model was tuned: --tuned writes what it has become", *self.space.notices],
            **provenance,
        )  # fmt: skip

    def _save(self) -> None:
        """Write weights, moments and counts, all or nothing."""
        if self.state is None:
            return
        tensors = {f"weight.{name}": value.detach() for name, value in self.tuned.items()}
        for name, value in self.tuned.items():
            for key in ("exp_avg", "exp_avg_sq"):
                tensors[f"{key}.{name}"] = self.optimizer.state[value][key]
        note = {
            "of": self.identity, "step": self.step, "losses": self.losses, "history": self.history,
            "alive": {str(index): layer.retained for index, layer in self.layers.items()},
        }  # fmt: skip
        with new_folder(self.state / STATE, force=True) as work:
            save_file(tensors, work / "tsep.safetensors", {"tsep": json.dumps(note)})

    def _resume(self) -> None:
        path = None if self.state is None else self.state / STATE / "tsep.safetensors"
        if path is None or not path.exists():
            return
        try:
            with safe_open(path, "pt") as file:
                note = json.loads(file.metadata()["tsep"])
        except (SafetensorError, OSError, KeyError, TypeError, ValueError):
            raise CheckpointError(path, "is no state of tsep", "remove it, or choose another --state") from None
        with safe_open(path, "pt", device=str(self.model.device)) as file:
            for key, value in self.identity.items():
                if note["of"].get(key) != value:
                    raise other_search(path, key, note["of"].get(key), value)
            with torch.no_grad():
                for name, value in self.tuned.items():
                    value.copy_(file.get_tensor(f"weight.{name}"))
                    self.optimizer.state[value] = {
                        "step": torch.tensor(float(note["step"])), "exp_avg": file.get_tensor(f"exp_avg.{name}"),
                        "exp_avg_sq": file.get_tensor(f"exp_avg_sq.{name}"),
                    }  # fmt: skip
        self.step, self.losses, self.history = note["step"], note["losses"], note["history"]
        for index, kept in note["alive"].items():
            self.layers[int(index)] = replace(self.layers[int(index)], retained=tuple(kept))
