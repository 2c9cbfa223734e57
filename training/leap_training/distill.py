"""Knowledge distillation from the full model, as baselines: of the logits, and expert by expert (MoE-Pruner).

B sequences of S tokens, T = B·S, V vocabulary, H hidden, K top_k.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from leap_serve.architectures import Family
from leap_serve.errors import UnsupportedError
from leap_training.batches import Batch, use_fast_experts

Form = Literal["logits", "experts"]
_Seen = dict[int, tuple[torch.Tensor, torch.Tensor]]


class Teacher:
    """What the full model adds to a student's loss.

    "logits": KL(teacher ‖ student) of the next-token distributions, summed over answer tokens like the cross-entropy.
    "experts" (MoE-Pruner, with the experts that were dropped left out, ours): for every token and every expert e that
    the student chose, the squared distance between teacher's and student's f_e, each on its own model's input, over
    the teacher's mean square; mean over tokens and choices, sum over layers.

    Args:
        folder: the full model.
        student: the cut model whose forward passes are watched.
        family: of both.
        retained: MoE layer → original ids of the student's experts.
        coef: weight beside the cross-entropy.
    """

    def __init__(
        self, folder: Path, student: Any, family: Family, retained: Mapping[int, tuple[int, ...]], form: Form,
        coef: float = 1.0,
    ) -> None:  # fmt: skip
        self.form, self.coef = form, coef
        self.model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=student.dtype).to(student.device).eval()
        self.model.requires_grad_(False)
        use_fast_experts(self.model)
        if form == "logits":
            return
        if family.weight_on_input:
            what = "weighs the experts' inputs, not their outputs"
            raise UnsupportedError(family.model_type, what, "distil its logits (--baseline kd)")
        self.retained = {layer: torch.tensor(ids, device=student.device) for layer, ids in retained.items()}
        self.students, self.teachers = _expert_modules(student), _expert_modules(self.model)
        self._student_saw, self._teacher_saw = _watch(self.students), _watch(self.teachers)

    def __call__(self, batch: Batch, logits: torch.Tensor, answer_tokens: float) -> torch.Tensor:
        """The term for a part of a minibatch that has ``answer_tokens`` in all; logits [B, S, V] are the student's."""
        with torch.no_grad():
            known = self.model(input_ids=batch.ids, attention_mask=batch.mask, use_cache=False).logits
        weights = batch.weights[:, 1:]
        if self.form == "experts":
            return self.coef * self._between_experts(batch) * weights.sum() / answer_tokens
        ours, theirs = (part[:, :-1].float().log_softmax(-1) for part in (logits, known))
        apart = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)
        return self.coef * (apart * weights).sum() / answer_tokens

    def _between_experts(self, batch: Batch) -> torch.Tensor:
        real = batch.mask.flatten().bool()
        # Calling the experts below is watched as well.
        seen, known = dict(self._student_saw), dict(self._teacher_saw)
        total = torch.zeros((), device=real.device)
        for layer, experts in self.students.items():
            (x, ids), (wanted_x, _) = seen[layer], known[layer]
            x, ids, wanted_x = x.reshape(len(real), -1)[real], ids[real], wanted_x.reshape(len(real), -1)[real]
            apart, size = total.new_zeros(()), total.new_zeros(())
            for place in range(ids.shape[1]):
                chosen = ids[:, place : place + 1]
                one = torch.ones_like(chosen, dtype=x.dtype)
                with torch.no_grad():
                    wanted = self.teachers[layer](wanted_x, self.retained[layer][chosen], one)
                apart = apart + (experts(x, chosen, one) - wanted).float().square().sum()
                size = size + wanted.float().square().sum()
            total = total + apart / size.clamp_min(1e-12)
        return total


def _expert_modules(model: Any) -> dict[int, Any]:
    """MoE layer → its experts, each called with (hidden states [T, H], ids [T, K], weights [T, K])."""
    return {
        int(name.split("layers.")[-1].split(".")[0]): module.experts
        for name, module in model.named_modules() if name.count("layers.") and hasattr(module, "experts")
    }  # fmt: skip


def _watch(modules: Mapping[int, Any]) -> _Seen:
    """Let every module note its last input and ids; returns where."""
    seen: _Seen = {}
    for layer, module in modules.items():

        def note(_module: Any, args: tuple[torch.Tensor, ...], layer: int = layer) -> None:
            seen[layer] = args[0], args[1]

        module.register_forward_pre_hook(note)
    return seen
