"""The YAML of LEAP's authors: their settings as flags of our verbs, their words about the model as claims to check.

    model:    {type: llama_maverick, num_experts: 128, expert_size: 125829120, hidden_dim: 5120, …}
    pruning:  {target_experts: 16, budget_constraint: 0.125, meta_episodes: 500, ppo_epochs: 4, learning_rate: 3e-4}
    routing:  {top_k: 2, temperature: 1.0, exploration_noise: 0.1, active_learning_samples: 1000}
    training: {batch_size: 8, gradient_accumulation: 16, max_length: 2048, warmup_steps: 100, total_steps: 5000}

``model`` also takes ``path``, a folder or model id; without it, the type names a published model. A recipe is refused
where its model's config.json says otherwise than such a claim. ``exploration_noise`` is the scale of the Gumbel noise,
``active_learning_samples`` the items labelled in each round, and a step sees batch_size × gradient_accumulation items.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from leap_serve.architectures import FAMILIES, family_of, text_config
from leap_serve.checkpoint import COUNT_KEYS
from leap_serve.errors import CheckpointError

SECTIONS: Mapping[str, Mapping[str, tuple[str, str]]] = {
    "pruning": {
        "target_experts": ("search", "experts"), "budget_constraint": ("search", "budget"),
        "meta_episodes": ("search", "episodes"), "ppo_epochs": ("search", "ppo-epochs"),
        "learning_rate": ("search", "learning-rate"),
    },
    "routing": {
        "top_k": ("search", "top-k"), "temperature": ("search", "temperature"), "exploration_noise": ("tune", "noise"),
        "active_learning_samples": ("tune", "labels"),
    },
    "training": {
        "batch_size": ("tune", "batch"), "gradient_accumulation": ("tune", "accumulate"),
        "max_length": ("tune", "max-length"), "warmup_steps": ("tune", "lr-warmup"), "total_steps": ("tune", "steps"),
    },
}  # fmt: skip
"""Section → key → the verb and its flag."""
IMPLIED = {"pruning": ("profile", "search", "cut"), "routing": ("tune",), "training": ("tune",)}
"""Section → the stages that it asks for."""
CLAIMS = ("type", "num_experts", "expert_size", "hidden_dim", "num_layers", "vocab_size")
TYPES = {
    "llama_maverick": ("llama4_text", "meta-llama/Llama-4-Maverick-17B-128E-Instruct"),
    "qwen_moe": ("qwen3_moe", "Qwen/Qwen3-235B-A22B"),
}
"""The authors' model types: what transformers calls them, and the model that each means."""
MAY_BE_0 = ("warmup_steps",)
TARGET = ("target_experts", "budget_constraint")

Stages = dict[str, dict[str, Any]]


def translate(raw: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[str]]:
    """Return the recipe in our own keys, the claims about its model, and everything that is wrong with it.

    A flag that the recipe gives a verb itself goes before the authors' key for it.
    """
    ours = {key: value for key, value in raw.items() if key not in SECTIONS}
    problems: list[str] = []
    stages: Stages = {}
    for section, keys in SECTIONS.items():
        if section not in raw:
            continue
        given = raw[section] if isinstance(raw[section], dict) else {}
        if not given:
            problems.append(f"{section} is not a mapping of settings")
        problems += [f"unknown key {section}.{key}, known are {', '.join(keys)}" for key in given if key not in keys]
        for stage in IMPLIED[section]:
            stages.setdefault(stage, {"method": "leap"} if stage == "search" else {})
        for key, value in given.items():
            if key in keys:
                (stage, flag), number = keys[key], _number(value, zero=key in MAY_BE_0)
                least = "from 0 on" if key in MAY_BE_0 else "above 0"
                problems += [f"{section}.{key} is {value!r}, not a number {least}"] if number is None else []
                stages[stage][flag] = number
    claims, wrong = _model(ours)
    problems += wrong
    if problems:
        return ours, claims, problems
    if "top-k" in stages.get("search", {}):
        claims["top_k"] = stages["search"]["top-k"]
    _combine(stages, claims)
    for stage, flags in stages.items():
        own = ours.get(stage) or {}
        if isinstance(own, dict):
            ours[stage] = _merged(flags, {str(flag).replace("_", "-"): value for flag, value in own.items()})
    return ours, claims, []


def _model(ours: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Replace a ``model`` that is a mapping by its path; return its claims and what is wrong with it."""
    model = ours.get("model")
    if not isinstance(model, dict):
        return {}, []
    problems = [f"unknown key model.{key}, known are path, {', '.join(CLAIMS)}" for key in model
                if key not in ("path", *CLAIMS)]  # fmt: skip
    claims = {key: value for key, value in model.items() if key in CLAIMS}
    for key, value in claims.items():
        if key != "type" and _number(value) is None:
            problems.append(f"model.{key} is {value!r}, not a number above 0")
        elif key != "type":
            claims[key] = _number(value)
    kind, known = claims.get("type"), [*TYPES, *(family.model_type for family in FAMILIES)]
    if kind is not None and kind not in known:
        problems.append(f"model.type is {kind!r}, known are {', '.join(known)}")
    if "path" not in model and kind not in TYPES:
        problems.append(f"model.path is missing, and only {' and '.join(TYPES)} name a published model")
    else:
        ours["model"] = str(model["path"]) if "path" in model else TYPES[str(kind)][1]
    return claims, problems


def _combine(stages: Stages, claims: dict[str, Any]) -> None:
    """Turn pairs of the authors' keys that mean one thing into one flag."""
    search, tune = stages.get("search", {}), stages.get("tune", {})
    if "experts" in search and "budget" in search:
        claims["budget"] = (search["experts"], search.pop("budget"))
    if "batch" in tune:
        tune["batch"] *= tune.get("accumulate", 1)


def _merged(authors: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    sizes = ("experts", "budget")
    dropped = sizes if any(size in own for size in sizes) else ()
    return {**{flag: value for flag, value in authors.items() if flag not in dropped}, **own}


def contradictions(config: Mapping[str, Any], claims: Mapping[str, Any], where: object) -> Iterator[str]:
    """Yield, for every claim that a model's config.json contradicts, the claim and the true value."""
    true = facts(config, where)
    for key in CLAIMS:
        if key not in claims:
            continue
        claim = TYPES[claims[key]][0] if claims[key] in TYPES else claims[key]
        if claim != true[key]:
            yield f"model.{key} is {_shown(claims[key])}, the model's is {_shown(true[key])}"
    if claims.get("top_k", 0) > int(true["top_k"]):
        yield f"routing.top_k is {claims['top_k']}, the model's is {true['top_k']}"
    if "budget" in claims:
        experts, budget = claims["budget"]
        kept = math.floor(budget * int(true["num_experts"]) + 0.5)
        if kept != experts:
            total = true["num_experts"]
            yield f"pruning.target_experts is {experts}, but budget_constraint {budget:g} of {total} experts is {kept}"


def facts(config: Mapping[str, Any], where: object) -> dict[str, int | str]:
    """What a model's config.json says of each claim; ``expert_size`` counts the parameters of one routed expert.

    Raises CheckpointError where it does not say it.
    """
    family, text = family_of(config, where), text_config(config)
    try:
        hidden, width = int(text["hidden_size"]), int(text[family.width_key])
        biases = 2 * width + hidden if family.model_type == "gpt_oss" else 0
        return {
            "type": family.model_type, "num_experts": int(next(text[key] for key in COUNT_KEYS if text.get(key))),
            "expert_size": 3 * hidden * width + biases, "hidden_dim": hidden,
            "num_layers": int(text["num_hidden_layers"]), "vocab_size": int(text["vocab_size"]),
            "top_k": int(text[family.top_k_key]),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError, StopIteration) as error:
        raise CheckpointError(where, f"config.json lacks a size ({error!r})", "restore the file") from None


def _number(value: Any, zero: bool = False) -> int | float | None:
    """A positive number (``zero``: or 0), also as YAML 1.1 reads 3e-4, namely as text; None where it is none.

    One without a fraction is an int, however it is written, for flags that count.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None
    if not (0 < number < math.inf or (zero and number == 0)):
        return None
    return int(number) if number.is_integer() else number


def _shown(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if isinstance(value, float) else str(value)
