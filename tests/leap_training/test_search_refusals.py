"""What a search cannot do is refused before its model is loaded, in the words of the method that was asked for.

The models here cannot be loaded, so that whatever is asked later than that says something else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from families import SPECIFIC, make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.remake import Remaker
from leap_serve.errors import UnsupportedError
from leap_serve.plan import LayerPlan, Plan
from leap_training.methods.moe_i2 import check_rank

E = 8
FUSED = ("gpt_oss", "llama4_text")


@pytest.fixture
def unloadable(family_checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Gives a family's checkpoint that is sound but for its tokenizer, the first thing that a search loads."""

    def get(family: str) -> Path:
        folder = Path(shutil.copytree(family_checkpoint(family), tmp_path / family))
        (folder / "tokenizer_config.json").write_text("{")
        return folder

    return get


def refusal(capsys: pytest.CaptureFixture[str], out: Path, model: Path, method: str, *flags: str) -> str:
    """The line that a search for 4 experts ends with."""
    command = ["search", str(model), "--method", method, "--experts", "4", "--task", "toy-gsm"]
    assert main([*command, *flags, "-o", str(out)]) == 1 and not out.exists()
    return capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("family", FUSED)
def test_a_rank_of_experts_in_one_tensor(
    family: str, unloadable: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = unloadable(family)
    said = refusal(capsys, tmp_path / "plan.json", model, "moe-i2", "--rank", "4")
    assert said.startswith("leap search: --rank: ") and ".experts." in said and "leave it out" in said
    assert "transformers refuses it" in refusal(capsys, tmp_path / "plan.json", model, "moe-i2"), "loading comes later"


@pytest.mark.parametrize("family", SPECIFIC)
def test_a_rank_is_refused_just_where_the_cut_would(family: str, family_checkpoint: Callable[[str], Path]) -> None:
    checkpoint = Checkpoint.open(family_checkpoint(family))
    layer = LayerPlan(tuple(range(E)), checkpoint.top_k, ranks=(1,) * E)
    plan = Plan(checkpoint.identity(), E, dict.fromkeys(checkpoint.moe_layers, layer))

    def refuses(check: Callable[[], object]) -> bool:
        try:
            check()
        except UnsupportedError:
            return True
        return False

    assert refuses(lambda: Remaker.of(checkpoint, plan)) is (family in FUSED)
    assert refuses(lambda: check_rank(checkpoint)) is (family in FUSED)


def test_routing_groups_name_no_method_that_was_not_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = make_checkpoint("glm4_moe", tmp_path / "m", n_group=2, topk_group=1)
    for method in ("naee", "naee-progressive", "moe-i2", "hc-smoe", "tsep", "eep"):
        assert refusal(capsys, tmp_path / "plan.json", model, method) == (
            "leap search: --method: searches cannot keep the model's 2 routing groups equal; choose a one-shot --method"
        )


@pytest.mark.parametrize(
    ("family", "method", "flags", "said"),
    [
        ("llama4_text", "eep", [], "--method eep: llama4_text's router (sigmoid) has no softmax to map"),
        ("qwen3_moe", "eep", ["--temperature", "2"], "--temperature: eep keeps equally many slots and τ = 1"),
        ("qwen3_moe", "eep", ["--allocation", "global"], "eep keeps equally many slots"),
        ("qwen3_moe", "naee", ["--allocation", "global"], "--allocation: NAEE retains equally many in every layer"),
        ("llama4_text", "naee", ["--temperature", "2"], "--temperature: is part of this model's expert inputs"),
        ("qwen3_moe", "tsep", ["--allocation", "global"], "--allocation: TSEP retains equally many in every layer"),
    ],
)
def test_what_a_method_cannot_search(
    family: str, method: str, flags: list[str], said: str, unloadable: Callable[[str], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert said in refusal(capsys, tmp_path / "plan.json", unloadable(family), method, *flags)


def test_help_says_what_a_budget_is_a_share_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "of the routed experts, e.g. 0.125; intra: of every expert's channels; lexi: of the active experts" in shown
