"""What goes into every channel of an expert's matrices, summed while a model runs (methods: §0, for MoE-Pruner and intra).

T tokens, K choices of each, E experts, H hidden, I intermediate. Engines pack their experts' weights out of sight,
so the intermediate is computed once more, from the checkpoint's own matrices, for routed tokens only: O(T·K·H·I).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from leap_serve.architectures import text_config
from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import UnsupportedError
from leap_serve.weights.overlays import MERGEABLE, part_of_expert
from leap_serve.weights.tensorfile import TensorEntry


def check_channels(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError unless every expert is one gate, up and down matrix around SiLU, unquantised."""
    text = text_config(checkpoint.config)
    activation = text.get("hidden_act", text.get("hidden_activation"))
    odd = [
        name for name, entry in checkpoint.tensors.items()
        if (role := checkpoint.role(name)).kind in ("expert", "fused")
        and (entry.dtype not in MERGEABLE or part_of_expert(role) is None)
    ]  # fmt: skip
    if odd or activation != "silu" or checkpoint.family.weight_on_input:
        raise UnsupportedError(
            "--channels", f"needs SiLU experts of one gate, up and down matrix each; "
            f"{odd[0] if odd else f'{checkpoint.family.model_type} with {activation}'} is none", "profile without it",
        )  # fmt: skip


class ChannelSums:
    """float64 sums of one MoE layer: ``x2`` [E, H] of (g·x)², ``mid2`` [E, I] of (g·intermediate)².

    Args:
        checkpoint: the model that runs, one that check_channels let through.
        layer: index of the MoE layer.
        device: of the sums and of what is added.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, device: torch.device) -> None:
        self._files: dict[Path, Any] = {}
        self._matrices: dict[tuple[int, str], TensorEntry] = {}
        self.device = device
        for name, entry in checkpoint.tensors.items():
            role = checkpoint.role(name)
            part = part_of_expert(role)
            if role.layer == layer and part is not None:
                self._matrices[role.expert, part] = entry
        width, hidden = self._matrices[0, "gate"].shape
        experts = checkpoint.experts_in(layer)
        self.x2 = torch.zeros(experts, hidden, dtype=torch.float64, device=device)
        self.mid2 = torch.zeros(experts, width, dtype=torch.float64, device=device)

    def add(self, x: torch.Tensor, g: torch.Tensor, ids: torch.Tensor) -> None:
        """Account for tokens x [T, H] with weights g [T, K], as they are applied, and expert ids [T, K]."""
        flat, squares = ids.reshape(-1), g.reshape(-1).double().square()[:, None]
        for expert in flat.unique().tolist():
            at = (flat == expert).nonzero()[:, 0]
            rows = x[at // ids.shape[1]].float()
            mid = torch.nn.functional.silu(rows @ self._read(expert, "gate").T) * (rows @ self._read(expert, "up").T)
            self.x2[expert] += (squares[at] * rows.double().square()).sum(0)
            self.mid2[expert] += (squares[at] * mid.double().square()).sum(0)

    def _read(self, expert: int, part: str) -> torch.Tensor:
        """Return an expert's gate or up matrix [I, H] in float32."""
        entry = self._matrices[expert, part]
        if entry.file not in self._files:
            self._files[entry.file] = safe_open(entry.file, "pt").__enter__()  # mapped, and unmapped with this object
        matrix: torch.Tensor = self._files[entry.file].get_tensor(entry.name)
        return matrix.to(self.device, torch.float32)
