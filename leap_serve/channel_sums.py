"""What goes into every channel of an expert's matrices, summed while a model runs (methods: §0, for MoE-Pruner and intra).

T tokens, K choices of each, E experts, H hidden, I intermediate. Engines pack their experts' weights out of sight,
so the intermediate is computed once more, from the checkpoint's own matrices, for routed tokens only: O(T·K·H·I).
"""

from __future__ import annotations

import torch

from leap_serve.architectures import text_config
from leap_serve.checkpoint import Checkpoint
from leap_serve.errors import UnsupportedError
from leap_serve.weights.matrices import ExpertMatrix, expert_matrices, has_matrices
from leap_serve.weights.overlays import MERGEABLE


def check_channels(checkpoint: Checkpoint) -> None:
    """Raise UnsupportedError unless every expert is one gate, up and down matrix around SiLU, unquantised."""
    text = text_config(checkpoint.config)
    activation = text.get("hidden_act", text.get("hidden_activation"))
    odd = [
        name for name, entry in checkpoint.tensors.items()
        if (role := checkpoint.role(name)).kind in ("expert", "fused")
        and (entry.dtype not in MERGEABLE or not has_matrices(checkpoint.family, role, name))
    ]  # fmt: skip
    if odd or activation != "silu":
        raise UnsupportedError(
            "--channels", f"needs SiLU experts of one gate, up and down matrix each; "
            f"{odd[0] if odd else f'{checkpoint.family.model_type} with {activation}'} is none", "profile without it",
        )  # fmt: skip


class ChannelSums:
    """float64 sums of one MoE layer: ``x2`` [E, H] of (g·x)², ``mid2`` [E, I] of (g·intermediate)².

    Where the router weight multiplies the input, the intermediate is that of g·x, and no second g goes into its sum.

    Args:
        checkpoint: the model that runs, one that check_channels let through.
        layer: index of the MoE layer.
        device: of the sums and of what is added.
    """

    def __init__(self, checkpoint: Checkpoint, layer: int, device: torch.device) -> None:
        self._matrices: dict[tuple[int, str], ExpertMatrix] = {
            (matrix.expert, matrix.part): matrix for matrix in expert_matrices(checkpoint) if matrix.layer == layer
        }
        self._weight_on_input = checkpoint.family.weight_on_input
        self.device = device
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
            self.x2[expert] += (squares[at] * rows.double().square()).sum(0)
            if self._weight_on_input:
                rows = rows * g.reshape(-1)[at, None].float()
            mid = torch.nn.functional.silu(rows @ self._read(expert, "gate").T) * (rows @ self._read(expert, "up").T)
            of_mid = torch.ones_like(squares[at]) if self._weight_on_input else squares[at]
            self.mid2[expert] += (of_mid * mid.double().square()).sum(0)

    def _read(self, expert: int, part: str) -> torch.Tensor:
        """Return an expert's gate or up matrix [I, H] in float32."""
        matrix = torch.from_numpy(self._matrices[expert, part].read())
        return matrix.to(self.device)
