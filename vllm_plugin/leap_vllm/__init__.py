"""leap-serve's plugin for vLLM: models whose MoE layers differ in experts, top_k and router temperature.

How it works, in ten lines. vLLM calls ``register`` in each of its processes; it names one architecture
per MoE family (``LeapQwen3MoeForCausalLM``, …) and the load format ``leap``, and patches nothing: stock
models run exactly as without it (but that a CPU's AMX tiles are asked for before they are used). A ``Leap…`` class (models.py) is the stock class plus a mixin. The mixin
reads the plan from leap.json beside the weights and refuses what contradicts it (loader.py). While the
stock ``__init__`` runs, decoder layer l is built with the config's expert count and top_k set to l's own
(layers.py), so that routers, experts and kernels get their true sizes and no vLLM code is copied.
Weights then load as always, since a cut checkpoint numbers its experts 0…|I|−1; what tuning laid beside it
is merged into them one tensor at a time, before vLLM shards it: the router head's rows, and the adapters'
ΔW of each expert (loader.py). A temperature τ ≠ 1 divides that
layer's logits in fp32 before vLLM's own scoring and top-k (router.py); it is in no weight. A map from the full
router's rows to merged experts, and the skipping of weak choices, are put around the same routing. All private
names of vLLM are in compat.py and its siblings, checked by version and by signature. Unquantised MoE layers ask
experts.py for their kernel: ours where a measured table says that it is faster, vLLM's everywhere else.
"""

from __future__ import annotations

import logging

from leap_serve.architectures import served_families
from leap_serve.errors import LeapError


def register() -> None:
    """Entry point ``vllm.general_plugins``: register our architectures and load format. Safe to call twice.

    With a vLLM that we do not support it says so, registers nothing and leaves stock models alone;
    vLLM itself then refuses a ``Leap…`` checkpoint.
    """
    from leap_vllm import compat, compat_experts, experts

    try:
        compat.check_vllm()
    except LeapError as error:
        logging.getLogger("vllm.leap").error("the leap plugin stays off: %s", error)
        return
    compat.allow_amx()
    for family in served_families():
        name = family.leap_architecture
        compat.register_model(family.architecture, name, f"leap_vllm.models:{name}")
    compat.register_loader("leap", "leap_vllm.loader:LeapLoader")
    try:
        compat_experts.register_experts(experts.choose)
    except LeapError as error:
        logging.getLogger("vllm.leap").error("MoE layers keep vLLM's own kernels: %s", error)
