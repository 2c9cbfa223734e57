"""One row per MoE family: names in checkpoints and configs, and how the router works. Data only.

Every family keeps its routed experts on dimension 0, either as ``experts.{e}.…`` tensors or as one
tensor ``experts.…`` of shape [E, …]; the router is a linear layer with E output rows.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from leap_serve.errors import UnsupportedError

RouterKind = Literal["softmax", "sigmoid", "topk-softmax", "sigmoid-bias"]


@dataclass(frozen=True, slots=True)
class Family:
    """What must be known about one MoE family.

    Args:
        model_type: of the text config, as transformers names it.
        architecture: stock architecture name in config.json.
        block: name of the MoE block inside a decoder layer.
        router: name of the router inside the block.
        num_experts_key, top_k_key: config keys of E and of the experts per token.
        router_kind: softmax (over all experts, then top-k), topk-softmax (top-k of logits, softmax
            over those), sigmoid, sigmoid-bias (a correction bias takes part in the selection only).
        vllm: "module:Class" of the stock vLLM model that our plugin subclasses, or None where the
            family can be cut but our plugin does not serve it.
        weight_on_input: the router weight multiplies the expert's input (Llama-4), not its output.
        group_keys: config keys (n_group, topk_group) of group-limited routing, or None.
        width_key: config key of the routed experts' intermediate size.
        shares_width: config key of the shared experts, where their size hangs on ``width_key`` as well: such a
            family's routed experts cannot be made narrower alone. "" where there always are some.
        renormalises: whether the weights of chosen experts are made to sum to 1, where transformers' router has no setting
            norm_topk_prob that says so.
        fused_halves: a layer's experts lie as ``gate_up_proj`` [E, H, 2·I], gate before up, and ``down_proj`` [E, I, H].
    """

    model_type: str
    architecture: str
    block: str
    router: str
    num_experts_key: str
    top_k_key: str
    router_kind: RouterKind
    vllm: str | None
    weight_on_input: bool = False
    group_keys: tuple[str, str] | None = None
    width_key: str = "moe_intermediate_size"
    shares_width: str | None = None
    fused_halves: bool = False
    renormalises: bool = True

    @property
    def leap_architecture(self) -> str:
        """The architecture name of checkpoints that a stock engine must refuse."""
        return f"Leap{self.architecture}"

    def sums_to_one(self, router: Any) -> bool:
        """Whether a transformers router makes the weights of chosen experts sum to 1."""
        return bool(getattr(router, "norm_topk_prob", self.renormalises))


_V = "vllm.model_executor.models"
FAMILIES: tuple[Family, ...] = (
    Family("qwen3_moe", "Qwen3MoeForCausalLM", "mlp", "gate", "num_experts", "num_experts_per_tok", "softmax", f"{_V}.qwen3_moe:Qwen3MoeForCausalLM"),
    Family("qwen2_moe", "Qwen2MoeForCausalLM", "mlp", "gate", "num_experts", "num_experts_per_tok", "softmax", f"{_V}.qwen2_moe:Qwen2MoeForCausalLM"),
    Family("mixtral", "MixtralForCausalLM", "block_sparse_moe", "gate", "num_local_experts", "num_experts_per_tok", "softmax", f"{_V}.mixtral:MixtralForCausalLM", width_key="intermediate_size"),
    Family("olmoe", "OlmoeForCausalLM", "mlp", "gate", "num_experts", "num_experts_per_tok", "softmax", f"{_V}.olmoe:OlmoeForCausalLM", width_key="intermediate_size"),
    Family("gpt_oss", "GptOssForCausalLM", "mlp", "router", "num_local_experts", "num_experts_per_tok", "topk-softmax", f"{_V}.gpt_oss:GptOssForCausalLM", width_key="intermediate_size"),
    Family("llama4_text", "Llama4ForCausalLM", "feed_forward", "router", "num_local_experts", "num_experts_per_tok", "sigmoid", f"{_V}.llama4:Llama4ForCausalLM", weight_on_input=True, width_key="intermediate_size", shares_width="", fused_halves=True),
    Family("glm4_moe", "Glm4MoeForCausalLM", "mlp", "gate", "n_routed_experts", "num_experts_per_tok", "sigmoid-bias", f"{_V}.glm4_moe:Glm4MoeForCausalLM", group_keys=("n_group", "topk_group"), shares_width="n_shared_experts"),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", "mlp", "gate", "n_routed_experts", "num_experts_per_tok", "sigmoid-bias", None, group_keys=("n_group", "topk_group"), shares_width="n_shared_experts"),
    Family("kimi_k2", "DeepseekV3ForCausalLM", "mlp", "gate", "n_routed_experts", "num_experts_per_tok", "sigmoid-bias", None, group_keys=("n_group", "topk_group"), shares_width="n_shared_experts"),
    Family("deepseek_v2", "DeepseekV2ForCausalLM", "mlp", "gate", "n_routed_experts", "num_experts_per_tok", "softmax", None, group_keys=("n_group", "topk_group"), shares_width="n_shared_experts", renormalises=False),
    Family("minicpm", "MiniCPMForCausalLM", "mlp", "gate", "num_experts", "num_experts_per_tok", "softmax", None, width_key="intermediate_size"),
)  # fmt: skip

_LAYER = re.compile(r"^(?P<stack>(?:.*\.)?layers)\.(?P<layer>\d+)\.(?P<rest>.+)$")


@dataclass(frozen=True, slots=True)
class Role:
    """What a checkpoint tensor is to the cut.

    ``kind``: "expert" (``expert`` is its id), "fused" (all experts of a layer, dim 0 = E), "router"
    (dim 0 = E) or "other". ``layer`` counts MTP layers stored apart after the model's own layers.
    """

    kind: Literal["expert", "fused", "router", "other"]
    layer: int = -1
    expert: int = -1
    before: str = ""
    after: str = ""

    def renamed(self, expert: int) -> str:
        """Return the tensor's name under another expert id."""
        return f"{self.before}{expert}{self.after}"


def role_of(family: Family, name: str, num_hidden_layers: int) -> Role:
    """Classify a checkpoint tensor by its name."""
    found = _LAYER.match(name)
    if not found:
        return Role("other")
    mtp = f".{found['stack']}".endswith(".mtp.layers")
    layer = int(found["layer"]) + (num_hidden_layers if mtp else 0)
    head = f"{found['stack']}.{found['layer']}."
    rest = found["rest"]
    experts = f"{family.block}.experts."
    if rest.startswith(experts):
        expert, dot, after = rest[len(experts) :].partition(".")
        if expert.isdigit():
            return Role("expert", layer, int(expert), head + experts, dot + after)
        return Role("fused", layer)
    if rest.startswith(f"{family.block}.{family.router}."):
        return Role("router", layer)
    return Role("other", layer)


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the part of a config.json that describes the language model."""
    nested = config.get("text_config")
    return nested if isinstance(nested, dict) else config


def family_of(config: Mapping[str, Any], where: object) -> Family:
    """Return the row for a config.json, or raise UnsupportedError that lists the families."""
    model_type = text_config(config).get("model_type")
    for family in FAMILIES:
        if family.model_type == model_type:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise UnsupportedError(where, f"model_type is {model_type!r}, not one of {known}", "use a supported MoE family")


def served_families() -> tuple[Family, ...]:
    """The families that the vLLM plugin serves with a plan that stock vLLM cannot hold."""
    return tuple(family for family in FAMILIES if family.vllm is not None)
