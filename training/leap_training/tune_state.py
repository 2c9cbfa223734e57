"""The state of a tuning run on disk: one safetensors file, tensors and JSON together, replaced atomically."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from leap_serve.errors import CheckpointError
from leap_serve.files import write_bytes

STATE = "state.safetensors"
_KEY = "leap_tune"
_MOMENTS = ("exp_avg", "exp_avg_sq", "step")


def write_state(folder: Path, tensors: Mapping[str, torch.Tensor], facts: Mapping[str, Any]) -> None:
    """Replace the state of a run; ``facts`` is JSON and lies in the file's header, so that both change as one."""
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    write_bytes(folder / STATE, save(plain, metadata={_KEY: json.dumps(facts)}))


def read_state(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
    """Return what :func:`write_state` wrote, or None where there is nothing; CheckpointError where it is damaged."""
    path = folder / STATE
    if not path.exists():
        return None
    try:
        with safe_open(path, "pt") as handle:
            facts = json.loads((handle.metadata() or {})[_KEY])
            return {name: handle.get_tensor(name) for name in handle.keys()}, facts  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise CheckpointError(path, f"is no state of leap tune ({error})", "remove it to start anew") from None


def remove_state(folder: Path) -> None:
    """Remove what :func:`write_state` wrote, and the folder if that was all in it: it may be one of the user's own."""
    (folder / STATE).unlink(missing_ok=True)
    with suppress(OSError):
        folder.rmdir()


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """AdamW's moments and step counts of named parameters, those that have been stepped: ``exp_avg.NAME`` and so on."""
    return {
        f"{key}.{name}": torch.as_tensor(optimizer.state[parameter][key])
        for name, parameter in names.items() if parameter in optimizer.state for key in _MOMENTS
    }  # fmt: skip


def load_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor]
) -> None:
    """Take up what :func:`optimizer_tensors` returned."""
    for name, parameter in names.items():
        if f"exp_avg.{name}" in tensors:
            moments = {key: tensors[f"{key}.{name}"].clone() for key in _MOMENTS}
            # AdamW wants its step count on the CPU and the moments beside the parameter.
            optimizer.state[parameter] = {
                key: value if key == "step" else value.to(parameter.device) for key, value in moments.items()
            }


def copy_into(names: Mapping[str, torch.Tensor], tensors: Mapping[str, torch.Tensor], prefix: str) -> None:
    """Copy ``prefix + NAME`` into every named parameter."""
    with torch.no_grad():
        for name, parameter in names.items():
            parameter.copy_(tensors[prefix + name])
