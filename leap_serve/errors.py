"""The one error a user sees: where, what, got, remedy. Everything else is a bug and keeps its traceback."""

from __future__ import annotations

from typing import Any


class LeapError(Exception):
    """A problem that the user can cause and can mend.

    Args:
        where: file, flag or object at fault, e.g. ``ckpt/leap.json``.
        what: what is wrong, with the numbers.
        remedy: what to do about it.

    The text reads ``where: what; remedy``. Commands print it without a traceback and exit with 1.
    """

    exit_code = 1
    result: dict[str, Any] | None = None
    """What ``--json`` prints all the same, of a verb that came to its end and found a bound broken."""

    def __init__(self, where: object, what: str, remedy: str) -> None:
        self.where, self.what, self.remedy = str(where), what, remedy
        super().__init__(f"{self.where}: {what}; {remedy}")

    def __reduce__(self) -> tuple[type[LeapError], tuple[str, str, str]]:
        # vLLM's worker processes send exceptions to their parent.
        return type(self), (self.where, self.what, self.remedy)


class UsageError(LeapError):
    """A command line that cannot be carried out as it stands; exit status 2."""

    exit_code = 2


class PlanError(LeapError):
    """A plan that contradicts itself or the model."""


class CheckpointError(LeapError):
    """A checkpoint that is missing, damaged, or not what its manifest says."""


class UnsupportedError(LeapError):
    """A model family, version or setting that we do not handle."""
