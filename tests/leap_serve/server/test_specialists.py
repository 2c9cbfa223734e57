"""What is known of a specialist before an engine runs: that it fits the model, its state file, and who may load it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from safetensors.torch import save_file

from cutting import EVEN, UNEVEN, plan_of
from leap_serve.adapter import RouterHead, write_overlays
from leap_serve.checkpoint import Checkpoint
from leap_serve.cli import main
from leap_serve.cut.write import cut
from leap_serve.errors import CheckpointError, LeapError, PlanError, UnsupportedError, UsageError
from leap_serve.plan import LayerPlan, Plan
from leap_serve.server.admin import ADMIN_HEADER, admin_router
from leap_serve.server.metrics import Counters
from leap_serve.server.slots import Specialists
from leap_serve.server.specialists import (
    MAX_PLAN_BYTES,
    Base,
    parse_flag,
    plan_from,
    read_specialist,
    read_state,
    write_state,
)
from synthetic import make, qwen_config, qwen_tensors


@pytest.fixture
def base(model: Path) -> Base:
    return Base.of(Checkpoint.open(model))


@pytest.fixture
def tuned(model: Path, tmp_path: Path) -> Path:
    """A cut with a router head for its second layer."""
    cut(model, plan_of(model), tmp_path / "tuned")
    write_overlays(tmp_path / "tuned", router_head={1: RouterHead(torch.ones(4, 16))}, adapter=None, made_by={})
    return tmp_path / "tuned"


@pytest.mark.parametrize(
    "flag", ["math", "math=", "=plan.json", "ma th=p", "a/b=p", "-a=p", "ä=p", "text=p", f"{'a' * 65}=p"]
)
def test_flags_that_name_no_specialist(flag: str) -> None:
    with pytest.raises(UsageError):
        parse_flag(flag)
    assert parse_flag("math.v2_a-1=a=b") == ("math.v2_a-1", Path("a=b"))


def test_a_plan_is_found_by_file_and_by_folder(model: Path, tuned: Path, base: Base, tmp_path: Path) -> None:
    plan_of(model).save(tmp_path / "plans" / "plan.json")
    for path in (tmp_path / "plans", tmp_path / "plans" / "plan.json"):
        found = read_specialist("a", path, base)
        assert (found.plan.fingerprint, found.head) == (plan_of(model).fingerprint, None)
    for path in (tuned, tuned / "leap.json"):
        found = read_specialist("a", path, base)
        assert found.head is not None and found.head.content == (tuned / "router_head.safetensors").read_bytes()
        assert found.source == tuned / "leap.json"
    # The weights of a cut are not needed, only its manifest and its head.
    for path in tuned.glob("model*"):
        path.unlink()
    assert read_specialist("a", tuned, base) == found


def test_tuned_experts_need_a_server_of_their_own(tuned: Path, base: Base) -> None:
    (tuned / "adapter").mkdir()
    with pytest.raises(UnsupportedError, match=rf"adapter: adapts the experts, .*leap serve {tuned}$"):
        read_specialist("a", tuned, base)
    (tuned / "adapter").rmdir()
    stated = json.loads((tuned / "leap.json").read_text())
    stated["checkpoint"]["exported"] = {"merged": {"adapter": "0"}}
    (tuned / "leap.json").write_text(json.dumps(stated))
    with pytest.raises(UnsupportedError, match=r"leap\.json: was exported.*leap serve"):
        read_specialist("a", tuned, base)
    # Under another name, and sent as a plan, it is no more the base's than before.
    (tuned / "leap.json").rename(tuned / "math.json")
    with pytest.raises(UnsupportedError, match=r"math\.json: was exported"):
        read_specialist("a", tuned / "math.json", base)
    with pytest.raises(UnsupportedError, match=r"^plan: was exported"):
        plan_from(stated, "plan", base)
    stated["checkpoint"] = {"trained": {"report": "finetune.json"}}
    with pytest.raises(UnsupportedError, match=r"^plan: was trained"):
        plan_from(stated, "plan", base)


def test_a_tuned_model_is_shared_by_nobody(tuned: Path) -> None:
    with pytest.raises(UnsupportedError, match=r"router_head.*tunes the model that specialists would share"):
        Base.of(Checkpoint.open(tuned))


def test_plans_that_do_not_fit_are_named_by_their_file(model: Path, base: Base, tmp_path: Path) -> None:
    plan, where = plan_of(model), tmp_path / "plan.json"
    wrong: list[tuple[Plan, type[LeapError], str]] = [
        (replace(plan, base=replace(plan.base, sha256="0" * 64)), PlanError, "was made for"),
        (replace(plan, layers={0: plan.layers[0]}), PlanError, r"in layers \[0\], the model has 8 in \[0, 1\]"),
        (plan_of(model, {**UNEVEN, 0: LayerPlan((0, 1, 2), 3)}), PlanError, "top_k 3, the model's is 2"),
        (
            plan_of(model, {**UNEVEN, 0: LayerPlan((0, 1, 2), 2, skip=0.5)}),
            UnsupportedError,
            "running engine's routers cannot do",
        ),
    ]
    for one, kind, message in wrong:
        one.save(where)
        with pytest.raises(kind, match=rf"{where}: .*{message}"):
            read_specialist("a", where, base)
    where.write_bytes(b" " * (MAX_PLAN_BYTES + 1))
    for path, message in ((where, "larger than 4 MiB"), (tmp_path, "larger"), (tmp_path / "absent", "is no plan")):
        with pytest.raises(PlanError, match=message):
            read_specialist("a", path, base)
    for stated in ([], 7, {"format_version": 1}, {**plan.to_json(), "num_experts": float("inf")}):
        with pytest.raises(PlanError, match=r"^plan: "):
            plan_from(stated, "plan", base)
    assert plan_from({**plan.to_json(), "made_by": "me", "scores": 7}, "plan", base).made_by == {}


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({1: RouterHead(torch.ones(3, 16))}, r"shape \[3, 16\], the plan and the model ask for \[4, 16\]"),
        ({1: RouterHead(torch.ones(4, 8))}, r"shape \[4, 8\]"),
        ({1: RouterHead(torch.ones(4, 16), torch.ones(4))}, "replaces nothing"),
        ({5: RouterHead(torch.ones(4, 16))}, "replaces nothing"),
        ({1: RouterHead(torch.ones(4, 16, dtype=torch.float64))}, "F64"),
    ],
)
def test_a_head_that_does_not_fit(head: dict[int, RouterHead], message: str, tuned: Path, base: Base) -> None:
    tensors = {f"layers.{layer}.weight": one.weight for layer, one in head.items()}
    tensors |= {f"layers.{layer}.bias": one.bias for layer, one in head.items() if one.bias is not None}
    fingerprint = json.loads((tuned / "leap.json").read_text())["fingerprint"]
    save_file(tensors, tuned / "router_head.safetensors", {"leap_fingerprint": fingerprint})
    with pytest.raises(LeapError, match=message):
        read_specialist("a", tuned, base)


def test_a_head_of_another_cut(model: Path, tuned: Path, base: Base, tmp_path: Path) -> None:
    cut(model, plan_of(model, EVEN), tmp_path / "other")
    shutil.copy(tmp_path / "other" / "leap.json", tuned / "leap.json")
    with pytest.raises(CheckpointError, match=r"has fingerprint .*it belongs to another cut"):
        read_specialist("a", tuned, base)


def test_what_was_loaded_survives_a_restart(model: Path, tuned: Path, base: Base, tmp_path: Path) -> None:
    state = tmp_path / "state.json"
    assert read_state(state, base) == []
    plan_of(model, EVEN).save(tmp_path / "plan.json")
    kept = [read_specialist("a", tuned, base), read_specialist("b", tmp_path / "plan.json", base)]
    write_state(state, base, kept)
    (tmp_path / "plan.json").unlink()
    found = read_state(state, base)
    assert [(one.name, one.plan.fingerprint, one.head, one.source) for one in found] == [
        (one.name, one.plan.fingerprint, one.head, one.source) for one in kept
    ]
    assert json.loads(state.read_text())["made_by"]["version"]
    write_overlays(tuned, router_head={1: RouterHead(torch.zeros(4, 16))}, adapter=None, made_by={})
    with pytest.raises(CheckpointError, match=rf"no longer the router head that {state} names for a"):
        read_state(state, base)
    other = Base.of(Checkpoint.open(make(tmp_path / "o" / "m", qwen_tensors(hidden=32), qwen_config(hidden_size=32))))
    with pytest.raises(PlanError, match=rf"{state}: a: was made for"):
        read_state(state, other)
    for damage in ("[]", "{}", "{", json.dumps({"format_version": 1, "specialists": [{}]})):
        state.write_text(damage)
        with pytest.raises(CheckpointError, match=str(state)):
            read_state(state, base)


def test_nobody_writes_where_there_is_no_room(base: Base, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LeapError, match="cannot be written"):
        write_state(tmp_path / "file" / "state", base, [])


def test_serve_refuses_before_vllm_loads(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan_of(model).save(tmp_path / "p.json")
    for flags, status, message in (
        (["--specialist", "a"], 2, "--specialist: is 'a'"),
        (
            ["--specialist", f"a={tmp_path}/p.json", "--specialist", f"a={tmp_path}/p.json"],
            2,
            "given 2 times for 1 names",
        ),
        (["--specialist", f"a={tmp_path}/absent.json"], 1, "absent.json: is no plan"),
    ):
        assert main(["serve", str(model), *flags]) == status
        assert message in capsys.readouterr().err


def client(base: Base, key: str = "right") -> TestClient:
    """The routes without an engine: whatever is refused never reaches one."""
    app = FastAPI()
    app.include_router(admin_router(Specialists(None, base, ["m"], None, Counters(CollectorRegistry())), key))
    return TestClient(app)


def test_an_admin_key_may_be_any_text(base: Base) -> None:
    asking, key = client(base, "clé"), ADMIN_HEADER.encode()
    for sent, status in (("clé".encode(), 200), (b"cle", 401), ("clè".encode(), 401)):
        assert asking.get("/v1/leap/specialists", headers={key: sent}).status_code == status


@pytest.mark.parametrize("key", [None, "", "wrong", "right2", "Bearer right"])
def test_nothing_is_read_without_the_admin_key(key: str | None, base: Base) -> None:
    headers = {} if key is None else {ADMIN_HEADER: key}
    for method, path in (("GET", ""), ("POST", ""), ("DELETE", "/a")):
        refused = client(base).request(method, f"/v1/leap/specialists{path}", headers=headers, content=b"{")
        assert refused.status_code == 401
        assert refused.json()["error"]["type"] == "UnauthorizedError"
    assert client(base).get("/v1/leap/specialists", headers={ADMIN_HEADER: "right"}).json() == {"data": []}


BAD_BODIES: list[tuple[bytes, int]] = [
    (b"", 400), (b"{", 400), (b"[]", 400), (b"null", 400), (b'{"name": "a"}', 400), (b"[" * 100_000, 400),
    (b'{"name": "a", "path": "p", "plan": {}}', 400), (b'{"name": "a", "path": "\\u0000"}', 400),
    (b'{"name": "\\ud800", "path": "p"}', 400), (b'{"name": "a", "path": "p", "\\ud800": 1}', 400),
    (b'{"name": "a", "plan": {"format_version": "\\ud800"}}', 400), (b"\xff\xfe", 400),
    (b'{"name": "a", "plan": {"num_experts": 1e999, "format_version": 1, "base_model": {}, "retained": {}}}', 400),
    (b'{"name": "a", "path": "' + b"/a" * 2000 + b'"}', 400), (b" " * (MAX_PLAN_BYTES + 1), 413),
]  # fmt: skip


@pytest.mark.parametrize(("body", "status"), BAD_BODIES, ids=range(len(BAD_BODIES)))
def test_malformed_bodies_are_refused_in_words(body: bytes, status: int, base: Base) -> None:
    headers = {ADMIN_HEADER: "right", "Content-Type": "application/json"}
    refused = client(base).post("/v1/leap/specialists", headers=headers, content=body)
    assert refused.status_code == status, refused.text
    error: dict[str, Any] = refused.json()["error"]
    assert error["code"] == status and error["message"]


def test_a_refusal_may_quote_what_utf8_cannot_hold(model: Path, base: Base) -> None:
    plan = plan_of(model)
    foreign = replace(plan, base=replace(plan.base, id="\ud800", sha256="0" * 64)).to_json()
    headers = {ADMIN_HEADER: "right", "Content-Type": "application/json"}
    body = json.dumps({"name": "a", "plan": foreign}).encode()
    refused = client(base).post("/v1/leap/specialists", headers=headers, content=body)
    assert (refused.status_code, "was made for ?" in refused.json()["error"]["message"]) == (400, True)


def test_names_that_are_gone_are_counted_no_more() -> None:
    registry = CollectorRegistry()
    counters = Counters(registry)
    request = counters.begin("a")
    assert registry.get_sample_value("leap:specialist_requests_running", {"model_name": "a"}) == 1
    request.end()
    assert registry.get_sample_value("leap:specialist_requests_running", {"model_name": "a"}) == 0
    assert registry.get_sample_value("leap:specialist_requests_total", {"model_name": "a"}) == 1
    counters.forget("a")
    counters.forget("a")
    assert registry.get_sample_value("leap:specialist_requests_total", {"model_name": "a"}) is None
