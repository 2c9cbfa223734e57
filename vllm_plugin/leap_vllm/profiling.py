"""The experts' statistics, collected inside a running vLLM model (methods: §0).

T tokens, H hidden, E experts of a layer, K top_k. g is the router weight really applied, f_e(x) the
expert's output without it, c its contribution: g·f_e(x), or f_e(g·x) where the weight is put on the
input. Only the chosen experts are computed: O(T·K·H), never O(T·E·H).
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from leap_serve.channel_sums import ChannelSums
from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import UnsupportedError
from leap_vllm import compat

# Bounds the fp32 scratch of one chunk of pseudo-tokens to 128 MiB.
CHUNK_ELEMENTS = 1 << 25
SUMS = ("n", "m", "a", "w", "w2", "max", "easy")


class LayerRecorder:
    """float64 accumulators of one MoE layer, on the layer's device.

    Args:
        num_experts: E.
        experts: computes f: (x [N, H], weights [N, 1], ids [N, 1]) → [N, H], summed over tensor-parallel ranks.
        scale: constant factor on the routed output, part of g.
        weight_on_input: c = f_e(g·x).
        device: of the layer.
        channels: sums of what goes into the experts' channels, or None.
    """

    def __init__(
        self,
        num_experts: int,
        experts: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor],
        scale: float,
        weight_on_input: bool,
        device: torch.device,
        channels: ChannelSums | None = None,
    ) -> None:
        self.channels = channels
        self.experts, self.scale, self.weight_on_input = experts, scale, weight_on_input
        self.num_experts = num_experts
        self.sums = {key: torch.zeros(num_experts, dtype=torch.float64, device=device) for key in SUMS}
        self.coact = torch.zeros(num_experts, num_experts, dtype=torch.float64, device=device)
        self.residual: torch.Tensor | None = None
        self.residual_missing = False

    def add(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> None:
        """Account for tokens x [T, H] with the router's weights and ids [T, K]."""
        residual, self.residual = self.residual, None
        self.residual_missing |= residual is None
        step = max(1, CHUNK_ELEMENTS // (topk_ids.shape[1] * x.shape[1]))
        for start in range(0, x.shape[0], step):
            part = slice(start, min(start + step, x.shape[0]))
            self._add(x[part], topk_weights[part], topk_ids[part], None if residual is None else residual[part])

    def _add(self, x: torch.Tensor, g: torch.Tensor, ids: torch.Tensor, h: torch.Tensor | None) -> None:
        tokens, top_k = ids.shape
        pseudo, one_id, weight = x.repeat_interleave(top_k, 0), ids.reshape(-1, 1), g.reshape(-1, 1)
        out = self.experts(pseudo, torch.ones_like(weight), one_id)
        norm = torch.linalg.vector_norm(out, dim=-1, dtype=torch.float32)
        peak = out.abs().amax(-1)
        applied = weight.double() * self.scale
        if self.channels is not None:
            self.channels.add(x, applied.view(ids.shape), ids)
        if self.weight_on_input:
            contribution = self.experts(pseudo, weight, one_id).double() * self.scale
            weighted = torch.linalg.vector_norm(contribution, dim=-1)
        else:
            contribution, weighted = out.double() * applied, norm.double() * applied.reshape(-1)
        flat = one_id.reshape(-1).long()
        self._sum("n", flat, torch.ones_like(weighted))
        self._sum("m", flat, applied.reshape(-1))
        self._sum("a", flat, norm.double())
        self._sum("w", flat, weighted)
        self._sum("w2", flat, weighted.square())
        self.sums["max"].scatter_reduce_(0, flat, peak.double(), "amax")
        # fp32 counts of one chunk stay far below 2^24 and are exact.
        chosen = torch.zeros(tokens, self.num_experts, device=x.device).scatter_(1, ids.long(), 1.0)
        self.coact += (chosen.T @ chosen).double()
        if h is not None:
            before = h.double()
            routed = contribution.view(tokens, top_k, -1).sum(1)[:, : before.shape[1]]
            turn = 1.0 - torch.nn.functional.cosine_similarity(before, before + routed, dim=-1, eps=1e-30)
            self._sum("easy", flat, weighted * turn.clamp_min(0.0).repeat_interleave(top_k))

    def _sum(self, key: str, ids: torch.Tensor, values: torch.Tensor) -> None:
        self.sums[key].index_add_(0, ids, values)

    def read(self) -> dict[str, bytes]:
        """Return each accumulator as little-endian float64 bytes; "easy" is left out where h was not seen."""
        named = {**self.sums, "coact": self.coact}
        if self.channels is not None:
            named |= {"x2": self.channels.x2, "mid2": self.channels.mid2}
        if self.residual_missing:
            del named["easy"]
        return {key: value.cpu().numpy().astype("<f8").tobytes() for key, value in named.items()}


class Recording:
    """Hooks on a model from construction to :meth:`remove`; what the model computes is unchanged.

    Args:
        model: vLLM's.
        channels_of: folder of its checkpoint, where channel sums are wanted too.
    """

    def __init__(self, model: torch.nn.Module, channels_of: str | None = None) -> None:
        self._checkpoint = None if channels_of is None else Checkpoint.open(Path(channels_of))
        self.layers: dict[int, LayerRecorder] = {}
        self._undo: list[Callable[[], None]] = []
        try:
            modules = dict(model.named_modules())
            for layer, runner in compat.moe_layers(model).items():
                self._watch(layer, runner, modules)
        except BaseException:
            self.remove()
            raise
        if not self.layers:
            raise UnsupportedError(type(model).__name__, "has no MoE layer that can be observed", "profile a MoE model")

    def _watch(self, layer: int, runner: Any, modules: dict[str, torch.nn.Module]) -> None:
        compat.check_observable(f"layer {layer}", runner)
        routed = runner.routed_experts
        stock = routed.forward_modular
        recorder = LayerRecorder(
            routed.global_num_experts,
            # Kernels may write into their arguments (the CPU one into the weights), hence the copies.
            lambda x, weights, ids: compat.reduced_experts(runner, stock, x.clone(), weights.clone(), ids.clone()),
            runner.routed_scaling_factor,
            routed.apply_router_weight_on_input,
            routed.w13_weight.device,
            None if self._checkpoint is None else ChannelSums(self._checkpoint, layer, routed.w13_weight.device),
        )

        def observed(x: Any, topk_weights: Any, topk_ids: Any, *args: Any, **kwargs: Any) -> Any:
            real = compat.actual_tokens(x.shape[0])
            if real:
                recorder.add(x[:real], topk_weights[:real], topk_ids[:real])
            return stock(x, topk_weights, topk_ids, *args, **kwargs)

        def keep_residual(_module: Any, _args: Any, output: Any) -> None:
            # vLLM's fused norm returns (normalised, residual); the second is the stream before the block.
            if isinstance(output, tuple) and len(output) == 2:
                recorder.residual = output[1]

        routed.forward_modular = observed
        self._undo.append(lambda: delattr(routed, "forward_modular"))
        # All families served here name the norm before the MoE block alike.
        for name, module in modules.items():
            if name.endswith(f"layers.{layer}.post_attention_layernorm"):
                self._undo.append(module.register_forward_hook(keep_residual).remove)
        self.layers[layer] = recorder

    def read(self) -> dict[int, dict[str, bytes]]:
        """Return {layer: {statistic: float64 bytes}} in increasing order of layers."""
        return {layer: self.layers[layer].read() for layer in sorted(self.layers)}

    def remove(self) -> None:
        """Put the model back as it was."""
        while self._undo:
            self._undo.pop()()
