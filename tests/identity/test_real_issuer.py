"""An ID token of an independent issuer (oidc-provider-mock), obtained as a person does it: by logging in."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
import urllib.parse
from datetime import UTC, datetime, timedelta
from http.client import HTTPConnection

import pytest

from bkpool.core.auth import OIDC
from bkpool.identity.issuer_keys import IssuerKeys
from bkpool.identity.oidc import OidcAuthenticator, TrustedIssuer

pytestmark = pytest.mark.slow

CLIENT = "bkpool-tests"


SERVER = """
import sys, oidc_provider_mock
with oidc_provider_mock.run_server_in_thread() as server:
    print(server.server_port, flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def port():
    """Runs in a separate process, where its warnings are not errors. It exits when its input is closed."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    with subprocess.Popen([sys.executable, "-c", SERVER], **pipes) as server:
        yield int(server.stdout.readline())
        server.stdin.close()
        assert server.wait(60) == 0


def post(port: int, path: str, form: dict[str, str], **headers: str):
    connection = HTTPConnection("localhost", port, timeout=60)
    try:
        sent = {"Content-Type": "application/x-www-form-urlencoded", **headers}
        connection.request("POST", path, urllib.parse.urlencode(form), sent)
        answer = connection.getresponse()
        return answer.headers.get("Location", ""), answer.read()
    finally:
        connection.close()


def log_in(port: int, user: str) -> str:
    """The authorization code flow, as a browser and a client perform it."""
    back = "http://localhost/back"
    query = urllib.parse.urlencode(
        {"client_id": CLIENT, "redirect_uri": back, "response_type": "code", "scope": "openid email"}
    )
    location, _ = post(port, f"/oauth2/authorize?{query}", {"sub": user})
    code = urllib.parse.parse_qs(urllib.parse.urlsplit(location).query)["code"][0]
    basic = base64.b64encode(f"{CLIENT}:any".encode()).decode()
    form = {"grant_type": "authorization_code", "code": code, "redirect_uri": back}
    _, body = post(port, "/oauth2/token", form, Authorization=f"Basic {basic}")
    return json.loads(body)["id_token"]


@pytest.fixture(scope="module")
def token(port):
    return log_in(port, "ann@example.org")


async def judged(port: int, token: str, later: timedelta = timedelta(), **settings: object):
    oidc = OIDC.model_validate({"issuer": f"http://localhost:{port}", "audience": CLIENT, **settings})
    issuers = IssuerKeys(clock=time.monotonic)
    try:
        authenticator = OidcAuthenticator(
            issuers, lambda: [TrustedIssuer("mock", oidc, oidc.audience)], lambda: datetime.now(UTC) + later
        )
        (verdict,) = await authenticator.authenticate(token)
        return verdict
    finally:
        await issuers.close()


async def test_a_user_who_logged_in_is_authenticated(port, token):
    verdict = await judged(port, token, conditions=[{"claim": "email", "patterns": ["*@example.org"]}])
    assert verdict.identity.name == "ann@example.org"


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"audience": "another"}, "aud is"),
        ({"conditions": [{"claim": "email", "patterns": ["*@example.com"]}]}, "claim email is 'ann@example.org'"),
        ({"later": timedelta(hours=2)}, "expired"),
    ],
    ids=str,
)
async def test_a_token_that_does_not_fit_the_configuration_is_refused(port, token, settings, why):
    assert why in (await judged(port, token, **settings)).refusal


async def test_a_token_that_the_issuer_did_not_sign_is_refused(port, token):
    header, body, signature = token.split(".")
    claims = json.loads(base64.urlsafe_b64decode(body + "==")) | {"sub": "root"}
    forged = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    assert (await judged(port, f"{header}.{forged}.{signature}")).refusal == "the token's signature is wrong"
