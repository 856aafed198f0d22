"""The API follows its OpenAPI description: each response to valid or invalid requests is a described one."""

from __future__ import annotations

from http import HTTPStatus

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    ignored_auth,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from harness import WAIT_TIMEOUT, Appliance, only_on

pytestmark = only_on("process", "the responses do not depend on the backend")

EXAMPLES = 30
TOO_LARGE = HTTPStatus.REQUEST_ENTITY_TOO_LARGE
CHECKS = [
    content_type_conformance,
    ignored_auth,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
]
OPERATIONS = [
    *(f"POST /api/v1/workers/{name}" for name in ("allocate", "renew", "lookup", "release", "revoke")),
    "POST /api/v1/pools/delete",
    "POST /api/v1/auth/check",
    "GET /api/v1/pools",
    "GET /api/v1/pools/{name}",
    "GET /api/v1/issuers",
    "GET /api/v1/audience",
    *(f"GET {at}/{name}" for at in ("", "/api/v1") for name in ("health", "ready")),
]
REQUIRE_BEARER = {
    "POST /api/v1/workers/allocate",
    "POST /api/v1/workers/revoke",
    "POST /api/v1/pools/delete",
    "GET /api/v1/pools",
    "GET /api/v1/pools/{name}",
    "GET /api/v1/issuers",
}
RULED = {"rbac": {"rules": [{"users": ["somebody"]}]}}


@pytest.fixture(scope="module")
def ruled(tmp_path_factory, tools, world):
    """An appliance with rules, so that callers have different rights."""
    appliance = Appliance(tmp_path_factory.mktemp("appliance"), tools, world=world)
    appliance.up_with({"scaling": {"min": 1, "max": 2}, "auth": RULED})
    appliance.all_idle()
    yield appliance
    appliance.finish()


@pytest.fixture(scope="module")
def described(ruled):
    return schemathesis.openapi.from_url(f"http://127.0.0.1:{ruled.ports['api']}/openapi.json")


def test_every_operation_is_tried(described):
    assert {result.ok().label for result in described.get_all_operations()} == set(OPERATIONS)


@pytest.mark.parametrize(
    ("operation", "mode"),
    [(operation, GenerationMode.POSITIVE) for operation in OPERATIONS]
    + [(operation, GenerationMode.NEGATIVE) for operation in OPERATIONS if "POST" in operation or "{" in operation],
)
def test_each_response_is_as_described(ruled, described, operation, mode):
    admin = {"Authorization": f"Bearer {(ruled.home / 'admin.token').read_text().strip()}"}
    seen = set()
    (wanted,) = (found for result in described.get_all_operations() if (found := result.ok()).label == operation)

    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        derandomize=True,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=wanted.as_strategy(generation_mode=mode))
    def all_of_them(case):
        if mode is GenerationMode.POSITIVE and operation.endswith("/allocate"):  # an existing pool
            kept = {name: case.body[name] for name in ("jobId", "metadata") if name in case.body}
            case.body = {"poolName": "default", "wait": "20s", **kept}
        for headers in (admin, {}):
            response = case.call(headers=headers, timeout=WAIT_TIMEOUT)
            check(response)
            seen.add(response.status_code)
            wrong = (
                mode is GenerationMode.NEGATIVE and response.status_code != TOO_LARGE
            )  # schemathesis does not count it as a rejection
            case.validate_response(response, checks=CHECKS + [negative_data_rejection] * wrong)
            if operation.endswith("/allocate") and response.status_code == HTTPStatus.OK:
                token = response.json()["token"]
                assert ruled.http("POST", "/api/v1/workers/release", {"token": token})[0] == HTTPStatus.OK

    def check(response):
        """Checks what must hold for every response."""
        answer_text = response.text
        assert "Traceback" not in answer_text
        code = response.json().get("error", {}).get("code")
        assert response.status_code < 500 or code == "NoCapacity", answer_text
        assert response.headers["x-request-id"]

    all_of_them()
    if mode is GenerationMode.POSITIVE and operation.endswith(("/allocate", "/revoke", "/pools", "/check", "/ready")):
        assert HTTPStatus.OK in seen
    if operation in REQUIRE_BEARER:
        assert HTTPStatus.UNAUTHORIZED in seen


def test_no_request_caused_an_error_in_the_log(ruled):
    assert "audit.decision" in ruled.log
    assert (ruled.home / "admin.token").read_text().strip() not in ruled.log
    assert "Traceback" not in ruled.log
