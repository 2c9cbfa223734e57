"""Repair and specialise a cut checkpoint: router warm-up, then router and experts in turn (LEAP §3.4, eq. 18).

Rounds of active learning enlarge the labelled set; of its items every tick takes a minibatch. A router step (adapters
frozen) is an exploratory rollout and a PPO update; an expert step (deterministic top-k) is AdamW on LoRA adapters of
the retained experts and, unless they shall be frozen there, on the routers. All randomness is a function of (seed, tick), so the tick IS the state of the
random numbers, and a run that was killed continues to the same curve.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from leap_serve.checkpoint import Checkpoint
from leap_serve.engines.torch_cut import load_model
from leap_serve.errors import LeapError, UnsupportedError, UsageError
from leap_serve.tasks.base import Item
from leap_training.active_learning import Pool, collect
from leap_training.adapters import wrap
from leap_training.batches import Batch, collate, token_losses, use_fast_experts
from leap_training.distill import Teacher
from leap_training.ppo import Rollout, joined
from leap_training.routing_agent import RoutingAgent, collect_rollout, improve
from leap_training.search_state import below
from leap_training.tune_config import RATE_AT_WIDTH_1, TuneConfig, TuneData
from leap_training.tune_state import copy_into, load_optimizer, optimizer_tensors, read_state, write_state
from leap_training.whole import check_unpacked

Report = Callable[[int, int, str], None]
"""Called with (done, in all, what): ticks of the run or, while a batch of labels is chosen, prompts that are scored."""


@dataclass(slots=True)
class Progress:
    """What a run has done; all of it is JSON.

    Args:
        tick: router warm-up steps and expert steps done.
        losses, rewards: training losses and PPO metrics since the round began.
        curve: a row per round.
        before: validation loss of the cut itself, in nats.
        best: row number of the lowest validation loss; −1, the cut itself, where no round was better.
        stopped: whether early stopping has ended the run.
    """

    tick: int = 0
    losses: list[float] = field(default_factory=list)
    rewards: list[dict[str, float]] = field(default_factory=list)
    curve: list[dict[str, Any]] = field(default_factory=list)
    before: float | None = None
    best: int = -1
    stopped: bool = False


def dealt(total: int, parts: int) -> list[int]:
    """Whole numbers that differ by 1 at most and sum to ``total``, one per part: 5 in 3 parts are 1, 2, 2."""
    return [total * (n + 1) // parts - total * n // parts for n in range(parts)]


class Tuner:
    """One tuning run of one checkpoint; ``state`` is the folder it can be resumed from."""

    def __init__(self, folder: Path, data: TuneData, config: TuneConfig, state: Path | None = None) -> None:
        config.check()
        self.config, self.data, self.state = config, data, state
        self.accelerator = Accelerator()
        if config.batch < self.accelerator.num_processes:
            what = f"{config.batch} items in a step for {self.accelerator.num_processes} processes"
            raise UsageError("--batch", what, "give each process at least one")
        self.checkpoint = Checkpoint.open(folder)
        self._check_routed()
        if config.experts == "full":
            check_unpacked(self.checkpoint, "tune it without --baseline")
        self.pool = Pool(data.pool, data.tests)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        base: Any = load_model(self.checkpoint, getattr(torch, config.dtype)).to(self.accelerator.device)
        if config.learning_rate is None:
            rate = RATE_AT_WIDTH_1[config.experts] / base.config.get_text_config().hidden_size
            self.config = config = replace(config, learning_rate=rate)
        base.requires_grad_(False)
        use_fast_experts(base)
        if config.checkpointing:
            base.gradient_checkpointing_enable({"use_reentrant": False})
        self.agent = RoutingAgent(base, self.checkpoint.family, config.exploration)
        torch.manual_seed(config.seed)
        self.base, self.model = base, wrap(base, config.rank, config.rank) if config.experts == "lora" else base
        # No dropout: its draws would be no function of (seed, tick).
        self.model.eval()
        for module in self.model.modules() if config.checkpointing else ():
            if isinstance(module, GradientCheckpointingLayer):
                module.training = True  # it alone, not what it holds: transformers recomputes nothing in eval mode
        self.experts = self._experts()
        self.routers = {f"router.{name}": p for name, p in self.agent.heads.named_parameters()}
        moved = list(self.experts.values()) + (list(self.routers.values()) if config.supervised_router else [])
        self.optimizer = (
            torch.optim.AdamW(moved, lr=config.learning_rate or 0.0, weight_decay=config.adapter_l2) if moved else None
        )
        self.policy_names = {**self.routers, "value": self.agent.value}
        self.policy_optimizer = torch.optim.AdamW(
            self.policy_names.values(), lr=config.router.learning_rate, weight_decay=0.0
        )
        self.teacher = self._teacher()
        self.progress = Progress()
        self.best: dict[str, torch.Tensor] = {}
        self._resume()

    def _check_routed(self) -> None:
        """Refuse what the routing agent's heads, which answer in the routers' place, cannot be."""
        plan = self.checkpoint.plan
        for index, layer in plan.layers.items() if plan else ():
            if layer.merge is not None and layer.maps_router and layer.merge.applied == "probabilities":
                what = f"layer {index} maps its router's probabilities to merged experts, which the routing agent cannot train"
                remedy = "tune experts and routers plainly: python -m leap_training.finetune"
                raise UnsupportedError(self.checkpoint.folder, what, remedy)
            if self.config.router.latency_coef and (layer.maps_router or layer.skip is not None):
                what = f"layer {index} merges or skips experts, so what a token chooses is not what it reads"
                raise UnsupportedError("--latency-coef", what, "leave it out")

    @property
    def tuned(self) -> dict[str, torch.Tensor]:
        """Everything that the run may change in the model."""
        return {**self.experts, **self.routers}

    @property
    def total(self) -> int:
        """Ticks of a whole run."""
        return self._warmup + self.config.steps

    @property
    def _warmup(self) -> int:
        return self.config.router_warmup if self.config.rl_router else 0

    def run(self, report: Report | None = None) -> None:
        """Tune to the end, or until early stopping, and leave the best round's weights in the model, or the cut's own."""
        progress = self.progress
        if progress.before is None:
            progress.before = float(self.item_losses(self.data.stopping)[0].mean())
            self._remember()
        while progress.tick < self.total and not progress.stopped:
            self._tick(report)
            progress.tick += 1
            step = progress.tick - self._warmup
            ended = step > 0 and step % (self.config.steps // self.config.rounds) == 0
            if ended:
                self._end_round()
            if ended or progress.tick % self.config.save_every == 0:
                self._save()
            if report is not None:
                last = progress.curve[-1]["validation_loss"] if progress.curve else progress.before
                report(progress.tick, self.total, f"{len(self.pool.labelled)} labels, validation loss {last:.4f}")
        copy_into(self.tuned, self.best, "")

    def item_losses(self, items: Sequence[Item]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Mean loss per answer token of each item, and whether every one of its tokens is the likeliest."""
        losses, exact = [], []
        for batch in self._parts(collate(self.tokenizer, items, 0.0), self._rows(self.config.batch)):
            with torch.no_grad():
                logits = self._logits(batch)
                weights = batch.weights[:, 1:]
                losses.append((token_losses(logits, batch) * weights).sum(1) / weights.sum(1))
                right = (logits[:, :-1].argmax(-1) == batch.ids[:, 1:]) | (weights == 0)
                exact.append(right.all(1))
        return torch.cat(losses).double().cpu().numpy(), torch.cat(exact).cpu().numpy()

    def _tick(self, report: Report | None) -> None:
        """One step: of the router alone while warming up, then of the experts, every so often after a router step."""
        config, step = self.config, self.progress.tick - self._warmup
        per_round = config.steps // config.rounds
        number, place = divmod(max(step, 0), per_round)
        # A pool may be smaller than all its rounds; then the run goes on with what is labelled.
        if self.pool.rounds == number and (number == 0 or self.pool.unlabelled):
            self._label(report)
        items = self._minibatch(number, place) if step >= 0 else self._minibatch(-1, self.progress.tick)
        batch = collate(self.tokenizer, items, 0.0).to(self.accelerator.device)
        if config.rl_router and (step < 0 or step % config.router_every == 0):
            self.progress.rewards.append(self._router_step(batch))
        if step >= 0 and self.optimizer is not None:
            self.progress.losses.append(self._expert_step(batch, step))

    def _label(self, report: Report | None = None) -> None:
        """Add a batch to the labelled items, chosen under the model as it is now."""
        how = self.config.acquisition
        features = None

        def show(done: int, total: int) -> None:
            # Counts of its own, not the run's: scoring may take minutes in which no tick passes.
            if report is not None:
                report(done, total, f"scoring the pool for round {self.pool.rounds + 1}")

        labels, seed = self.config.labels, self.config.seed
        if how.strategy != "random":
            candidates = self.pool.candidates(labels, how, seed)
            show(0, len(candidates))
            rows = self._rows(self.config.batch)
            features = collect(self.model, self.tokenizer, candidates, how, batch=rows, progress=show)
        self.pool.select(labels, how, features, seed)

    def _minibatch(self, number: int, place: int) -> list[Item]:
        """The items of a step: labelled items in an order that is shuffled anew each epoch of each round."""
        items, size = self.pool.labelled, self.config.batch
        chosen: list[Item] = []
        for position in range(place * size, (place + 1) * size):
            epoch, index = divmod(position, len(items))
            if not chosen or index == 0:
                order = random.Random(f"{self.config.seed}/{number}/{epoch}").sample(range(len(items)), len(items))
            chosen.append(items[order[index]])
        return chosen

    def _router_step(self, batch: Batch) -> dict[str, float]:
        """A rollout and a PPO update, the adapters frozen; with several processes each rolls out its own rows."""
        accelerator, config = self.accelerator, self.config
        rank, world = accelerator.process_index, accelerator.num_processes
        own = Batch(*(t[rank::world] for t in batch))
        drawn = np.random.default_rng([config.seed, self.progress.tick, rank]).integers(2**62)
        generator = torch.Generator().manual_seed(int(drawn))
        # Falling like the experts' rate: PPO's steps keep their size however little is left to gain.
        for group in self.policy_optimizer.param_groups:
            group["lr"] = config.router.learning_rate * (1 - self.progress.tick / self.total)
        self.agent.heads.requires_grad_(True)
        rollout, found = self._rollout(own, generator)
        if world > 1:
            own_part = (rollout.observations, rollout.actions, rollout.logprobs, rollout.values, rollout.advantages,
                     rollout.returns)  # fmt: skip
            states, actions, *rest = (accelerator.gather(part) for part in own_part)
            rollout = Rollout(states, actions, None, *rest)
        # The same order of minibatches in every process, so that the routers stay equal.
        same = torch.Generator().manual_seed(config.seed * 1_000_003 + self.progress.tick)
        return {**found, **improve(self.agent, self.policy_optimizer, rollout, config.router, same)}

    def _rollout(self, own: Batch, generator: torch.Generator) -> tuple[Rollout, dict[str, float]]:
        """Roll out this process's rows part by part; the samples of all parts, and the mean of their metrics.

        There are always ``config.router.tokens`` samples: processes whose rows fall into different numbers of parts
        could not gather them otherwise.
        """
        router = self.config.router
        parts = list(self._parts(own, self._rows(len(own.ids))))
        rollouts, metrics = zip(
            *(
                collect_rollout(self.agent, self._losses_of(part), part, replace(router, tokens=tokens), generator)
                for part, tokens in zip(parts, dealt(router.tokens, len(parts)), strict=True)
            ),
            strict=True,
        )
        return joined(rollouts), {key: float(np.mean([one[key] for one in metrics])) for key in metrics[0]}

    def _expert_step(self, batch: Batch, step: int) -> float:
        """One step of AdamW under the deterministic policy; returns the mean loss per answer token."""
        accelerator, config = self.accelerator, self.config
        assert self.optimizer is not None and config.learning_rate is not None
        rate = min(1.0, (step + 1) / max(1, config.lr_warmup)) * (1 - step / config.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate * rate
        self.optimizer.zero_grad(set_to_none=True)
        answer_tokens = float(batch.weights[:, 1:].sum())
        own = Batch(*(t[accelerator.process_index :: accelerator.num_processes] for t in batch))
        total = torch.zeros((), device=accelerator.device)
        self.agent.heads.requires_grad_(config.supervised_router)
        for part in self._parts(own, self._rows(len(own.ids))):
            logits = self._logits(part)
            loss = (token_losses(logits, part) * part.weights[:, 1:]).sum() / answer_tokens
            total += loss.detach()
            if self.teacher is not None:
                loss = loss + self.teacher(part, logits, answer_tokens)
            loss.backward()
        moved = [p for group in self.optimizer.param_groups for p in group["params"]]
        if accelerator.num_processes > 1:
            for parameter in moved:
                parameter.grad = accelerator.reduce(parameter.grad, "sum")
            total = accelerator.reduce(total, "sum")
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        self.optimizer.step()
        return float(total)

    def _losses_of(self, batch: Batch) -> Callable[[], torch.Tensor]:
        """The batch's token losses [B, S − 1] by the model as it then is."""
        return lambda: token_losses(self._logits(batch), batch)

    def _logits(self, batch: Batch) -> torch.Tensor:
        return self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits

    def _rows(self, rows: int) -> int:
        """How many of so many rows pass through the model at once."""
        return -(-rows // self.config.accumulate)

    def _parts(self, batch: Batch, rows: int) -> Iterator[Batch]:
        for parts in zip(*(t.to(self.accelerator.device).split(max(1, rows)) for t in batch), strict=True):
            yield Batch(*parts)

    def _end_round(self) -> None:
        """Measure on the validation part, remember the best weights, and decide whether to stop."""
        progress = self.progress
        losses, exact = self.item_losses(self.data.stopping)
        row: dict[str, Any] = {
            "round": len(progress.curve) + 1, "labels": len(self.pool.labelled), "tick": progress.tick,
            "train_loss": float(np.mean(progress.losses)) if progress.losses else None,
            "validation_loss": float(losses.mean()), "validation_exact": float(exact.mean()),
        }  # fmt: skip
        if progress.rewards:
            row["router"] = {key: float(np.mean([m[key] for m in progress.rewards])) for key in progress.rewards[0]}
        progress.curve.append(row)
        progress.losses, progress.rewards = [], []
        rounds = [one["validation_loss"] for one in progress.curve]
        lowest, last = rounds.index(min(rounds)), len(rounds) - 1
        assert progress.before is not None
        if lowest == last and rounds[last] < progress.before:
            progress.best = last
            self._remember()
        # Counted from the best round, not from the cut: first steps may lose what later ones win back.
        progress.stopped = 0 < self.config.patience <= last - lowest

    def _remember(self) -> None:
        self.best = {name: p.detach().clone() for name, p in self.tuned.items()}

    def _experts(self) -> dict[str, torch.Tensor]:
        """Name → parameter of what expert steps train, besides routers."""
        wanted = {"lora": ".lora_", "full": ".experts.", "none": "no parameter has this name"}[self.config.experts]
        found = {name: p for name, p in self.model.named_parameters() if wanted in name}
        for parameter in found.values():
            # AdamW's steps would be lost in bf16; PEFT rounds the sum, not the adapter.
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)
        return found

    def _teacher(self) -> Teacher | None:
        config, plan = self.config, self.checkpoint.plan
        if config.distill == "none":
            return None
        assert config.teacher is not None and plan is not None
        retained = {layer: of.retained for layer, of in plan.layers.items()}
        return Teacher(Path(config.teacher), self.base, self.checkpoint.family, retained, config.distill)

    def _settings(self) -> dict[str, Any]:
        """What a state must agree in with the run that takes it up."""
        own = {key: value for key, value in asdict(self.config).items() if key != "save_every"}
        settings = {"config": own, "data_sha256": self.data.sha256, "model": self.checkpoint.identity().sha256,
                    "processes": self.accelerator.num_processes}  # fmt: skip
        return dict(json.loads(json.dumps(settings)))  # as a file gives it back, tuples as lists

    def _save(self) -> None:
        if self.state is None or not self.accelerator.is_main_process:
            return
        tensors = {f"now.{name}": p for name, p in self.tuned.items()}
        tensors |= {f"best.{name}": p for name, p in self.best.items()}
        tensors |= {"now.value": self.agent.value}
        tensors |= {f"policy.{k}": v for k, v in optimizer_tensors(self.policy_optimizer, self.policy_names).items()}
        if self.optimizer is not None:
            tensors |= {f"adam.{key}": value for key, value in optimizer_tensors(self.optimizer, self.tuned).items()}
        write_state(
            self.state, tensors,
            {"settings": self._settings(), "progress": asdict(self.progress), "pool": self.pool.state()},
        )  # fmt: skip

    def _resume(self) -> None:
        found = read_state(self.state) if self.state is not None else None
        if found is None:
            return
        tensors, facts = found
        if facts["settings"] != self._settings():
            raise LeapError(
                str(self.state),
                "holds a run with other settings, data, model or number of processes",
                "give another --state, or remove it",
            )
        copy_into({**self.tuned, "value": self.agent.value}, tensors, "now.")
        self.best = {name[5:]: t.to(self.accelerator.device) for name, t in tensors.items() if name.startswith("best.")}
        load_optimizer(self.policy_optimizer, self.policy_names, below(tensors, "policy."))
        if self.optimizer is not None:
            load_optimizer(self.optimizer, self.tuned, below(tensors, "adam."))
        self.progress = Progress(**facts["progress"])
        self.pool.load_state(facts["pool"])
