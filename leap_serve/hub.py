"""Where models come from: a folder, the bundled one, or the Hugging Face Hub."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from leap_serve.errors import CheckpointError

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


WANTED = ("*.safetensors", "*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
"""All that is ever downloaded of a model."""


def resolve_model(model: str, revision: str | None = None, wanted: Sequence[str] = WANTED) -> Path:
    """Return the folder of a model: an existing folder, ``leap-tiny``, or a Hugging Face id that is downloaded.

    Only safetensors, JSON, tokenizer and template files are ever downloaded, of these the ``wanted`` ones.
    Raises CheckpointError.
    """
    path = Path(model)
    if path.is_dir():
        return path
    if model == "leap-tiny":
        bundled = Path(__file__).parent / "models" / "leap-tiny"
        if not (bundled / "config.json").exists():
            raise CheckpointError(bundled, "the bundled model is missing", "install leap-serve again")
        return bundled
    if path.exists():
        raise CheckpointError(path, "is a file, not a checkpoint folder", "give the folder that holds config.json")
    if not _HUB_ID.fullmatch(model) or path.parent.is_dir():
        raise CheckpointError(model, "no such folder", "check the path, or give a Hugging Face id such as org/name")
    return _download(model, revision, wanted)


def _download(model: str, revision: str | None, wanted: Sequence[str]) -> Path:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError

    try:
        found = snapshot_download(
            model, revision=revision, allow_patterns=list(wanted), ignore_patterns=["original/*", "consolidated*"]
        )
    except (OSError, ValueError, HfHubHTTPError, httpx.HTTPError) as error:
        reason = str(error).strip().split("\n")[0][:160]
        raise CheckpointError(
            model, f"cannot be had from the Hugging Face Hub ({type(error).__name__}: {reason})",
            "check the name and the network, or download it elsewhere and give its folder",
        ) from None  # fmt: skip
    return Path(found)
