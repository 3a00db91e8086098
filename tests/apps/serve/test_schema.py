"""schemathesis makes requests from the server's own description; none may fail the server."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import hypothesis
import pytest
from starlette.testclient import TestClient

pytest.importorskip("schemathesis")

import schemathesis
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from mlx_specstream.apps.serve.openapi import description
from tests.apps.serve.conftest import Live, MakeService

SCHEMA = schemathesis.openapi.from_dict(description())
EXAMPLES = int(os.environ.get("SCHEMATHESIS_EXAMPLES", "40"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture
def live(make_service: MakeService, tiny_caller: Any, go_live: Callable[..., Live]) -> Live:
    return go_live(make_service(tiny_caller, max_tokens=2, max_tokens_limit=2))


@pytest.mark.slow
@SCHEMA.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=list(hypothesis.HealthCheck),
)
def test_no_request_fails_the_server(case: Any, live: Live) -> None:
    case.call_and_validate(base_url=live.url, checks=CHECKS, timeout=120)


def test_the_description_is_served(client: TestClient) -> None:
    found = client.get("/openapi.json").json()
    assert found == description()
    body = found["components"]["schemas"]["ChatRequest"]
    assert body["required"] == ["messages"]
