"""Schemathesis over the OpenAPI of the admin routes: whatever it makes up is answered as the schema says, never by 5xx.

Nothing that it makes up is a plan of the model, so that no request gets as far as the engine, which is not there.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import schemathesis
from fastapi import FastAPI
from hypothesis import HealthCheck, settings
from prometheus_client import CollectorRegistry
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
)

from leap_serve.checkpoint import Checkpoint
from leap_serve.server.admin import ADMIN_HEADER, admin_router
from leap_serve.server.app import leap_router
from leap_serve.server.metrics import Counters
from leap_serve.server.slots import Specialists
from leap_serve.server.specialists import Base
from synthetic import make, qwen_config, qwen_tensors

CHECKS = [
    not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance,
    negative_data_rejection,
]  # fmt: skip


@cache
def routes() -> FastAPI:
    base = Base.of(Checkpoint.open(make(Path(mkdtemp()) / "m", qwen_tensors(), qwen_config())))
    specialists = Specialists(None, base, ["m"], None, Counters(CollectorRegistry()))
    app = FastAPI()
    app.include_router(leap_router({"model": "m"}, []))
    app.include_router(admin_router(specialists, "right"))
    return app


schema = schemathesis.openapi.from_asgi("/openapi.json", routes())


@schema.parametrize()
@settings(max_examples=40, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck))
def test_our_routes_keep_to_their_schema(case: schemathesis.Case) -> None:
    case.call_and_validate(headers={ADMIN_HEADER: "right"}, checks=CHECKS)
