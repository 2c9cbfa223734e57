"""What layer-wise methods share: a full model's MoE layers one at a time, their inputs on disk, and resuming.

T tokens, H hidden, E experts of a layer, K the model's top_k, S plans of one layer.

The inputs of all L layers are T·H·L numbers: gigabytes of large models. They lie in the folder of --state while a search
runs, without one in the system's temporary folder, which often is memory: TMPDIR names another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from leap_serve import encoding
from leap_serve.architectures import Family
from leap_serve.checkpoint import Checkpoint
from leap_serve.engine import Progress
from leap_serve.engines.torch_subsets import MaskedRouter, masked_routers, moe_blocks
from leap_serve.errors import CheckpointError, LeapError, UsageError
from leap_serve.files import read_json, write_json
from leap_serve.plan import LayerPlan, Plan
from leap_serve.tasks.base import Item
from leap_training.methods.states import other_search

CHUNK = 1 << 24
"""Numbers that the outputs of all experts may take at once."""
INPUTS = "item-*.safetensors"
"""Files of captured inputs, one per item."""


@dataclass(frozen=True, slots=True)
class MoeLayer:
    """One MoE block of transformers, taken apart: logits, router weights under a plan, experts' contributions."""

    block: Any
    family: Family

    @property
    def router(self) -> Any:
        """The block's router."""
        return getattr(self.block, self.family.router)

    @property
    def top_k(self) -> int:
        """Experts per token of the full model (K)."""
        return int(self.router.top_k)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """Return the router's logits z [T, E] in float32 for x [T, H]."""
        output = self.router(x)
        return (output[1] if self.family.weight_on_input else output[0]).float()

    def weights(self, z: torch.Tensor, plans: Sequence[LayerPlan]) -> torch.Tensor:
        """Return what each expert's contribution is multiplied with, [S, T, E] float64, 0 where it is not chosen.

        The routing is the one that a cut by the plan has. Where the weight multiplies the input (Llama-4) it is
        part of the contribution, and chosen experts count 1.
        """
        gates = self.gates(z, plans)
        return (gates > 0).double() if self.family.weight_on_input else gates

    def gates(self, z: torch.Tensor, plans: Sequence[LayerPlan]) -> torch.Tensor:
        """Return the router's weight of each expert under each plan, [S, T, E] float64, 0 where it is not chosen."""
        masked = MaskedRouter(self.family)
        masked.rows = plans
        many = z.repeat(len(plans), 1)
        output = masked(self.router, None, (many, many))
        if self.family.weight_on_input:
            dense = output[0].double()
        else:
            _, weights, ids = output
            dense = torch.zeros(many.shape, dtype=torch.float64, device=z.device).scatter_(1, ids, weights.double())
        return dense.unflatten(0, (len(plans), -1))

    def contributions(self, x: torch.Tensor, z: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return f_e(x), of Llama-4 f_e(σ(z_e)·x), of experts ids [T, N] for x [T, H]: [T, N, H] in x's dtype."""
        if self.family.weight_on_input:
            inputs = x[None] * z.sigmoid().to(x.dtype).T[..., None]
            whole = self.block.experts(inputs.flatten(0, 1)).unflatten(0, (z.shape[1], -1))
            return whole[ids, torch.arange(len(x), device=x.device)[:, None]]
        one = ids.reshape(-1, 1)
        out = self.block.experts(x.repeat_interleave(ids.shape[1], 0), one, torch.ones_like(one, dtype=x.dtype))
        return out.unflatten(0, tuple(ids.shape))


class BlockModel:
    """A full model in transformers, and its MoE layers by index.

    Args:
        checkpoint: of the full model.
        dtype: "auto" (the checkpoint's), "float32", "bfloat16" or "float16".
    """

    def __init__(self, checkpoint: Checkpoint, dtype: str = "float32") -> None:
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise UsageError("--dtype", f"is {dtype!r}", "choose auto, float32, bfloat16 or float16")
        logging.disable_progress_bar()
        self.family, self.checkpoint = checkpoint.family, checkpoint
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint.folder)
            model = AutoModelForCausalLM.from_pretrained(checkpoint.folder, dtype=dtype)
        except (ValueError, OSError, RuntimeError) as error:
            first = str(error).strip().splitlines()[0]
            raise LeapError(checkpoint.folder, f"transformers refuses it ({first[:600]})", "correct it") from error
        self.model: Any = model.to(self.device).eval()
        self.dtype = str(self.model.dtype).removeprefix("torch.")
        blocks = moe_blocks(self.model, self.family)
        self.layers = {index: MoeLayer(blocks[index], self.family) for index in sorted(blocks)}
        self._captured: tuple[Path, Captured] | None = None

    def encode(self, items: Sequence[Item]) -> list[list[int]]:
        """Return the token ids of prompt and answer of every item."""
        ids = [one.prompt + one.answer for one in encoding.encode_items(self.tokenizer, items)]
        longest = self.model.config.get_text_config().max_position_embeddings
        encoding.check_lengths([len(one) for one in ids], longest, "item")
        return ids

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def capture(
        self, ids: Sequence[Sequence[int]], folder: Path, layers: Sequence[int], under: Plan | None = None,
        progress: Progress | None = None,
    ) -> Captured:  # fmt: skip
        """Write the inputs x [T, H] of MoE layers to disk, one file per item, and no more than one item in memory.

        Args:
            ids: token ids of every item, from :meth:`encode`.
            folder: where to; files of the same items there are replaced.
            layers: which ones; the forward pass ends at the last.
            under: a plan that the routers follow meanwhile, None for the full model.
            progress: called with items done and items in all.
        """
        folder.mkdir(parents=True, exist_ok=True)
        seen: dict[str, torch.Tensor] = {}
        with ExitStack() as stack:
            if under is not None:
                stack.enter_context(masked_routers(self.model, self.family)).assign([under])
            for layer in layers:
                hook = _Keep(seen, str(layer), layer == max(layers))
                stack.callback(self.layers[layer].block.register_forward_pre_hook(hook).remove)
            for number, one in enumerate(ids):
                try:
                    self.model(input_ids=torch.tensor([list(one)], device=self.device), use_cache=False)
                except _EnoughError:
                    pass
                save_file(seen, folder / _file(number))
                seen.clear()
                if progress is not None:
                    progress(number + 1, len(ids))
        return Captured(folder, tuple(map(len, ids)), self.device)

    def captured(
        self, ids: Sequence[Sequence[int]], folder: Path, layers: Sequence[int], progress: Progress | None = None
    ) -> Captured:
        """Capture the full model's inputs, or take what this process has captured in this folder already."""
        if self._captured is None or self._captured[0] != folder:
            self._captured = folder, self.capture(ids, folder, layers, progress=progress)
        return self._captured[1]

    @torch.inference_mode()  # type: ignore[untyped-decorator, unused-ignore]
    def block_outputs(self, ids: Sequence[int], plans: Sequence[Plan], layers: Sequence[int]) -> torch.Tensor:
        """Return what the decoder block of the last of ``layers`` puts out for one item under each plan, [S, T, H].

        The plans may differ in ``layers`` alone: blocks before the first run once, with the first plan, and only from
        there on once per plan.
        """
        seen: list[torch.Tensor] = []

        def spread(
            _module: Any, args: tuple[Any, ...], given: dict[str, Any]
        ) -> tuple[tuple[Any, ...], dict[str, Any]]:
            # What comes along (mask, rotary angles) has one row, too, and broadcasts.
            if args:
                return (args[0].expand(len(plans), -1, -1), *args[1:]), given
            return args, given | {"hidden_states": given["hidden_states"].expand(len(plans), -1, -1)}

        def keep(_module: Any, _args: Any, output: Any) -> None:
            seen.append(output[0] if isinstance(output, tuple) else output)
            raise _EnoughError

        with masked_routers(self.model, self.family) as routers, ExitStack() as stack:
            stack.callback(self._decoder(layers[0]).register_forward_pre_hook(spread, with_kwargs=True).remove)
            stack.callback(self._decoder(layers[-1]).register_forward_hook(keep).remove)
            routers.assign(plans)
            for index, router in routers.layers.items():
                router.rows = router.rows[:1] if index < layers[0] else router.rows
            try:
                self.model(input_ids=torch.tensor([list(ids)], device=self.device), use_cache=False)
            except _EnoughError:
                pass
        return seen[0]

    def _decoder(self, layer: int) -> Any:
        """The decoder block that holds a MoE block."""
        names = {id(block): name for name, block in self.model.named_modules()}
        return self.model.get_submodule(names[id(self.layers[layer].block)].rpartition(".")[0])


@dataclass(frozen=True, slots=True)
class Captured:
    """Inputs of MoE layers on disk.

    Args:
        folder: item-NUMBER.safetensors, a tensor [T, H] per layer in each.
        tokens: of every item.
        device: where they are read to.
    """

    folder: Path
    tokens: tuple[int, ...]
    device: torch.device

    def read(self, item: int, layer: int) -> torch.Tensor:
        """Return one item's x [T, H] at one layer; nothing else is read."""
        with safe_open(self.folder / _file(item), "pt", device=str(self.device)) as file:
            return file.get_tensor(str(layer))


def _file(item: int) -> str:
    return INPUTS.replace("*", f"{item:06d}")


def discard_inputs(folder: Path) -> None:
    """Remove what :meth:`BlockModel.capture` has written to a folder, and the folder if nothing else is in it."""
    for file in folder.glob(INPUTS):
        file.unlink()
    with suppress(OSError):
        folder.rmdir()


class _EnoughError(Exception):
    """Ends a forward pass at the last layer that is asked for."""


@dataclass(frozen=True, slots=True)
class _Keep:
    """A hook before a MoE block that keeps its input."""

    seen: dict[str, torch.Tensor]
    name: str
    last: bool

    def __call__(self, _block: Any, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        self.seen[self.name] = x.reshape(-1, x.shape[-1]).cpu().contiguous()
        if self.last:
            raise _EnoughError


class LayerResults:
    """What is known of each layer so far, on disk where a file is given: a run that is killed continues behind it.

    Args:
        path: JSON file, or None to keep it in memory only.
        identity: what must be the same for a run to be continued (JSON values).

    Raises UsageError where the file is of another run, CheckpointError where it is of none.
    """

    def __init__(self, path: Path | None, identity: Mapping[str, Any]) -> None:
        self._path, self._identity = path, dict(identity)
        self._layers: dict[str, Any] = {}
        if path is None or not path.exists():
            return
        known = read_json(path)
        if not isinstance(known, dict) or not all(isinstance(known.get(key), dict) for key in ("of", "layers")):
            raise CheckpointError(path, "is no state of a search", "remove it, or choose another --state")
        for key, value in self._identity.items():
            found = known["of"].get(key)
            if found != value:
                raise other_search(path, key, found, value)
        self._layers = known["layers"]

    def get(self, layer: int) -> Any:
        """What was put for a layer, or None."""
        return self._layers.get(str(layer))

    def put(self, layer: int, value: Any) -> None:
        """Remember a layer's result (JSON)."""
        self._layers[str(layer)] = value
        if self._path is not None:
            write_json(self._path, {"of": self._identity, "layers": self._layers})
