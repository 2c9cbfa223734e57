"""The experts' statistics in transformers: the reference against which the serving engine is checked (methods: §0)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from leap_serve.architectures import Family
from leap_serve.channel_sums import ChannelSums
from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import UnsupportedError
from leap_serve.profile import Array, LayerProfile


class TorchRecorder:
    """Statistics of one MoE layer, token by token in float64, straight from their definitions."""

    def __init__(self, num_experts: int, channels: ChannelSums | None = None) -> None:
        def zeros() -> Array:
            return np.zeros(num_experts)

        self.statistics = LayerProfile(
            n=zeros(), m=zeros(), a=zeros(), w=zeros(), w2=zeros(), max=zeros(), easy=zeros(),
            coact=np.zeros((num_experts, num_experts)),
        )  # fmt: skip
        self.residual: torch.Tensor | None = None
        self.channels = channels

    def read(self) -> LayerProfile:
        """Return the statistics, with channel sums where they were asked for."""
        if self.channels is None:
            return self.statistics
        x2, mid2 = (sums.cpu().numpy() for sums in (self.channels.x2, self.channels.mid2))
        return replace(self.statistics, x2=x2, mid2=mid2)

    def keep_residual(self, _norm: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        """Before the norm in front of the block: its input is the residual stream h."""
        self.residual = args[0]

    def see_experts(self, experts: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Before the experts run on x [T, H], ids [T, K], weights [T, K]: f by the module's own code, c = g·f."""
        x, ids, g = args
        one = ids.reshape(-1, 1)
        # The class's forward, so that this hook is not called again.
        out = type(experts).forward(
            experts, x.repeat_interleave(ids.shape[1], 0), one, torch.ones_like(one, dtype=x.dtype)
        )
        if self.channels is not None:
            self.channels.add(x, g, ids)
        f = out.view(*ids.shape, -1)
        self.add(ids, g, f, f.double() * g.double()[..., None])

    def see_block(self, block: Any, args: tuple[torch.Tensor, ...]) -> None:
        """Before a Llama-4 block runs on x: every expert sees g·x, with g = 0 where it is not chosen."""
        x = args[0].reshape(-1, args[0].shape[-1])
        scores, _ = block.router(x)
        ids = scores.topk(block.top_k, dim=-1).indices
        if self.channels is not None:
            self.channels.add(x, scores.gather(1, ids), ids)
        experts, tokens = scores.shape[1], torch.arange(x.shape[0], device=x.device)[:, None]
        f = block.experts(x.repeat(experts, 1)).view(experts, *x.shape)[ids, tokens]
        c = block.experts((x[None] * scores.T[..., None]).flatten(0, 1)).view(experts, *x.shape)[ids, tokens]
        self.add(ids, scores.gather(1, ids), f, c)

    def add(self, ids: torch.Tensor, g: torch.Tensor, f: torch.Tensor, c: torch.Tensor) -> None:
        """Account for T tokens: experts chosen [T, K], weights g [T, K], outputs f and contributions c [T, K, H]."""
        s = self.statistics
        assert self.residual is not None and s.easy is not None, "the norm before the block was not seen"
        h = self.residual.reshape(-1, c.shape[-1]).double().cpu().numpy()
        f64, c64 = f.double().cpu().numpy(), c.double().cpu().numpy()
        chosen, weights = ids.cpu().numpy(), g.double().cpu().numpy()
        after = h + c64.sum(1)
        cosine = (h * after).sum(-1) / (np.linalg.norm(h, axis=-1) * np.linalg.norm(after, axis=-1))
        for t, experts in enumerate(chosen):
            size = np.linalg.norm(c64[t], axis=-1)
            s.n[experts] += 1
            s.m[experts] += weights[t]
            s.a[experts] += np.linalg.norm(f64[t], axis=-1)
            s.w[experts] += size
            s.w2[experts] += size**2
            s.max[experts] = np.maximum(s.max[experts], np.abs(f64[t]).max(-1))
            s.coact[np.ix_(experts, experts)] += 1
            s.easy[experts] += size * max(1.0 - cosine[t], 0.0)
        self.residual = None


@contextmanager
def observe(
    model: torch.nn.Module, family: Family, channels_of: Checkpoint | None = None
) -> Iterator[dict[int, TorchRecorder]]:
    """Hook every MoE layer of a transformers model; yields {layer: recorder} and takes the hooks off at the end.

    With ``channels_of``, the checkpoint that the model was loaded from, channel sums are collected as well.
    """
    modules = dict(model.named_modules())
    recorders: dict[int, TorchRecorder] = {}
    handles: list[Any] = []
    try:
        for name, experts in modules.items():
            head, _, last = name.rpartition(".")
            if last != "experts":
                continue
            decoder = head.rpartition(".")[0]
            index = int(decoder.rpartition(".")[2])
            device = next(experts.parameters()).device
            channels = None if channels_of is None else ChannelSums(channels_of, index, device)
            recorder = TorchRecorder(int(experts.num_experts), channels)
            norm = modules[f"{decoder}.post_attention_layernorm"]
            handles.append(norm.register_forward_pre_hook(recorder.keep_residual))
            if family.weight_on_input:
                handles.append(modules[head].register_forward_pre_hook(recorder.see_block))
            else:
                handles.append(experts.register_forward_pre_hook(recorder.see_experts))
            recorders[index] = recorder
        if not recorders:
            raise UnsupportedError(type(model).__name__, "has no MoE layer that can be observed", "profile a MoE model")
        yield recorders
    finally:
        for handle in handles:
            handle.remove()
