"""Which methods of ``leap search`` read which of its flags: data only, for the verb and for who writes its command line."""

from __future__ import annotations

ONE_SHOT = ("frequency", "gate-mass", "ean", "ean-mean", "ean-weighted", "reap", "easy-ep", "magnitude", "random")
"""Methods that score each expert once and take the best."""
SEARCHES = ("random-search", "greedy", "evolution", "evo-counts", "rco")
"""Methods that have the engine evaluate plans, as the agent does."""
_SEARCHED = ("leap", *SEARCHES)
_NAEE = ("naee", "naee-progressive")
_BY_LAYER = (*_NAEE, "moe-i2", "hc-smoe")
_COUNTS = (*ONE_SHOT, "moe-pruner", *_NAEE, "moe-i2", "tsep", "eep", *_SEARCHED)
"""Methods that choose which experts each layer retains."""

READERS: dict[str, tuple[str, ...]] = {
    "allocation": tuple(method for method in _COUNTS if method != "moe-i2"), "guard_super_experts": ONE_SHOT, "top_k": (*_COUNTS, "hc-smoe"),
    "episodes": (*_SEARCHED, "eep"), "items": (*_SEARCHED, *_BY_LAYER, "eep"),
    "task": (*_SEARCHED, *_BY_LAYER, "tsep", "eep"),
    "model": (*_SEARCHED, "moe-pruner", "intra", *_BY_LAYER, "lexi", "tsep", "eep"),
    "dtype": (*_SEARCHED, *_BY_LAYER, "lexi", "eep"), "state": (*_SEARCHED, *_BY_LAYER, "lexi", "tsep", "eep"),
    **dict.fromkeys(
        ("prior", "engine", "tensorboard", "alpha", "size_coef", "latency_coef", "workload", "measure", "lookahead",
         "finalists"),
        _SEARCHED,
    ),
    **dict.fromkeys(
        ("reward", "shaping", "stop", "batch", "learning_rate", "ppo_epochs", "patience", "warm", "save_policy",
         "lookahead_episodes"),
        ("leap",),
    ),
    "draws": ("lexi",), "solver": ("lexi",), "on": ("lexi", "intra"), "skip": _NAEE, "rank": ("moe-i2",),
    "zero": ("moe-pruner",), "steps": ("tsep",), "train_items": ("tsep",), "tuned": ("tsep",),
}  # fmt: skip
"""Flag, by its name among the parsed ones → the methods that read it. All of them read those that are not here."""


def reads(method: str, flag: str) -> bool:
    """Whether a method reads a flag of leap search."""
    return method in READERS.get(flag, (method,))
