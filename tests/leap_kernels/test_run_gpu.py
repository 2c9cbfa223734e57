"""bench/run_gpu.py: what is done stays done, what time cut off goes on, what failed is named; a rehearsal on a CPU."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from leap_kernels.tuning import Shape
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli.tune_kernels import shapes_of

SCRIPT = Path(__file__).parents[2] / "bench" / "run_gpu.py"


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    spec = importlib.util.spec_from_file_location("run_gpu", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["run_gpu"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_second_call_goes_on(gpu: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A stage appends a line each time it runs; the second one waits, with a child of its own, until a file is there."""
    marks, gate = tmp_path / "marks", tmp_path / "gate"
    (tmp_path / gpu.LOGS).mkdir()
    note = f"open({str(marks)!r}, 'a').write('%s\\n')"
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)', {str(marks)!r}])"
    waits = f"import pathlib; {note % 'waits'}\nif not pathlib.Path({str(gate)!r}).exists():\n    {child}"
    plan = [
        gpu.Stage("first", (sys.executable, "-c", note % "first"), 0),
        gpu.Stage("waits", (sys.executable, "-c", waits), 0),
        gpu.Stage("fails", (sys.executable, "-c", f"{note % 'fails'}; raise SystemExit('no such kernel')"), 0),
        gpu.Stage("long", (sys.executable, "-c", note % "long"), 10**6),
    ]
    assert gpu.run(plan[:1], tmp_path, 9, retry=False) and marks.read_text().split() == ["first"]
    assert not gpu.run(plan[:2], tmp_path, 2 / 60, retry=False), "the second one would wait for ten minutes"
    assert not orphans(str(marks)), "what a stage started ends with it"
    gate.touch()
    marks.unlink()
    assert not gpu.run(plan, tmp_path, 9, retry=False)
    said = capsys.readouterr().out
    assert f"failed: fails, see {tmp_path / 'gpu_logs' / 'fails.log'}; --retry" in said and "left: long" in said
    assert "no such kernel" in (tmp_path / "gpu_logs" / "fails.log").read_text()
    assert marks.read_text().split() == ["waits", "fails"], "the first one was done"
    gpu.run(plan, tmp_path, 9, retry=False)
    assert marks.read_text().split() == ["waits", "fails"]
    gpu.run(plan, tmp_path, 9, retry=True)
    assert marks.read_text().split()[-1] == "fails"
    state = json.loads((tmp_path / gpu.LOGS / "stages.json").read_text())
    assert {name: one["done"] for name, one in state.items()} == {"first": True, "waits": True, "fails": False}


def test_a_stage_whose_product_is_gone_runs_again(gpu: ModuleType, tmp_path: Path) -> None:
    (tmp_path / gpu.LOGS).mkdir()
    made = tmp_path / "made"
    plan = [gpu.Stage("make", (sys.executable, "-c", f"open({str(made)!r}, 'x')"), 0, makes=made)]
    assert gpu.run(plan, tmp_path, 1, retry=False) and gpu.run(plan, tmp_path, 1, retry=False)
    made.unlink()
    assert gpu.run(plan, tmp_path, 1, retry=False) and made.exists()


def orphans(word: str) -> list[str]:
    """Processes with a word among their arguments; one that was killed may take a moment to go."""
    deadline = time.monotonic() + 20
    while True:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                text = path.read_bytes()
            except OSError:
                continue
            found += [path.parent.name] if word.encode() in text and b"time.sleep" in text else []
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def test_every_engine_and_model_of_the_benches_is_planned(gpu: ModuleType, tmp_path: Path) -> None:
    names = [stage.name for stage in gpu.stages(tmp_path)]
    assert len(set(names)) == len(names)
    assert {name.split()[1] for name in names if name.startswith("engine ") and name != "engine runs"} == {
        "128", "64", "32", "16", "8", "uneven",
    }  # fmt: skip
    assert {name.split()[1] for name in names if name.startswith("kernel ")} == {
        "Qwen3-30B-A3B", "Qwen3-235B-A22B", "Llama-4-Maverick",
    }  # fmt: skip


def flag(stage: Any, name: str) -> list[str]:
    """What follows a flag in a stage's command, up to the next one."""
    words = list(stage.command)
    found = words[words.index(name) + 1 :] if name in words else []
    return found[: next((place for place, word in enumerate(found) if word.startswith("--")), len(found))]


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B", "Qwen3-235B-A22B", "Llama-4-Maverick"])
def test_no_number_of_tokens_is_far_from_a_tuned_one(model: str, gpu: ModuleType, tmp_path: Path) -> None:
    """vLLM, and our tables, take the launch of the nearest number: with 64 and 4096 alone, 2048 tokens would get 64's.

    Each model is tuned before its kernels are measured, into the folder that the bench reads.
    """
    plan = gpu.stages(tmp_path)
    tune, kernel = (next(stage for stage in plan if stage.name == f"{what} {model}") for what in ("tune", "kernel"))
    assert plan.index(tune) < plan.index(kernel) and flag(kernel, "--models") == [model]
    (folder,) = flag(tune, "-o")
    assert kernel.env["LEAP_KERNEL_CONFIGS"] == folder
    tuned = [int(word) for word in flag(tune, "--tokens")]
    for tokens in [int(word) for word in flag(kernel, "--tokens")] or [2**power for power in range(13)]:
        nearest = min(tuned, key=lambda one: abs(one - tokens))
        assert max(nearest, tokens) <= 4 * min(nearest, tokens), f"{tokens} tokens run as {nearest} do"


def test_what_is_tuned_is_what_the_kernel_bench_measures(gpu: ModuleType, tmp_path: Path) -> None:
    """The command writes a checkpoint whose layers have just the model's shapes, at every |I| of the bench."""
    sparse = tmp_path / "layers"
    write = next(stage.command for stage in gpu.stages(tmp_path) if flag(stage, "--model") == ["Llama-4-Maverick"])
    words = [str(sparse) if word == write[write.index("--sparse") + 1] else word for word in write]
    for _ in range(2):  # one that is there already stays
        subprocess.run(words, check=True, timeout=120)
    found = shapes_of(Checkpoint.open(sparse), "bfloat16")
    assert set(found) == {Shape(experts, 5120, 8192, 1, "bfloat16") for experts in (128, 64, 32, 16, 8)}
    assert sum(path.stat().st_blocks for path in sparse.iterdir()) * 512 < 2**24, "no room is taken"


def test_without_a_gpu_it_says_so() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and "no CUDA GPU here" in done.stderr


@pytest.mark.slow
def test_rehearsal(tmp_path: Path) -> None:
    """Every command of the plan on a CPU; a second call has nothing left to do."""
    command = [sys.executable, str(SCRIPT), "--smoke", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850)
    assert done.returncode == 0, done.stdout[-6000:]
    state = json.loads((tmp_path / "gpu_logs" / "stages.json").read_text())
    assert all(stage["done"] for stage in state.values()) and len(state) == 6
    assert len(list((tmp_path / "kernels").glob("E=*,device_name=cpu,_interpreted.json"))) == 2
    rows = [json.loads(line) for name in ("kernel", "engine_gpu") for line in (tmp_path / f"{name}.jsonl").open()]
    assert {row["bench"] for row in rows} == {"kernel", "engine_gpu"} and all(row["smoke"] for row in rows)
    again = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert again.returncode == 0 and "all stages were run" in again.stdout and "==" not in again.stdout
