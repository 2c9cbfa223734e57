"""``Leap<Stock>ForCausalLM`` for every served family, built from the family table when vLLM first asks for it."""

from __future__ import annotations

import importlib
from typing import Any

from leap_serve.architectures import served_families
from leap_vllm.layers import LeapModel


def __getattr__(name: str) -> Any:
    for family in served_families():
        if family.leap_architecture == name and family.vllm is not None:
            module, _, stock = family.vllm.partition(":")
            bases = (LeapModel, getattr(importlib.import_module(module), stock))
            built = type(name, bases, {"__module__": __name__, "leap_family": family})
            globals()[name] = built
            return built
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
