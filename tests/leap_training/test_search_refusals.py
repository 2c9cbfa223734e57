"""What a search cannot do is refused before its model is loaded, in the words of the method that was asked for.

The models here cannot be loaded, so that whatever is asked later than that says something else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from families import SPECIFIC, make_checkpoint
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.remake import Remaker
from leap_serve.errors import LeapError, UnsupportedError
from leap_serve.plan import BaseModel, LayerPlan, Merge, Plan
from leap_serve.search_flags import reads
from leap_training.methods.blocks import BlockModel
from leap_training.methods.moe_i2 import check_rank
from profiles import simulate
from synthetic import make, qwen_config, qwen_tensors

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


@pytest.fixture
def loading(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a search ends with that comes as far as loading its model, whatever model that is."""

    def load(*_: Any) -> None:
        raise LeapError("model", "is being loaded", "nothing refused it")

    monkeypatch.setattr(BlockModel, "__init__", load)
    return "model: is being loaded; nothing refused it"


def refusal(capsys: pytest.CaptureFixture[str], out: Path, model: Path, method: str, *flags: str) -> str:
    """The line that a search for 4 experts, or as flags say, ends with."""
    return ended(capsys, out, model, method, *flags)[1]


def ended(
    capsys: pytest.CaptureFixture[str], out: Path, model: Path, method: str, *flags: str, status: int = 1
) -> tuple[int, str]:
    size = [] if {"--budget", "--experts"} & set(flags) else ["--experts", "4"]
    task = ["--task", "toy-gsm"] if reads(method, "task") else []
    assert main(["search", str(model), "--method", method, *size, *task, *flags, "-o", str(out)]) == status
    assert not out.exists()
    return status, capsys.readouterr().err.splitlines()[-1]


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
        ("llama4_text", "naee", ["--temperature", "2"], "--temperature: is part of this model's expert inputs"),
        ("llama4_text", "moe-i2", ["--temperature", "2"], "--temperature: is part of this model's expert inputs"),
        ("llama4_text", "hc-smoe", ["--temperature", "2"], "--temperature: is part of this model's expert inputs"),
    ],
)
def test_what_a_method_cannot_search(
    family: str, method: str, flags: list[str], said: str, unloadable: Callable[[str], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert said in refusal(capsys, tmp_path / "plan.json", unloadable(family), method, *flags)


def test_noise_on_inputs_that_hang_on_the_temperature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, flags = make_checkpoint("llama4_text", tmp_path / "m", num_experts_per_tok=2), ["--budget", "0.75"]
    base = plan_of(model, temperature=2.0)
    base.save(tmp_path / "base.json")
    said = refusal(capsys, tmp_path / "plan.json", model, "lexi", *flags, "--temperature", "3")
    assert said == "leap search: --temperature: is part of this model's expert inputs; leave it out"
    said = refusal(capsys, tmp_path / "plan.json", model, "lexi", *flags, "--on", str(tmp_path / "base.json"))
    what = "has a router temperature other than 1, which is part of this model's expert inputs"
    assert said == f"leap search: {tmp_path / 'base.json'}: {what}; give another plan"
    assert "transformers refuses it" in refusal(capsys, tmp_path / "plan.json", model, "lexi", *flags)


@pytest.mark.parametrize(
    ("method", "flags", "said"),
    [
        ("eep", ["--temperature", "2"], "--temperature: eep keeps equally many slots and τ = 1"),
        ("eep", ["--allocation", "global"], "--allocation: eep retains equally many in every layer"),
        ("tsep", ["--allocation", "global"], "--allocation: tsep retains equally many in every layer"),
        ("naee", ["--allocation", "global"], "--allocation: NAEE retains equally many in every layer"),
        ("lexi", ["--experts", "3"], "--experts: is 3 active experts per layer; lexi takes 1 to 2"),
        ("lexi", ["--budget", "0.1"], "--budget: 0.1 is 1 active experts over all layers; lexi takes 4 to 8"),
        ("naee", ["--model", "elsewhere"], "--model: is "),
    ],
)
def test_a_command_line_that_cannot_be_carried_out_ends_with_2(
    method: str, flags: list[str], said: str, unloadable: Callable[[str], Path], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model = unloadable("qwen3_moe")
    shutil.copytree(model, tmp_path / "elsewhere")
    flags = [str(tmp_path / flag) if flag == "elsewhere" else flag for flag in flags]
    assert said in ended(capsys, tmp_path / "plan.json", model, method, *flags, status=2)[1]


UNSERVED = [
    ("hc-smoe", [], "merges experts; choose a --method that merges none"),
    ("eep", [], "merges experts; choose a --method that merges none"),
    ("naee", ["--skip"], "skips experts; leave --skip out"),
    ("naee", ["--skip", "--temperature", "2"],
     "skips experts and has a router temperature other than 1; leave --skip out, and leave --temperature out"),
    ("tsep", ["--temperature", "2"], "has a router temperature other than 1; leave --temperature out"),
    ("moe-i2", [], "retains more experts in some layers than in others; choose another --method"),
    ("lexi", ["--budget", "0.75"], "has a higher top_k in some layers than in others; choose another --method"),
    ("lexi", ["--budget", "0.5", "--temperature", "2"], "has a router temperature other than 1"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "flags", "said"), UNSERVED)
def test_a_plan_that_no_engine_would_serve(
    method: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = unserved(tmp_path)
    found = refusal(capsys, tmp_path / "plan.json", model, method, *flags)
    assert f"{model}: no engine serves DeepseekV2ForCausalLM (deepseek_v2) cut by a plan that {said}" in found


def test_the_form_of_a_plan_that_was_given_is_mended_by_another_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base = unserved(tmp_path), tmp_path / "base.json"
    plan_of(model, temperature=2.0).save(base)
    said = refusal(capsys, tmp_path / "plan.json", model, "lexi", "--budget", "0.5", "--on", str(base))
    assert said.endswith(f"cut by a plan that has a router temperature other than 1; give another plan than {base}")


@pytest.mark.parametrize("place", ["tuned", "m"])
def test_tuned_weights_that_could_not_be_written(
    place: str, loading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {n: ("F8_E4M3" if ".mlp.experts." in n else kind, shape) for n, (kind, shape) in qwen_tensors().items()}
    model = make(tmp_path / "m", tensors, qwen_config())
    assert loading in refusal(capsys, tmp_path / "plan.json", model, "tsep")
    flags, status = ["--tuned", str(tmp_path / place), "--force"], 2 if place == "m" else 1
    said = ended(capsys, tmp_path / "plan.json", model, "tsep", *flags, status=status)[1]
    assert ("is quantised (" in said and said.endswith("; leave --tuned out")) is (place == "tuned")
    assert ("lies in the source" in said) is (place == "m")


@pytest.mark.parametrize(("method", "flags", "said"), [
    ("leap", ["--allocation", "global"], "retains more experts in some layers than in others; retain equally many"),
    ("evolution", ["--temperature", "2"], "has a router temperature other than 1; leave --temperature out"),
    ("leap", ["--temperature", "search"], "has a router temperature other than 1; leave --temperature out"),
])  # fmt: skip
def test_a_plan_that_no_engine_would_serve_is_not_searched_in_the_engine_either(
    method: str, flags: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = unserved(tmp_path)
    source = Checkpoint.open(model)
    routed = simulate(layers=len(source.moe_layers), experts=source.num_experts, top_k=source.top_k)
    replace(routed, base=source.identity(), made_by={"model": str(model)}).save(tmp_path / "profile")
    found = refusal(capsys, tmp_path / "plan.json", tmp_path / "profile", method, *flags)
    assert f"no engine serves DeepseekV2ForCausalLM (deepseek_v2) cut by a plan that {said}" in found


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("naee", []), ("tsep", []), ("lexi", ["--budget", "0.5"]), ("lexi", ["--budget", "1"]),
        ("moe-i2", ["--experts", "2"]), ("moe-i2", ["--experts", "8"]),
    ],
)  # fmt: skip
def test_a_plan_that_comes_out_even_is_searched_whoever_serves_the_family(
    method: str, flags: list[str], loading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert loading in refusal(capsys, tmp_path / "plan.json", unserved(tmp_path), method, *flags)


def unserved(tmp_path: Path) -> Path:
    """A model of a family that our plugin does not serve."""
    config = qwen_config(architectures=["DeepseekV2ForCausalLM"], model_type="deepseek_v2")
    config["n_routed_experts"] = config.pop("num_experts")
    return make(tmp_path / "m", qwen_tensors(), config)


def plan_of(model: Path, **layer: Any) -> Plan:
    """A plan that keeps all experts of every layer."""
    checkpoint = Checkpoint.open(model)
    every = LayerPlan(tuple(range(E)), checkpoint.top_k, **layer)
    return Plan(checkpoint.identity(), E, dict.fromkeys(checkpoint.moe_layers, every))


@pytest.mark.parametrize("dtype", ["BF16", "F8_E4M3"])
def test_experts_are_merged_just_where_the_cut_can(
    dtype: str, loading: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = {
        name: (dtype if ".mlp.experts." in name else kind, shape) for name, (kind, shape) in qwen_tensors().items()
    }
    model = make(tmp_path / "m", tensors, qwen_config())
    one = ((0, 1.0),)
    plan = plan_of(model, merge=Merge(tuple(one for _ in range(E)), ()))
    try:
        Remaker.of(Checkpoint.open(model), plan)
        cannot = False
    except UnsupportedError:
        cannot = True
    assert cannot is (dtype == "F8_E4M3")
    for method in ("hc-smoe", "eep"):
        said = refusal(capsys, tmp_path / "plan.json", model, method)
        assert (f"--method {method}: merges unquantised experts; model.layers.0.mlp.experts." in said) is cannot
        assert (loading in said) is not cannot


DOES = {
    "merges": {"merge": Merge(tuple(((e, 1.0),) for e in range(E)), ())}, "skips": {"skip": 0.5},
    "narrows": {"channels": ((0, 1),) * E}, "truncates the matrices of": {"ranks": (1,) * E},
}  # fmt: skip


@pytest.mark.parametrize("does", DOES)
def test_a_plan_to_start_from_only_chooses_experts(
    does: str, unloadable: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, base = unloadable("qwen3_moe"), tmp_path / "base.json"
    plan_of(model, **DOES[does]).save(base)
    flags = ["--budget", "0.5", "--on", str(base)]
    said = ended(capsys, tmp_path / "plan.json", model, "lexi", *flags, status=2)[1]
    assert said == f"leap search: {base}: {does} experts; give a plan that only chooses experts"
    plan_of(model).save(base)
    assert "transformers refuses it" in refusal(capsys, tmp_path / "plan.json", model, "lexi", *flags)
    replace(plan_of(model), base=BaseModel("other", "0" * 64)).save(base)
    assert f"leap search: {base}: was made for other" in refusal(capsys, tmp_path / "plan.json", model, "lexi", *flags)


def test_help_names_the_methods_that_take_what(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = " ".join(capsys.readouterr().out.replace("-\n", "-").split())
    assert "the model itself: random, naee, naee-progressive, moe-i2, hc-smoe, lexi, tsep, eep take either" in shown
    assert "naee, moe-i2, hc-smoe: items of the training split" in shown
    assert "naee, moe-i2, hc-smoe: --items of --task's training split" in shown


def test_help_says_what_a_budget_is_a_share_of(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["search", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert "of the routed experts, e.g. 0.125; intra: of every expert's channels; lexi: of the active experts" in shown
